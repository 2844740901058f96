"""Reads the rows of a task from a local file or the Hub, with errors that say what is wrong with them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from trl_diffusion.validation import near

FILES = (".jsonl", ".json", ".csv")


def is_file(source: str | Path) -> bool:
    """Return whether a source names a local file, by its ending."""
    return str(source).endswith(FILES)


def read_rows(
    source: str | Path,
    columns: Sequence[str],
    task: str,
    split: str = "train",
    name: str | None = None,
    optional: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Read rows with the given columns, and with those of the optional ones that they have.

    Args:
        source: a JSON-lines or CSV file, or a data set on the Hub.
        columns: columns that every row must have.
        task: for error messages.
        split: split on the Hub; a file is one split.
        name: configuration on the Hub.
        optional: columns that are kept where they exist.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON lines, has no rows, or a column is missing; the message names the line.
    """
    wanted = (*columns, *optional)
    if is_file(source):
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"No {task} file at {source}; give a JSON-lines or CSV file, or a data set id of the Hub."
                + near(Path(source).name, (path.name for path in Path(source).parent.glob("*") if is_file(path)))
            )
        rows = _read_csv(source) if str(source).endswith(".csv") else _read_json_lines(source)
    else:
        data = load_dataset(str(source), name, split=split)
        rows = data.select_columns([column for column in wanted if column in data.column_names]).to_list()
    if not rows:
        raise ValueError(f"{source} has no rows; expected {task} problems.")
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in columns if column not in row]:
            raise ValueError(
                f"Row {number} of {source} has columns {sorted(row)}, but {task} needs "
                f"{' and '.join(f'`{column}`' for column in columns)}: {missing} missing; rename the columns or use a "
                f"file in {task}'s format."
            )
    return [{column: row[column] for column in wanted if column in row} for row in rows]


def _read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Line {number} of {path} is not JSON ({error.msg}): {line.strip()[:60]!r}. Expected JSON lines, "
                    "one object per line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"Line {number} of {path} is no JSON object: {line.strip()[:60]!r}.")
            rows.append(row)
    return rows


def _read_csv(path: str | Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def hold_out(rows: Dataset, count: int, source: str | Path) -> tuple[Dataset, Dataset]:
    """Split rows of one piece: the last `count` rows are held out.

    Args:
        rows: all rows.
        count: number of held-out rows.
        source: where the rows come from, for the message.

    Returns:
        Rows to train on, and held-out rows.

    Raises:
        ValueError: if one of them would be empty.
    """
    cut = len(rows) - count
    if cut < 1 or count < 1:
        raise ValueError(
            f"{source} has {len(rows)} rows, of which --eval_size {count} are held out, so "
            f"{'nothing is left to train on' if cut < 1 else 'none is held out'}. Choose --eval_size so that at least "
            "one row is held out and one is left to train on."
        )
    return rows.select(range(cut)), rows.select(range(cut, len(rows)))


def check_split(split: str, task: str) -> str:
    """Return the split, after a check that there is such a one.

    Raises:
        ValueError: if it is neither `"train"` nor `"test"`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"{task} has the splits 'train' and 'test', got {split!r}.")
    return split
