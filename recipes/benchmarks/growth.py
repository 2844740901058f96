"""Measures how the cost of an AGRPO update grows with completions, denoising steps and canvas blocks.

    python recipes/benchmarks/growth.py

One quantity grows at a time, all others stay; updates of its sizes alternate. A straight line through the medians of
five sizes, and how far the farthest of them is from it, say whether the growth is linear.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import arguments
import measure
from networks import SHAPES
from update import Trainers


def linear_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Fit a line by least squares: slope, value at 0, R², and the largest distance of a point relative to its own."""
    slope, intercept = np.polyfit(x, y, 1)
    values = np.asarray(y)
    distance = values - (slope * np.asarray(x) + intercept)
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r_squared": float(1 - (distance**2).sum() / ((values - values.mean()) ** 2).sum()),
        "largest_deviation": float(abs(distance / values).max()),
    }


def sizes(args: argparse.Namespace) -> dict[str, dict[int, dict[str, int]]]:
    """Return the settings of an update for every size of every quantity."""
    blocks = args.canvas // args.block
    quarter, fifth = max(blocks // 4, 1), max(args.steps // (5 * blocks), 1) * blocks
    return {
        "completions": {n * args.rows: {"per_device_train_batch_size": n * args.rows} for n in range(1, 6)},
        "denoising steps": {n * fifth: {"denoising_steps": n * fifth} for n in range(1, 6)},
        # a number of steps that all these numbers of blocks divide
        "canvas blocks": {
            n * quarter: {"max_completion_length": n * quarter * args.block, "denoising_steps": 12 * quarter}
            for n in (2, 3, 4, 6, 12)
        },
    }


def seconds_of(trainers: Trainers, points: dict[int, dict[str, int]]) -> dict[int, float]:
    """Measure the median seconds of an update, by size; updates alternate, after one to warm up."""
    args = trainers.args
    made = {size: trainers.make("AGRPO", **settings) for size, settings in points.items()}
    seconds: dict[int, list[float]] = {size: [] for size in made}
    for _ in range(args.rounds + 1):
        for size, trainer in made.items():
            seconds[size].append(measure.time_and_peak(trainer.train, args.device)[0])
    return {size: median(values[1:]) for size, values in seconds.items()}


def main() -> None:
    logging.set_verbosity_error()
    parser = arguments.parser(__doc__.splitlines()[0], "growth")
    arguments.add_sampling(parser)
    arguments.add_updates(parser)
    parser.set_defaults(shapes=["backbone-heavy"], views=8, canvas=128, steps=80)
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.shapes:
        results: dict[str, Any] = {}
        table = Table("", "seconds by size", "slope", "at 0", "R²", "largest deviation", title=f"AGRPO update, {name}")
        with tempfile.TemporaryDirectory() as folder:
            trainers = Trainers(SHAPES[name], args, folder)
            for quantity, points in track(sizes(args).items(), description=name):
                seconds = seconds_of(trainers, points)
                line = linear_fit(list(seconds), list(seconds.values()))
                results[quantity] = {"seconds": seconds, "line": line}
                table.add_row(
                    quantity,
                    ", ".join(f"{size}: {value:.2f}" for size, value in seconds.items()),
                    f"{line['slope']:.4g}",
                    f"{line['intercept']:.3g}",
                    f"{line['r_squared']:.4f}",
                    f"{100 * line['largest_deviation']:.1f} %",
                )
        Console().print(table)
        plot(name, results, args.output_dir / f"{name}.png")
        written = {"setting": measure.settings(args), "machine": measure.machine(args.device), "results": results}
        (args.output_dir / f"{name}.json").write_text(json.dumps(written, indent=1))


def plot(name: str, results: dict[str, Any], path: Path) -> None:
    """Plot the seconds against every quantity, with the fitted lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(10, 3.2), layout="constrained")
    for axis, (quantity, result) in zip(axes, results.items(), strict=True):
        x, line = np.array(list(result["seconds"])), result["line"]
        axis.plot(x, list(result["seconds"].values()), "o")
        axis.plot(x, line["slope"] * x + line["intercept"], lw=1)
        axis.set(xlabel=quantity, ylabel="seconds per update", ylim=(0, None), title=f"R² = {line['r_squared']:.4f}")
    figure.suptitle(name)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
