"""Which checkpoints are whole.

A run can be killed at any moment, also while it writes a checkpoint. So the last thing written is a manifest, the
names and sizes of all files of the checkpoint, and it appears in one step when they are on the disk. A checkpoint that
has no manifest, or does not match it, is torn.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MANIFEST = "manifest.json"


def seal(folder: Path, **facts: Any) -> None:
    """Declare a checkpoint whole.

    Args:
        folder: of the checkpoint, with all its files written.
        **facts: to keep in the manifest.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    for path in files:
        _sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps({"written": time.time(), **facts, "files": sizes}, indent=1))
    _sync(part)
    part.replace(folder / MANIFEST)
    _sync(folder)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, `None` if it is whole."""
    try:
        files = read_manifest(folder)["files"]
    except FileNotFoundError:
        return f"has no {MANIFEST}, which is written last"
    except json.JSONDecodeError:
        return f"has a {MANIFEST} that cannot be read"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"has no {name}"
        if path.stat().st_size != size:
            return f"has a {name} of {path.stat().st_size} bytes instead of {size}"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `seal` wrote: `written` (seconds since the epoch), the facts, and `files`."""
    return json.loads((folder / MANIFEST).read_text())


def survey(output_dir: Path) -> tuple[list[Path], dict[Path, str]]:
    """The checkpoints of a run: whole ones, the one written last first, and what is wrong with the others."""
    folders = sorted(
        path
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)
    )
    faults = {folder: fault(folder) for folder in folders}
    # By time and not by number: the folder may hold the checkpoints of an earlier, longer run.
    whole = sorted(
        (folder for folder in folders if faults[folder] is None),
        key=lambda folder: read_manifest(folder)["written"],
        reverse=True,
    )
    return whole, {folder: why for folder, why in faults.items() if why is not None}


def rotate(output_dir: Path, limit: int, keep: set[Path]) -> None:
    """Delete checkpoints, torn ones first and then the oldest, until `limit` are left or only those to `keep`."""
    whole, torn = survey(output_dir)
    by_age = [*torn, *reversed(whole)]
    surplus = max(len(by_age) - limit, 0)
    for folder in [folder for folder in by_age if folder not in keep][:surplus]:
        discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint, manifest first, so that it is torn as soon as anything is missing."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
