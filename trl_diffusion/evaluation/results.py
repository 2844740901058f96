"""Tables, JSON and plot of scores, with their intervals and the settings they were measured under."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from trl_diffusion.evaluation.samples import Sample
from trl_diffusion.evaluation.statistics import Estimate, wilson_interval


@dataclass(frozen=True)
class Result:
    """The scores and costs of one measurement.

    Args:
        settings: everything that the samples depend on, see `Measurement.settings`.
        scores: by name, the headline first.
        completions: number of completions.
        forwards: mean number of network evaluations that a completion took.
        tokens: mean length of a completion, its end id included.
        tokens_per_forward: all tokens divided by all network evaluations.
        ended: share of completions that ended on their canvas.
    """

    settings: dict[str, Any]
    scores: dict[str, Estimate]
    completions: int
    forwards: float
    tokens: float
    tokens_per_forward: float
    ended: float

    @property
    def headline(self) -> tuple[str, Estimate]:
        return next(iter(self.scores.items()))


def summarise(settings: dict[str, Any], samples: Sequence[Sample]) -> Result:
    """Average the scores and costs of samples.

    Several completions of one prompt are not independent, so intervals count prompts.

    Args:
        settings: everything that the samples depend on; kept in the result.
        samples: completions with `row`, `scores`, `forwards`, `tokens` and `ended`.
    """
    prompts, count = len({sample["row"] for sample in samples}), len(samples)
    scores = {}
    for name in samples[0]["scores"]:
        value = sum(sample["scores"][name] for sample in samples) / count
        scores[name] = Estimate(value, *wilson_interval(value * prompts, prompts), prompts)
    forwards, tokens = (sum(sample[key] for sample in samples) for key in ("forwards", "tokens"))
    ended = sum(sample["ended"] for sample in samples)
    return Result(settings, scores, count, forwards / count, tokens / count, tokens / forwards, ended / count)


COLUMNS = ("task", "score", "% [95 % interval]", "prompts", "decoding", "forwards", "tokens / forward", "ended")


def _cells(results: Sequence[Result]) -> list[list[str]]:
    rows = []
    for result in results:
        settings = result.settings
        each = settings["completions_per_prompt"]
        prompts = f"{settings['problems']}" if each == 1 else f"{settings['problems']} × {each}"
        decoding = describe_decoding(settings["decoding"])
        cost = [f"{result.forwards:.1f}", f"{result.tokens_per_forward:.2f}", f"{100 * result.ended:.0f} %"]
        for name, score in result.scores.items():
            rows.append([settings["task"], name, str(score), prompts, decoding, *cost])
    return rows


def describe_decoding(decoding: dict[str, Any]) -> str:
    """Describe decoding in a line; for example `canvas 256, 128 steps, block 32, max_prob, greedy`.

    Args:
        decoding: the fields of a `SamplingConfig`.
    """
    canvas, steps, block = (decoding[key] for key in ("canvas_length", "denoising_steps", "block_length"))
    parts = [f"canvas {canvas}", f"{steps} steps", f"block {block}", decoding["unmasking"]]
    # Results on disk may be older than the fields below.
    if decoding.get("confidence_threshold") is not None:
        else_leftmost = ", else the leftmost" if decoding.get("fallback") == "leftmost" else ""
        parts.append(f"threshold {decoding['confidence_threshold']:g}{else_leftmost}")
    if decoding.get("entropy_bound") is not None:
        parts.append(f"entropy bound {decoding['entropy_bound']:g}")
    if decoding.get("cache", "auto") not in ("auto", "none"):
        refresh = f" renewed every {decoding['cache_refresh']} steps" if decoding["cache_refresh"] else ""
        parts.append(f"{decoding['cache']} cache{refresh}")
    return ", ".join([*parts, _draw(decoding)])


def _draw(decoding: dict[str, Any]) -> str:
    """Describe how tokens are drawn."""
    if decoding["temperature"] == 0:
        return "greedy"
    cut = f", top-k {decoding['top_k']}, top-p {decoding['top_p']:g}" if decoding["top_k"] else ""
    return f"temperature {decoding['temperature']:g}{cut}"


def console_table(results: Sequence[Result]) -> Table:
    """Return the results as a `rich` table, one row per score."""
    table = Table()
    for name in COLUMNS:
        table.add_column(name, no_wrap=name in ("% [95 % interval]", "forwards", "ended"))
    for cells in _cells(results):
        table.add_row(*cells)
    return table


def markdown_table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table, one row per score."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *_cells(results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_results(results: Sequence[Result], output_dir: str | Path) -> None:
    """Write `summary.json`, `summary.md` and `accuracy.png`.

    Args:
        results: from `measure`.
        output_dir: folder to write to.
    """
    folder = Path(output_dir)
    text = json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(_preamble(results) + markdown_table(results), encoding="utf-8")
    plot(results).savefig(folder / "accuracy.png", dpi=120)


def _preamble(results: Sequence[Result]) -> str:
    """Return lines with the facts that hold for the whole table, and the origin of every task's data."""
    first = results[0].settings
    lines = [f"- {key}: {value}" for key, value in first["model"].items() if value is not None]
    lines += [f"- {key}: {first[key]}" for key in ("seed", "batch_size")]
    origins = {}
    for result in results:
        origin = {key: result.settings[key] for key in ("source", "split", "prompt") if key in result.settings}
        origins[result.settings["task"]] = ", ".join(f"{key} {value}" for key, value in origin.items())
    lines += [f"- {task}: {origin}" for task, origin in origins.items() if origin]
    return "\n".join(lines) + "\n\n"


def plot(results: Sequence[Result]) -> Figure:
    """Plot the headline score against the mean forwards of a completion: a panel per task, a line per canvas.

    Each point is labelled with its denoising steps.
    """
    tasks = list(dict.fromkeys(result.settings["task"] for result in results))
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        here = sorted((result for result in results if result.settings["task"] == task), key=lambda one: one.forwards)
        for canvas in sorted({result.settings["decoding"]["canvas_length"] for result in here}):
            _draw_line(panel, canvas, [one for one in here if one.settings["decoding"]["canvas_length"] == canvas])
        panel.set(xlabel="forwards per completion", ylabel=f"{here[0].headline[0]} in %", title=task, ylim=(0, 100))
        panel.set_xlim(left=0)
        panel.legend(fontsize="small")
    decoding = results[0].settings["decoding"]
    figure.suptitle(f"block {decoding['block_length']}, {decoding['unmasking']}, {_draw(decoding)}", fontsize="small")
    return figure


def _draw_line(panel: Axes, canvas: int, line: Sequence[Result]) -> None:
    forwards = [result.forwards for result in line]
    scores = [result.headline[1] for result in line]
    values = [100 * score.value for score in scores]
    errors = [
        [100 * (score.value - score.low) for score in scores],
        [100 * (score.high - score.value) for score in scores],
    ]
    panel.errorbar(forwards, values, yerr=errors, marker="o", capsize=3, label=f"canvas {canvas}")
    for x, y, result in zip(forwards, values, line, strict=True):
        steps = result.settings["decoding"]["denoising_steps"]
        panel.annotate(str(steps), (x, y), xytext=(5, 5), textcoords="offset points", fontsize="small")
