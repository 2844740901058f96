"""Summarises the runs of the comparison: accuracies, paired differences, tables and learning curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from statistics_of_runs import sign_flip_p_value, standard_error

from comparison.arms import ARMS, EVALUATED_STEPS


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
        for name in ("forward_units", "updates"):
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
    "greedy": lambda run: 100 * run["accuracy"][str(EVALUATED_STEPS[0])],
    "greedy_half_steps": lambda run: 100 * run["accuracy"][str(EVALUATED_STEPS[1])],
    "greedy_quarter_steps": lambda run: 100 * run["accuracy"][str(EVALUATED_STEPS[2])],
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


def columns(baselines: tuple[str, ...]) -> list[str]:
    """Return the head of the table of a family of arms."""
    compared = [f"{measure} − {baseline} (p)" for baseline in baselines for measure in ("greedy", "sampled")]
    return ["arm", "greedy", "std", "greedy S/2", "S/4", "sampled", "std", *compared, "rollouts"]


def cells(row: dict[str, Any], baselines: tuple[str, ...]) -> list[str]:
    """Return a row of that table."""

    def mean(name: str) -> str:
        value = row[name]
        error = "" if math.isnan(value["standard_error"]) else f" ± {value['standard_error']:.1f}"
        return f"{value['mean']:.1f}{error}"

    def std(name: str) -> str:
        return "" if math.isnan(row[name]["std"]) else f"{row[name]['std']:.1f}"

    compared = {(d["baseline"], d["measure"]): d for d in row["differences"] if not math.isnan(d["mean"])}
    texts = {key: f"{d['mean']:+.1f} ± {d['standard_error']:.1f} ({d['p_value']:.3f})" for key, d in compared.items()}
    differences = [texts.get((baseline, measure), "") for baseline in baselines for measure in ("greedy", "sampled")]
    own = [mean("greedy"), std("greedy"), mean("greedy_half_steps"), mean("greedy_quarter_steps"), mean("sampled")]
    return [row["arm"], *own, std("sampled"), *differences, f"{row['updates']:.0f}"]


def families(rows: list[dict[str, Any]]) -> dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]]:
    """Group rows by task and baselines; the untrained model stands in each of its task's tables."""
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for row in rows:
        if row["arm"] in ARMS:
            groups.setdefault((row["task"], ARMS[row["arm"]].baselines), []).append(row)
    base = {row["task"]: row for row in rows if row["arm"] == "base"}
    return {(task, baselines): [base[task], *own] for (task, baselines), own in groups.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    parts = []
    for (task, baselines), own in families(rows).items():
        head = columns(baselines)
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cells(row, baselines)) + " |" for row in own]
        parts.append(f"### {task}: against {' and '.join(baselines)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def plot(runs: list[dict[str, Any]], task: str, path: Path) -> None:
    """Plot the mean reward of the rollouts against the compute spent, one panel per family of arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = sorted({ARMS[run["arm"]].baselines for run in runs if run["arm"] in ARMS})
    figure, axes = plt.subplots(
        1, len(groups), figsize=(8 * len(groups), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, baselines in zip(axes[0], groups, strict=True):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for arm in (name for name in ARMS if ARMS[name].baselines == baselines):
            curves = [run["curve"] for run in runs if run["task"] == task and run["arm"] == arm]
            if curves:
                grid = np.linspace(0, max(curve[-1]["forward_units"] for curve in curves), 60)
                values = np.array([_smooth(curve, grid) for curve in curves])
                error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros_like(grid)
                (line,) = axis.plot(grid, values.mean(0), label=arm, lw=2.5 if arm in baselines else 1.3)
                axis.fill_between(
                    grid, values.mean(0) - error, values.mean(0) + error, color=line.get_color(), alpha=0.07
                )
        axis.set(xlabel="forward units", title=f"{task}: compared with {' and '.join(baselines)}")
        axis.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    axes[0][0].set_ylabel("mean reward of the rollouts (± standard error)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(curve: list[dict[str, float]], grid: np.ndarray) -> np.ndarray:
    """Return rewards over the grid, averaged with a Gaussian of a tenth of the budget."""
    units = np.array([point["forward_units"] for point in curve])
    rewards = np.array([point["reward"] for point in curve])
    weights = np.exp(-0.5 * ((grid[:, None] - units) / (grid[-1] / 10)) ** 2)
    return (weights * rewards).sum(1) / weights.sum(1)
