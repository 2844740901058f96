"""List the tasks, with their data and prompts.

trl-diffusion tasks
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trl_diffusion.tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for every task."""
    ArgumentParser("trl-diffusion tasks", description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    table = Table(box=SIMPLE)
    for heading, wraps in {"task": False, "data on the Hub": False, "offline": False, "prompts": True}.items():
        table.add_column(heading, no_wrap=not wraps)
    for name, task in TASKS.items():
        table.add_row(name, task.hub_id or "none", "generated" if task.embedded else "no", ", ".join(task.prompts))
    Console().print(table)


if __name__ == "__main__":
    main()
