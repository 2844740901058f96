"""List the methods, with their papers and the configurations that come with the package.

trl-diffusion methods
"""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import PurePath

from trl_diffusion.cli.names import CONFIGS, packaged
from trl_diffusion.cli.parsing import cut
from trl_diffusion.trainers import METHODS


def configurations(method: str) -> list[str]:
    """Return the names of a method's configurations for large models."""
    return [
        name
        for name in packaged(CONFIGS)
        if not name.startswith("embedded/") and PurePath(name).name.partition("_")[2] in (method, f"{method}_qlora")
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every method with its paper and configurations."""
    ArgumentParser(
        "trl-diffusion methods", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    ).parse_args(arguments)
    width = shutil.get_terminal_size((100, 0)).columns
    for name, trainer in METHODS.items():
        paper = trainer._paper
        print(cut(f"{name:<14} {paper.get('id', ''):<11} {paper.get('title', '')}", width))
        for configuration in configurations(name):
            print(f"{'':<14} --config {configuration}")
    print(
        "\nsft: supervised fine-tuning, see llada_8b/sft.\nSAPO (2510.01544), a process reward, is added to any "
        "method by --num_rollouts 3, see llada_8b/countdown_sapo."
    )


if __name__ == "__main__":
    main()
