"""Writes the tables of the documentation's pages on claims from the stored results.

    python recipes/benchmarks/claims.py
    python recipes/benchmarks/claims.py --take outputs/core_table

`--take` first copies the runs and learning rates of a core table to the stored results.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from comparison.claims import claims_table
from comparison.core import CORE, LEARNING_RATES, Tuned, best_learning_rate
from comparison.core_summary import Runs, core_tables, fewer_steps_table, mean_and_error
from comparison.premises_table import premises_table
from comparison.summary import markdown_table

RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parents[2] / "docs" / "pages"
WRITTEN = ("claims.md", "lab/core_table.md")


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Return every table of the pages by its name, from the stored results."""
    premises: dict[str, Any] = json.loads((results / "premises.json").read_text())
    of_puzzles: dict[str, Any] = json.loads((results / "premises_puzzles.json").read_text())
    runs = Runs(json.loads((results / "core_table.json").read_text()))
    tuned: Tuned = json.loads((results / "learning_rates.json").read_text())
    found = {}
    for task in runs.tasks:
        surest_first = (premises | of_puzzles)[f"{task}, max_prob"]
        found[f"claims {task}"] = markdown_table(*claims_table(surest_first, runs, task))
    found |= {title: markdown_table(head, lines) for title, head, lines in core_tables(runs)}
    _, head, lines = fewer_steps_table(runs)
    found["fewer steps"] = markdown_table(head, lines)
    for task, measured in tuned.items():
        lines = [[arm, *_rates_of(tuned, task, arm)] for arm in CORE if arm in measured]
        found[f"learning rates {task}"] = markdown_table(["arm", *(f"{rate:g}" for rate in LEARNING_RATES)], lines)
    found["premises"] = markdown_table(*premises_table(premises))
    found["premises of puzzles"] = markdown_table(*premises_table(of_puzzles))
    return found


def _rates_of(tuned: Tuned, task: str, arm: str) -> list[str]:
    """Return mean and standard error at every learning rate that was tried, the chosen one in bold."""
    measured = {rate: [*tuned[task][arm].get(f"{rate:g}", {}).values()] for rate in LEARNING_RATES}
    found = {rate: mean_and_error(np.array(values)) if values else "" for rate, values in measured.items()}
    best = best_learning_rate(tuned, task, arm)
    return [f"**{value}**" if rate == best else value for rate, value in found.items()]


def filled(page: str, found: dict[str, str]) -> str:
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end of table -->` by the table of this name."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{found[match[1]]}\n\n<!-- end of table -->"

    return re.sub(r"<!-- table: (.*?) -->.*?<!-- end of table -->", replaced, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, help="the folder of a core table to store")
    args = parser.parse_args()
    if args.take is not None:
        for name in ("core_table.json", "learning_rates.json"):
            shutil.copy(args.take / name, RESULTS / name)
    for name in WRITTEN:
        path = PAGES / name
        path.write_text(filled(path.read_text(), tables()))
        print(path)


if __name__ == "__main__":
    main()
