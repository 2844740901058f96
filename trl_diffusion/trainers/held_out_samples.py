"""The completions of a few held-out problems, before, during and after training, for people to read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trl_diffusion.runtime.text import plural

FILE = "held_out_samples.jsonl"
# Characters that the table shows: of a prompt the first, of a completion the last, where its answer is.
_PROMPT, _COMPLETION = 300, 400


@dataclass(frozen=True)
class HeldOutSample:
    """A completion of a held-out problem.

    Args:
        step: updates before it.
        row: number of the problem.
        prompt: the problem in words.
        completion: the text.
        correct: true if it is right.
    """

    step: int
    row: int
    prompt: str
    completion: str
    correct: bool


class HeldOutSamples:
    """Keeps the completions of the first held-out problems in `held_out_samples.jsonl`, a line for each.

    `AccuracyCallback` hands them over from the completions that it decodes anyway. A run that is resumed in the same
    folder finds those from before.

    Args:
        folder: where the file goes, the `output_dir` of the run.
        count: problems to keep.
    """

    def __init__(self, folder: str | Path, count: int = 3):
        self.path, self.count = Path(folder) / FILE, count
        self.kept: dict[tuple[int, int], HeldOutSample] = {}  # by update and problem

    def resume(self, step: int) -> None:
        """Read what an earlier run kept up to an update; what it kept later will be kept again."""
        lines = self.path.read_text("utf-8").split("\n") if self.path.is_file() else []
        earlier = [HeldOutSample(**json.loads(line)) for line in lines if line]
        self.kept = {(sample.step, sample.row): sample for sample in earlier if sample.step <= step}

    def add(self, samples: Iterable[HeldOutSample]) -> None:
        """Keep the samples of one measurement, and write the file."""
        self.kept |= {(sample.step, sample.row): sample for sample in sorted(samples, key=lambda sample: sample.row)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(sample), ensure_ascii=False) for sample in self.kept.values()]
        self.path.write_text("\n".join([*lines, ""]), "utf-8")

    def table(self) -> Table:
        """Return a table of the problems with their first and last completions, right ones with ✓, wrong ones with ✗.

        A resumed run whose folder does not hold the beginning has a dash in its place.
        """
        last = max(step for step, _ in self.kept)
        table = Table(
            "problem", "before", f"after {plural(last, 'update')}", title="Held-out problems", show_lines=True
        )
        for (step, row), sample in self.kept.items():
            if step == last:
                problem = _shortened(sample.prompt, _PROMPT, from_start=True)
                table.add_row(problem, _cell(self.kept.get((0, row))), _cell(sample))
        return table


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """Return a prompt in words: the text, or the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    return next((str(message["content"]) for message in reversed(prompt) if message["role"] == "user"), "")


def _cell(sample: HeldOutSample | None) -> Text:
    if sample is None:
        return Text("–")
    mark = ("✓ ", "bold green") if sample.correct else ("✗ ", "bold red")
    return Text.assemble(mark, _shortened(sample.completion, _COMPLETION, from_start=False))


def _shortened(text: str, most: int, from_start: bool) -> Text:
    if len(text) <= most:
        return Text(text)
    return Text(text[:most] + " …" if from_start else "… " + text[-most:])
