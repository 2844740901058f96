"""Which checkpoints are whole.

A run can be killed at any moment, also while it writes a checkpoint. So the last thing written is a manifest with the
names, sizes and checksums of all files of the checkpoint, and it appears in one step when they are on the disk. A
checkpoint that has no manifest, or does not match it, is torn.

Sizes are compared wherever checkpoints are listed. Checksums are compared for the one checkpoint that is about to be
read, because that reads all of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MANIFEST = "manifest.json"
# Files of one checkpoint that are read at the same time; a checksum releases Python's lock.
_READERS = 4
_CHUNK = 1 << 22


def seal(folder: Path, **facts: Any) -> None:
    """Declare a checkpoint whole.

    Args:
        folder: of the checkpoint, with all its files written.
        **facts: to keep in the manifest.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    for path in paths:
        _sync(path)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "xxh3": checksum}
        for path, checksum in zip(paths, checksums(paths), strict=True)
    }
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps({"written": time.time(), **facts, "files": files}, indent=1), encoding="utf-8")
    _sync(part)
    part.replace(folder / MANIFEST)
    _sync(folder)


def checksums(paths: list[Path]) -> list[str]:
    """64-bit xxHash of the contents of files, several of them at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_checksum, paths))


def _checksum(path: Path) -> str:
    # not a cryptographic one: it has to find damage, not forgery, and is several times faster
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by the names and sizes of its files; `None` if nothing is."""
    try:
        files = read_manifest(folder)["files"]
    except FileNotFoundError:
        return f"has no {MANIFEST}, which is written last"
    except (OSError, ValueError) as error:
        return f"has a {MANIFEST} that cannot be read ({error})"
    for name, recorded in files.items():
        path, size = folder / name, recorded["size"]
        if not path.is_file():
            return f"has no {name}"
        if path.stat().st_size != size:
            return f"has a {name} of {path.stat().st_size} bytes instead of {size}"
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with the contents of a checkpoint that has no `fault`; `None` if nothing is.

    This reads every file. Checkpoints of earlier versions have no checksums: nothing is known about their contents.
    """
    recorded = {
        name: file["xxh3"] for name, file in read_manifest(folder)["files"].items() if file["xxh3"] is not None
    }
    try:
        found = checksums([folder / name for name in recorded])
    except OSError as error:
        return f"cannot be read ({error})"
    for (name, wanted), checksum in zip(recorded.items(), found, strict=True):
        if checksum != wanted:
            return f"has a {name} whose contents are not those that were written"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `seal` wrote: `written` (seconds since the epoch), the facts, and `files`: size and checksum by name.

    Checkpoints of earlier versions have sizes only; their checksums are `None`.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if the disk does not give it.
        ValueError: if it is not a manifest.
    """
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not _is_number(content.get("written")):
        raise ValueError("it is no table with the time at which it was written")
    files = content.get("files")
    if not isinstance(files, dict):
        raise ValueError("it has no table of files")
    return content | {"files": {name: _file(name, recorded) for name, recorded in files.items()}}


def _file(name: str, recorded: Any) -> dict[str, Any]:
    """Size and checksum of one file, from a manifest of this version or an earlier one."""
    if _is_number(recorded):
        return {"size": recorded, "xxh3": None}
    if isinstance(recorded, dict) and _is_number(recorded.get("size")) and isinstance(recorded.get("xxh3"), str):
        return recorded
    raise ValueError(f"it does not tell size and checksum of {name}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def survey(output_dir: Path) -> tuple[list[Path], dict[Path, str]]:
    """The checkpoints of a run: those without a `fault`, the one written last first, and what is wrong with others."""
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
