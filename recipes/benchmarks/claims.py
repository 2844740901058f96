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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.claims import claims_table
from comparison.core import LEARNING_RATES, TASKS
from comparison.core_summary import Runs, core_tables, fewer_steps_table

RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parents[2] / "docs" / "pages"
WRITTEN = ("claims.md", "lab/core_table.md")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Return every table of the pages by its name, from the stored results."""
    premises: dict[str, Any] = json.loads((results / "premises.json").read_text())
    runs = Runs(json.loads((results / "core_table.json").read_text()))
    rates: dict[str, dict[str, float]] = json.loads((results / "learning_rates.json").read_text())
    surest = {task: premises[f"{task}, max_prob"] for task in TASKS}
    found = {f"claims {task}": markdown(*claims_table(surest, runs, task)) for task in TASKS if task in runs.tasks}
    found |= {title: markdown(head, lines) for title, head, lines in core_tables(runs)}
    _, head, lines = fewer_steps_table(runs)
    found["fewer steps"] = markdown(head, lines)
    found["learning rates"] = markdown(
        ["arm", *(f"{rate:g}" for rate in LEARNING_RATES)],
        [[arm, *_best_in_bold([of_arm[f"{rate:g}"] for rate in LEARNING_RATES])] for arm, of_arm in rates.items()],
    )
    found["premises"] = markdown(*premises_table(premises))
    return found


def _best_in_bold(values: Sequence[float]) -> list[str]:
    return [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]


def premises_table(premises: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of premises: a line for each, a column for each task and unmasking rule."""
    columns = [name for name in premises if name != "setting"]
    measured = [premises[name] for name in columns]

    def line(name: str, values: Sequence[float], digits: int = 2) -> list[str]:
        return [name, *(f"{value:.{digits}f}" for value in values)]

    lines = [
        line("accuracy of single samples, %", [100 * each["accuracy"] for each in measured], 1),
        line("groups with right and wrong completions, %", [100 * each["mixed_groups"] for each in measured], 1),
        line("uncertain tokens written after one to their right", [each["uncertain_postponed"] for each in measured]),
    ]
    for where, words in (("among_all", "all completions"), ("within_prompts", "completions of a prompt")):
        for signal in measured[0]["auc"]:
            name = f"AUC for failure among {words}, {signal.replace('_', ' ')}"
            lines.append(line(name, [each["auc"][signal][where] for each in measured]))
    for kind in measured[0]["gradient_share"]:
        name = f"share of the gradient norm in 4 steps, {GRADIENT[kind]}"
        lines.append(line(name, [each["gradient_share"][kind] for each in measured]))
    for outcome in ("right", "failed"):
        for block in (0, 3, 6, 8):
            name = f"continuations of {outcome} completions after {block} blocks, share right"
            lines.append(line(name, [each["continuations"][outcome][block] for each in measured]))
    for share in measured[0]["elbo_deviation"]:
        name = f"deviation of the ELBO at {100 * float(share):g} % masked, nats"
        lines.append(line(name, [each["elbo_deviation"][share] for each in measured], 1))
    for surrogate in measured[0]["cosine"]:
        name = f"cosine to the policy gradient, {surrogate.replace('_', ' ')}"
        lines.append(line(name, [each["cosine"][surrogate] for each in measured]))
    return ["premise", *columns], lines


GRADIENT = {
    "own": "each completion's own largest",
    "shared": "the best for all completions",
    "uniform": "drawn uniformly",
    "entropy": "by entropy of the batch",
    "entropy_own": "by a completion's entropy",
    "confidence_margin": "by margin of the batch",
    "confidence_margin_own": "by a completion's margin",
    "roec": "by RoEC of the batch",
    "roec_own": "by a completion's RoEC",
    "roec_cm": "by the hybrid score of the batch",
    "roec_cm_own": "by a completion's hybrid score",
}


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
