"""What training has achieved: held-out accuracy before and after, as a table, as curves and for the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from trl_diffusion.evaluation.statistics import Estimate
from trl_diffusion.runtime.report import canvas_text, draws_text
from trl_diffusion.runtime.text import plural
from trl_diffusion.sampling import SamplingConfig

CURVES = "curves.png"
_LABELS = {"reward": "mean reward of the rollouts", "loss": "mean loss of the updates"}

# (update, accuracy) in the order measured
History = Sequence[tuple[int, Estimate]]


def accuracy_table(history: History, title: str) -> Table:
    """Return a table of the accuracy before and after training, with the gain."""
    (_, before), (_, after) = history[0], history[-1]
    table = Table("", "held-out accuracy", "95 % interval", title=title)
    for name, value in (("before", before), ("after", after)):
        table.add_row(name, f"{_percent(value)} of {value.total}", _interval(value))
    table.add_row("gain", f"{100 * (after.value - before.value):+.1f} points", "")
    return table


def save_curves(folder: str | Path, log: Sequence[Mapping[str, Any]], history: History, curve: str) -> Path:
    """Draw a curve of the training log and held-out accuracy, and return the path of the picture.

    Args:
        folder: where `curves.png` goes.
        log: transformers' `log_history`.
        history: of the accuracy.
        curve: `reward` or `loss`.
    """
    logged = [(entry["step"], entry[curve]) for entry in log if curve in entry]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([step for step, _ in logged], [value for _, value in logged], marker=".")
    left.set(xlabel="update", ylabel=_LABELS[curve], title=curve.capitalize())
    steps, values = zip(*history, strict=True)
    errors = [[100 * (v.value - v.low) for v in values], [100 * (v.high - v.value) for v in values]]
    right.errorbar(steps, [100 * v.value for v in values], yerr=errors, marker="o", capsize=3)
    right.set(xlabel="update", ylabel="accuracy in %", ylim=(0, 100), title="Held-out accuracy (95 % interval)")
    path = Path(folder) / CURVES
    figure.savefig(path, dpi=120)
    return path


def accuracy_section(history: History, decoding: SamplingConfig, folder: str | Path, curve: str) -> str:
    """Return the section of the model card, in Markdown; empty before the first measurement.

    Args:
        history: of the accuracy.
        decoding: how the held-out problems were decoded.
        folder: of the card; with `curves.png` in it, the section shows it.
        curve: what the picture shows besides accuracy, `reward` or `loss`.
    """
    if not history:
        return ""
    names = {0: "before training", len(history) - 1: f"after {plural(history[-1][0], 'update')}"}
    rows = [
        f"| {name} | {_percent(history[place][1])} | {_interval(history[place][1])} | {history[place][1].total} |"
        for place, name in names.items()
    ]
    cache = "" if decoding.cache == "auto" else f", cache `{decoding.cache}`"
    lines = [
        "## Held-out accuracy",
        "",
        "| | accuracy | 95 % interval | problems |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Decoded {draws_text(decoding)} on a canvas of {canvas_text(decoding)}{cache}. The interval (Wilson's) is "
        "for the choice of problems; it says nothing about other seeds.",
    ]
    if (Path(folder) / CURVES).is_file():
        lines += ["", f"![{curve.capitalize()} and held-out accuracy over the updates]({CURVES})"]
    return "\n".join(lines)


def loss_section(log: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of the model card on held-out loss, in Markdown; empty before the first measurement.

    Args:
        log: transformers' `log_history`.
    """
    losses = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    if not losses:
        return ""
    rows = [f"| {step} | {loss:.3f} |" for step, loss in (losses if len(losses) == 1 else (losses[0], losses[-1]))]
    lines = ["## Held-out loss", "", "| updates | nats per position |", "|---|---|", *rows]
    return "\n".join(lines)


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.1f} %"


def _interval(value: Estimate) -> str:
    return f"{100 * value.low:.1f} – {100 * value.high:.1f}"
