"""List the methods, with their papers and the configurations that come with the package.

trl-diffusion methods
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import PurePath

from rich.console import Console
from rich.table import Table

from trl_diffusion.cli.names import CONFIGS, packaged
from trl_diffusion.trainers import METHODS


def configurations(method: str) -> list[str]:
    """Return the names of a method's configurations for large models."""
    return [
        name
        for name in packaged(CONFIGS)
        if not name.startswith("embedded/") and PurePath(name).name.partition("_")[2] in (method, f"{method}_qlora")
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for every method."""
    ArgumentParser(
        "trl-diffusion methods", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    ).parse_args(arguments)
    table = Table("method", "paper", "title", "--config")
    for name, trainer in METHODS.items():
        paper = trainer._paper
        table.add_row(name, paper.get("id", ""), paper.get("title", ""), "\n".join(configurations(name)))
    console = Console()
    console.print(table)
    console.print(
        "Any of them with SAPO's process reward (2510.01544): add --num_rollouts 3, see llada_8b/countdown_sapo. "
        "Supervised fine-tuning: trl-diffusion train sft, see llada_8b/sft.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
