"""Figures of the comparison: accuracy of every arm, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from comparison.arms import ARMS

LINES = 6  # in a panel; more cannot be told apart


def accuracy(panels: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot greedy and sampled accuracy of arms with their standard errors.

    Args:
        panels: rows of `summarise` by the title of their panel; the arm `base` becomes two vertical lines.
        path: of the image.
    """
    heights = [1 + 0.28 * len(rows) for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(6.4, 0.4 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
        base = next((row for row in rows if row["arm"] == "base"), None)
        arms = sorted((row for row in rows if row["arm"] != "base"), key=lambda row: row["greedy"]["mean"])
        names = [row["arm"].removesuffix("_tuned") for row in arms]
        for measure, marker, colour in (("greedy", "o", "C0"), ("sampled", "s", "C1")):
            means = [row[measure]["mean"] for row in arms]
            errors = [row[measure]["standard_error"] for row in arms]
            axis.errorbar(means, names, xerr=errors, fmt=marker, color=colour, capsize=2, label=measure)
            if base is not None:
                axis.axvline(base[measure]["mean"], color=colour, ls=":", label=f"{measure}, untrained")
        axis.set(xlabel="accuracy in %", title=title)
        axis.grid(axis="y", alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _save(figure, path)


def learning_curves(runs: Sequence[dict[str, Any]], task: str, path: Path) -> None:
    """Plot the mean reward of the rollouts against the compute spent.

    Every panel shows a few arms and the baselines that they are compared with.
    """
    panels = list(_panels({run["arm"] for run in runs if run["task"] == task}))
    size = (6.5 * len(panels), 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, arms in zip(axes[0], panels, strict=True):
        ends: dict[str, tuple[float, float]] = {}
        for number, arm in enumerate(arms):
            curves = [run["curve"] for run in runs if run["task"] == task and run["arm"] == arm]
            grid = np.linspace(0, max(curve[-1]["forward_units"] for curve in curves), 60)
            values = np.array([_smooth(curve, grid) for curve in curves])
            mean, colour = values.mean(0), f"C{number}"
            error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros_like(grid)
            axis.plot(grid, mean, color=colour, lw=1.6)
            axis.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.08)
            ends[arm] = (grid[-1], mean[-1])
        axis.set(xlabel="forward units", title=task.replace("_", " "))
        _label_lines(axis, ends)
    axes[0][0].set_ylabel("mean reward of the rollouts (± standard error)")
    _save(figure, path)


def _panels(arms: set[str]):
    """Yield lists of at most `LINES` arms: baselines, and some of the arms that are compared with them."""
    for baselines in sorted({ARMS[arm].baselines for arm in arms if arm in ARMS}):
        shown = [arm for arm in baselines if arm in arms]
        others = [arm for arm in ARMS if arm in arms and ARMS[arm].baselines == baselines and arm not in baselines]
        room = LINES - len(shown)
        for start in range(0, max(len(others), 1), room):
            yield [*shown, *others[start : start + room]]


def _label_lines(axis, ends: dict[str, tuple[float, float]]) -> None:
    """Write the name of each line at its end, moved up where it would cover another name."""
    low, high = axis.get_ylim()
    right = max(x for x, _ in ends.values())
    lowest = low
    for number, (arm, (_, y)) in sorted(enumerate(ends.items()), key=lambda item: item[1][1][1]):
        lowest = max(y, lowest)
        axis.annotate(arm, (right, lowest), (6, 0), textcoords="offset points", va="center", color=f"C{number}")
        lowest += 0.055 * (high - low)
    axis.set_xlim(0, 1.32 * right)


def _smooth(curve: list[dict[str, float]], grid: np.ndarray) -> np.ndarray:
    """Return rewards over the grid, averaged with a Gaussian of a tenth of the budget."""
    units = np.array([point["forward_units"] for point in curve])
    rewards = np.array([point["reward"] for point in curve])
    weights = np.exp(-0.5 * ((grid[:, None] - units) / (grid[-1] / 10)) ** 2)
    return (weights * rewards).sum(1) / weights.sum(1)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
