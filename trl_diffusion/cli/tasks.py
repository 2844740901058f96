"""List the tasks, with their data and prompts.

trl-diffusion tasks
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from trl_diffusion.tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for every task."""
    ArgumentParser("trl-diffusion tasks", description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    table = Table("task", "score", "data on the Hub", "offline", "prompts")
    for name, task in TASKS.items():
        table.add_row(
            name, task.description, task.hub_id or "", "generated" if task.embedded else "", ", ".join(task.prompts)
        )
    Console().print(table)


if __name__ == "__main__":
    main()
