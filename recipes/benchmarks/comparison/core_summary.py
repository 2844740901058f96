"""Summarises the runs of the core table: accuracies, paired differences with intervals, and what is decided."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from statistics_of_runs import holm, sign_flip_p_value, standard_error

from comparison.core import CORE, FEWER_STEPS
from comparison.settings import setting_of

# A difference whose interval lies within so many points counts as none, even if the interval excludes 0.
EQUAL_WITHIN = 1.5


@dataclass
class Difference:
    """A paired difference of sampled accuracies, in points.

    Args:
        task: its name.
        arm: its name.
        baseline: the arm it is compared with.
        mean: over the seeds that both have.
        half_width: of the 95 % interval (Student's t); not corrected for the choice of the number of seeds.
        p_value: two-sided, of random signs.
        seeds: pairs.
    """

    task: str
    arm: str
    baseline: str
    mean: float
    half_width: float
    p_value: float
    seeds: int

    @property
    def verdict(self) -> str:
        """`equal` if the interval lies within ± 1.5 points, else `more` or `less` if it excludes 0, else `open`."""
        if abs(self.mean) + self.half_width < EQUAL_WITHIN:
            return "equal"
        if abs(self.mean) > self.half_width:
            return "more" if self.mean > 0 else "less"
        return "open"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half_width:.1f}"


class Runs:
    """The runs of the table, by task and arm.

    Args:
        runs: results of `train_and_evaluate`, with or without learning curves.
    """

    def __init__(self, runs: Sequence[dict[str, Any]]):
        self.all = list(runs)
        self._of: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        for run in self.all:
            self._of.setdefault((run["task"], run["arm"]), {})[run["seed"]] = run

    @property
    def tasks(self) -> list[str]:
        return sorted({task for task, _ in self._of})

    def arms(self, task: str) -> list[str]:
        """Return the trained arms of a task, in the order of `CORE`."""
        return [arm for arm in CORE if (task, arm) in self._of]

    def of(self, task: str, arm: str) -> list[dict[str, Any]]:
        """Return the runs of an arm, by seed."""
        return [run for _, run in sorted(self._of[task, arm].items())]

    def seeds(self, task: str, arm: str) -> int:
        """Return the number of runs of an arm."""
        return len(self._of[task, arm])

    def sampled(self, task: str, arm: str) -> np.ndarray:
        """Return sampled accuracies in percent, by seed."""
        return np.array([100 * run["sampled_accuracy"] for run in self.of(task, arm)])

    def greedy(self, task: str, arm: str, steps: int) -> np.ndarray:
        """Return greedy accuracies in percent, by seed."""
        return np.array([100 * run["accuracy"][str(steps)] for run in self.of(task, arm)])

    def difference(self, task: str, arm: str, baseline: str) -> Difference:
        """Compare the sampled accuracies of two arms over the seeds that both have, at least two."""
        one, other = self._of[task, arm], self._of[task, baseline]
        shared = sorted(one.keys() & other.keys())
        values = [100 * (one[seed]["sampled_accuracy"] - other[seed]["sampled_accuracy"]) for seed in shared]
        width = stats.t.ppf(0.975, len(values) - 1) * standard_error(values) if len(values) > 1 else math.inf
        return Difference(
            task, arm, baseline, float(np.mean(values)), float(width), sign_flip_p_value(values), len(values)
        )

    def differences(self, task: str) -> list[Difference]:
        """Compare every arm of a task with its baselines, as far as both were run."""
        arms = self.arms(task)
        pairs = [(arm, baseline) for arm in arms for baseline in CORE[arm].baselines if baseline in arms]
        return [self.difference(task, *pair) for pair in pairs]


def compact(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run without its learning curve, which becomes the area under it."""
    measured = {} if run["arm"] == "base" else {"area": area(run)}
    return {name: value for name, value in run.items() if name != "curve"} | measured


def a_run_a_line(runs: Iterable[dict[str, Any]]) -> str:
    """Return compact runs as JSON with a line for each, so that a change of one is a change of one line."""
    lines = ",\n".join(json.dumps(compact(run)) for run in runs)
    return f"[\n{lines}\n]\n"


def area(run: dict[str, Any]) -> float:
    """Return the mean reward of a run's rollouts in percent, each weighted by the forward units it was trained for.

    It is the area under the learning curve, divided by the budget; NaN for the untrained model.
    """
    if "area" in run:
        return run["area"]
    points = run.get("curve")
    if not points:
        return math.nan
    units = np.diff([0.0, *(point["forward_units"] for point in points)])
    return 100 * float(np.average([point["reward"] for point in points], weights=units))


def undecided(runs: Runs, most: int) -> list[Difference]:
    """Return the differences whose intervals decide nothing, and that may have more seeds."""
    found = [difference for task in runs.tasks for difference in runs.differences(task)]
    return [each for each in found if each.verdict == "open" and each.seeds < most]


# Title, head and lines of a table.
TitledTable = tuple[str, list[str], list[list[str]]]


def core_tables(runs: Runs) -> list[TitledTable]:
    """Return, for every task, a table of accuracies and one of differences."""
    tables = []
    for task in runs.tasks:
        base = runs.sampled(task, "base").mean()
        lines = [["base", f"{base:.1f}", "", "", "", f"{_greedy(runs, task, 'base').mean():.1f}", ""]]
        for arm in (arm for arm in runs.arms(task) if arm not in FEWER_STEPS):
            sampled = runs.sampled(task, arm)
            areas = [area(run) for run in runs.of(task, arm)]
            lines.append(
                [
                    arm,
                    mean_and_error(sampled),
                    f"{sampled.min():.1f}",
                    f"{100 * (sampled < base).mean():.0f}",
                    f"{np.mean(areas):.1f}",
                    mean_and_error(_greedy(runs, task, arm)),
                    f"{len(sampled)}",
                ]
            )
        head = ["arm", "sampled", "worst", "below base %", "area", "greedy", "seeds"]
        tables.append((f"{task}: accuracies", head, lines))
        differences = [each for each in runs.differences(task) if each.arm not in FEWER_STEPS]
        adjusted = holm([each.p_value for each in differences])
        compared = [
            [each.arm, each.baseline, str(each), p_text(each.p_value), p_text(p), str(each.seeds), each.verdict]
            for each, p in zip(differences, adjusted, strict=True)
        ]
        head = ["arm", "against", "sampled, 95 %", "p", "Holm", "seeds", "verdict"]
        tables.append((f"{task}: differences", head, compared))
    return tables


def fewer_steps_table(runs: Runs) -> TitledTable:
    """Return greedy accuracies of the arms that are evaluated at fewer steps: at S, S/2 and S/4, and in parallel.

    Decoded in parallel a completion takes as many steps as it needs; the last column is their mean.
    """
    lines = []
    for task in runs.tasks:
        arms = [arm for arm in runs.arms(task) if arm in FEWER_STEPS]
        for arm in ("base", *arms) if arms else ():
            at_steps = [runs.greedy(task, arm, number) for number in setting_of(task).fewer_steps]
            parallel = [run["parallel"] for run in runs.of(task, arm)]
            reached = np.array([100 * each["accuracy"] for each in parallel])
            taken = np.array([each["steps"] for each in parallel])
            lines.append([task, arm, *(mean_and_error(values) for values in (*at_steps, reached, taken))])
    return "fewer steps: greedy accuracy", ["task", "arm", "S", "S/2", "S/4", "parallel", "steps taken"], lines


def p_text(p_value: float) -> str:
    """Write a p-value with four digits."""
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


def _greedy(runs: Runs, task: str, arm: str) -> np.ndarray:
    return runs.greedy(task, arm, setting_of(task).denoising_steps)


def mean_and_error(values: np.ndarray) -> str:
    """Write the mean ± its standard error, which is left out for a single value."""
    error = standard_error(values.tolist())
    return f"{values.mean():.1f}" + ("" if math.isnan(error) else f" ± {error:.1f}")
