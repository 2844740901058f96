"""Print the versions and the hardware that a bug report needs.

trl-diffusion env
"""

from __future__ import annotations

import os
import platform
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from trl_diffusion import __version__

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "lm_eval")
_GIB = 2**30


def facts() -> dict[str, str]:
    """Return versions and hardware by name, as text."""
    found = {"trl-diffusion": __version__, "Python": platform.python_version(), "system": platform.platform()}
    found |= {package: _version(package) for package in PACKAGES}
    found["CPU"] = f"{os.cpu_count()} cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / _GIB:.0f} GiB"
    found["CUDA"] = str(torch.version.cuda or "this torch has none")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found[f"GPU {number}"] = f"{device.name}, {device.total_memory / _GIB:.0f} GiB"
    if not torch.cuda.device_count():
        found["GPU"] = "none"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the facts as a list that can be pasted into an issue."""
    ArgumentParser("trl-diffusion env", description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    for name, fact in facts().items():
        print(f"- {name}: {fact}")


if __name__ == "__main__":
    main()
