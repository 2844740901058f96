"""Writes the tables of the documentation's pages on claims from the stored results.

    python recipes/benchmarks/claims.py
    python recipes/benchmarks/claims.py --take outputs/core_table

`--take` first adds the runs and learning rates of a core table to the stored results. Runs that are stored already are
replaced, and those of an arm whose learning rate is another now are dropped.
"""

from __future__ import annotations

import argparse
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from comparison.arms_table import arms_table
from comparison.claims import claims_table
from comparison.core import CORE, LEARNING_RATES, Tuned, best_learning_rate
from comparison.core_summary import Runs, a_run_a_line, core_tables, fewer_steps_table, mean_and_error
from comparison.premises_table import premises_table
from comparison.summary import markdown_table

RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parents[2] / "docs" / "pages"
WRITTEN = ("claims.md", "lab/core_table.md")
TAKEN = ("core_table.json", "learning_rates.json")

Stored = list[dict[str, Any]]  # compact runs


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
    found["arms"] = markdown_table(*arms_table())
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


def with_taken(stored: Stored, taken: Stored) -> Stored:
    """Return the stored runs with those that are taken, in the order of task, arm and seed.

    Raises:
        SystemExit: if a run that is taken was made with another budget or number of held-out problems.
    """
    lengths = {tuple(run[name] for name in ("budget", "eval_size", "max_updates")) for run in [*stored, *taken]}
    if len(lengths) > 1:
        raise SystemExit(f"Runs of different budget, eval_size and max_updates: {sorted(lengths, key=str)}.")
    rates = {(run["task"], run["arm"]): run["learning_rate"] for run in taken}
    kept = [
        run for run in stored if rates.get((run["task"], run["arm"]), run["learning_rate"]) == run["learning_rate"]
    ]
    merged = {(run["task"], run["arm"], run["seed"]): run for run in [*kept, *taken]}
    # seeds by their names, as files are ordered
    return [merged[key] for key in sorted(merged, key=lambda key: (*key[:2], str(key[2])))]


def with_taken_rates(stored: Tuned, taken: Tuned) -> Tuned:
    """Return what was measured at every learning rate, the newer of two where both are known."""
    found = deepcopy(stored)
    for task, arms in taken.items():
        for arm, rates in arms.items():
            for rate, seeds in rates.items():
                found.setdefault(task, {}).setdefault(arm, {}).setdefault(rate, {}).update(seeds)
    return found


def take(folder: Path, results: Path = RESULTS) -> None:
    """Add a core table to the stored results."""
    (runs, rates), (new_runs, new_rates) = (
        [json.loads((where / name).read_text()) for name in TAKEN] for where in (results, folder)
    )
    runs, rates = with_taken(runs, new_runs), with_taken_rates(rates, new_rates)
    (results / TAKEN[0]).write_text(a_run_a_line(runs))
    (results / TAKEN[1]).write_text(json.dumps(rates, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, help="the folder of a core table to add")
    args = parser.parse_args()
    if args.take is not None:
        if missing := [name for name in TAKEN if not (args.take / name).is_file()]:
            parser.error(f"{args.take} has no {' and no '.join(missing)}; core_table.py writes them when it ends.")
        take(args.take)
    found = tables()
    pages = {PAGES / name: filled((PAGES / name).read_text(), found) for name in WRITTEN}
    for path, text in pages.items():
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
