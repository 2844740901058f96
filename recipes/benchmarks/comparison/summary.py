"""Summarises the runs of the comparison: accuracies, paired differences, and tables of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from statistics_of_runs import sign_flip_p_value, standard_error

from comparison.arms import ARMS
from comparison.settings import SHORT


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per task and arm: accuracies, spread over seeds, and paired differences to the arm's baselines."""
    by_arm: dict[tuple[str, str], dict[int, dict]] = {}
    for run in runs:
        by_arm.setdefault((run["task"], run["arm"]), {})[run["seed"]] = run
    rows = []
    for (task, arm), of_seed in by_arm.items():
        row: dict[str, Any] = {"task": task, "arm": arm, "seeds": len(of_seed)}
        for measure in MEASURES:
            row[measure] = _mean_and_spread([MEASURES[measure](run) for run in of_seed.values()])
        for name in ("forward_units", "rollouts"):
            row[name] = float(np.mean([run[name] for run in of_seed.values()]))
        row["differences"] = [
            _difference(measure, baseline, of_seed, by_arm.get((task, baseline), {}))
            for baseline in (ARMS[arm].baselines if arm in ARMS else ())
            for measure in ("greedy", "sampled")
            if arm != baseline
        ]
        rows.append(row)
    return rows


# Accuracies in percent: greedy at S, S/2 and S/4 steps, and sampled at temperature 1.
MEASURES: dict[str, Callable[[dict], float]] = {
    "greedy": lambda run: 100 * run["accuracy"][str(SHORT.greedy_steps[0])],
    "greedy_half_steps": lambda run: 100 * run["accuracy"][str(SHORT.greedy_steps[1])],
    "greedy_quarter_steps": lambda run: 100 * run["accuracy"][str(SHORT.greedy_steps[2])],
    "sampled": lambda run: 100 * run["sampled_accuracy"],
}


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": float(np.mean(values)), "standard_error": standard_error(values), "std": std}


def _difference(measure: str, baseline: str, arm: dict[int, dict], other: dict[int, dict]) -> dict[str, Any]:
    """Return the difference of two arms, paired over the seeds that both have."""
    shared = sorted(arm.keys() & other.keys())
    values = [MEASURES[measure](arm[seed]) - MEASURES[measure](other[seed]) for seed in shared]
    return {
        "measure": measure,
        "baseline": baseline,
        "mean": float(np.mean(values)) if values else math.nan,
        "standard_error": standard_error(values),
        "p_value": sign_flip_p_value(values) if values else math.nan,
    }


# Heads and lines of a table.
TextTable = tuple[list[str], list[list[str]]]


def tables(rows: list[dict[str, Any]], baselines: tuple[str, ...]) -> list[TextTable]:
    """Return two tables of a family of arms: accuracies, and paired differences to the baselines."""
    accuracies = ["arm", "greedy", "std", "greedy S/2", "S/4", "sampled", "std"]
    differences = [f"{measure} − {baseline} (p)" for baseline in baselines for measure in ("greedy", "sampled")]
    return [
        (accuracies, [_accuracies(row) for row in rows]),
        (["arm", *differences, "rollouts"], [_differences(row, baselines) for row in rows]),
    ]


def _accuracies(row: dict[str, Any]) -> list[str]:
    def mean(name: str) -> str:
        value = row[name]
        error = "" if math.isnan(value["standard_error"]) else f" ± {value['standard_error']:.1f}"
        return f"{value['mean']:.1f}{error}"

    def std(name: str) -> str:
        return "" if math.isnan(row[name]["std"]) else f"{row[name]['std']:.1f}"

    fewer_steps = [mean("greedy_half_steps"), mean("greedy_quarter_steps")]
    return [row["arm"], mean("greedy"), std("greedy"), *fewer_steps, mean("sampled"), std("sampled")]


def _differences(row: dict[str, Any], baselines: tuple[str, ...]) -> list[str]:
    compared = {(d["baseline"], d["measure"]): d for d in row["differences"] if not math.isnan(d["mean"])}
    texts = {key: f"{d['mean']:+.1f} ± {d['standard_error']:.1f} ({d['p_value']:.3f})" for key, d in compared.items()}
    cells = [texts.get((baseline, measure), "") for baseline in baselines for measure in ("greedy", "sampled")]
    return [row["arm"], *cells, f"{row['rollouts']:.0f}"]


def families(rows: list[dict[str, Any]]) -> dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]]:
    """Group rows by task and baselines; the untrained model stands in each of its task's tables."""
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for row in rows:
        if row["arm"] in ARMS:
            groups.setdefault((row["task"], ARMS[row["arm"]].baselines), []).append(row)
    base = {row["task"]: row for row in rows if row["arm"] == "base"}
    return {(task, baselines): [base[task], *own] for (task, baselines), own in groups.items()}


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the tables of all families as Markdown."""
    parts = []
    for (task, baselines), own in families(rows).items():
        parts.append(f"### {task}: against {' and '.join(baselines)}\n")
        for head, lines in tables(own, baselines):
            parts += [markdown_table(head, lines), ""]
    return "\n".join(parts)
