"""Tell whole checkpoints from torn ones by a manifest that is written last.

A run can be killed at any moment, also while it writes a checkpoint. So the last file written is a manifest with the
names, sizes and checksums of all others. It is written under another name and renamed once everything is on the disk,
so it exists completely or not at all. A checkpoint that has no manifest, or does not match it, is torn.

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
# Files of one checkpoint that are read at the same time; Python's lock is released while a checksum is computed.
_READERS = 4
_CHUNK = 1 << 22


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest of a checkpoint, which makes it whole.

    Args:
        folder: of the checkpoint; all its files are written.
        **facts: what else to keep in the manifest.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    # The manifest must not reach the disk before the files it describes, whatever order the system writes them in.
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
    _sync(folder)  # the rename itself


def checksums(paths: list[Path]) -> list[str]:
    """Compute the 64-bit xxHash of the contents of files, several of them at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_checksum, paths))


def _checksum(path: Path) -> str:
    # Not a cryptographic hash: it has to find damage, not forgery, and is several times faster.
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def fault(folder: Path) -> str | None:
    """Compare the names and sizes of a checkpoint's files with its manifest.

    Returns:
        What is wrong, to be put after the folder's name in a message; `None` if nothing is.
    """
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
    """Compare the contents of a checkpoint that has no `fault` with its manifest, which reads every file.

    Checkpoints of earlier versions have no checksums, so nothing is known about their contents.

    Returns:
        What is wrong, to be put after the folder's name in a message; `None` if nothing is.
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
    """Read what `seal` wrote.

    Returns:
        `written` (seconds since the epoch), the facts, and `files`: size and checksum by name. Manifests of earlier
        versions have sizes only; their checksums are `None`.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if it cannot be read.
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
    """Return size and checksum of one file, from a manifest of this version or an earlier one."""
    if _is_number(recorded):
        return {"size": recorded, "xxh3": None}
    if isinstance(recorded, dict) and _is_number(recorded.get("size")) and isinstance(recorded.get("xxh3"), str):
        return recorded
    raise ValueError(f"it does not give size and checksum of {name}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def survey(output_dir: Path) -> tuple[list[Path], dict[Path, str]]:
    """List the checkpoints of a run.

    Returns:
        (those without a `fault`, the one written last first; the fault of each of the others).
    """
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
    """Delete checkpoints, torn ones first and then the oldest, until `limit` or only those to `keep` are left."""
    whole, torn = survey(output_dir)
    by_age = [*torn, *reversed(whole)]
    surplus = max(len(by_age) - limit, 0)
    for folder in [folder for folder in by_age if folder not in keep][:surplus]:
        discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that it counts as torn as soon as any file is missing."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, on systems that support it."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
