"""Samples on disk, written batch by batch, so that an evaluation that was stopped can be continued.

- `<folder>/settings.json`: everything that the samples depend on;
- `<folder>/part-<n>.jsonl`: while decoding, the batches of process n;
- `<folder>/samples.jsonl`: in the end, every sample once and in order, whichever process decoded it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Sample = dict[str, Any]


class SampleStore:
    """The samples of one measurement.

    Args:
        folder: where they are.
        settings: everything that the samples depend on; written next to them, and compared when a run continues.
        batches: the indices of the samples, in the batches that are decoded together.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], batches: list[list[int]]):
        self.folder, self.batches = folder, batches
        self.settings = json.loads(json.dumps(settings))  # as they will be read again: tuples are lists
        self.complete = folder / "samples.jsonl"

    def prepare(self) -> None:
        """Collect the whole batches of an earlier run; for one process, before any other touches the folder.

        Raises:
            ValueError: if the folder holds samples of other settings, or a file of it is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        parts = self._parts()
        if not self.complete.exists():
            found = {sample["index"]: sample for part in parts for sample in read_lines(part, torn_end=True)}
            # A batch is decoded as a whole or not at all.
            whole = [found[index] for batch in self.batches if found.keys() >= set(batch) for index in batch]
            gathered = self.folder / "part-0.jsonl"
            _replace(gathered, _lines(whole))
            parts.discard(gathered)
        for part in parts:
            part.unlink()

    def pending(self) -> list[int]:
        """Return the numbers of the batches that are not on disk yet; after `prepare`."""
        if self.complete.exists():
            return []
        found = {sample["index"] for part in self._parts() for sample in read_lines(part, torn_end=True)}
        return [number for number, batch in enumerate(self.batches) if not found >= set(batch)]

    def append(self, process: int, samples: list[Sample]) -> None:
        """Add a whole batch that process number `process` has decoded."""
        # Unbuffered, so that a batch is one write: when a launcher is killed, its workers may still be appending.
        with (self.folder / f"part-{process}.jsonl").open("ab", buffering=0) as file:
            file.write(_lines(samples).encode())
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Put the parts together; for one process, when all are done. Does nothing if that has happened already."""
        if not self.complete.exists():
            found = {sample["index"]: sample for part in self._parts() for sample in read_lines(part)}
            _replace(self.complete, _lines(found[index] for index in sorted(found)))
        for part in self._parts():
            part.unlink()

    def read(self) -> list[Sample]:
        """Return all samples, in order; after `finish`.

        Raises:
            ValueError: if a sample is missing, doubled or out of order.
        """
        samples = read_lines(self.complete)
        if [sample.get("index") for sample in samples] != sorted(index for batch in self.batches for index in batch):
            raise ValueError(
                f"{self.complete} holds {len(samples)} samples, not the {sum(map(len, self.batches))} expected, "
                "each once and in order: it was changed from outside. Delete its folder."
            )
        return samples

    def _parts(self) -> set[Path]:
        return set(self.folder.glob("part-*.jsonl"))

    def _check_settings(self) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            if self.complete.exists() or self._parts():
                raise ValueError(
                    f"{self.folder} holds samples without settings.json, so it is not known how they were made. "
                    "Delete the folder or choose another output_dir."
                )
            _replace(path, json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")
            return
        (there,) = _objects(path, [path.read_bytes()])
        if differences := list(_differences(there, self.settings)):
            raise ValueError(
                f"{self.folder} holds samples of other settings: {'; '.join(differences)}. Choose another output_dir, "
                "or delete the folder to measure again."
            )


def read_lines(path: Path, torn_end: bool = False) -> list[Sample]:
    """Read the objects of a JSON-lines file.

    Args:
        path: the file.
        torn_end: leave out a last line without its end, as a killed process leaves it.

    Raises:
        ValueError: if a line is not a JSON object.
    """
    lines = path.read_bytes().split(b"\n")
    end = lines.pop()
    if end and not torn_end:
        lines.append(end)
    return _objects(path, lines)


def _objects(path: Path, texts: list[bytes]) -> list[dict[str, Any]]:
    objects = []
    for number, text in enumerate(texts, start=1):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: line {number} is not JSON ({error}). Delete its folder.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path} is damaged: {text[:60]!r} is not a JSON object. Delete its folder.")
        objects.append(value)
    return objects


def _lines(samples: Iterable[Sample]) -> str:
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)


def _replace(path: Path, text: str) -> None:
    """Write a file atomically: it exists as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """Describe each difference of two nested settings, for a message."""
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} is {old!r} there and {new!r} here"
