"""Errors that a user can mend are printed in a line or two; the traceback is for `--debug`."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

DEBUG = "--debug"
# What libraries write into the message when a disk is full: safetensors and torch have errors of their own for it.
_FULL = ("No space left on device", "PytorchStreamWriter failed", ". unexpected pos ")
_OWN = Path(__file__).parents[1]


def without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without `--debug`, and whether it was there.

    transformers has an option of that name, which takes a value; with a value it is left to transformers.
    """
    words = list(arguments)
    for place, word in enumerate(words):
        if word == DEBUG and (place + 1 == len(words) or words[place + 1].startswith("-")):
            return words[:place] + words[place + 1 :], True
    return words, False


def run_reporting_errors(command: Callable[[], None], debug: bool) -> int:
    """Run a command and return its exit status; an error that a user can mend is printed in short.

    Args:
        command: to run.
        debug: let every error through, so that Python prints its traceback.

    Returns:
        0, or 1 after an error.
    """
    try:
        command()
    except KeyboardInterrupt:
        _print("Interrupted. A run continues from its last whole checkpoint with --resume_from_checkpoint true.")
        return 130
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug or not (message := short_message(error)):
            raise
        _print(f"Error: {message}\n(--debug shows where it was raised.)")
        return 1
    return 0


def short_message(error: Exception) -> str | None:
    """Return the message of an error that a user can mend, or `None` for one that needs its traceback.

    Settings, data and models raise `ValueError`, `TypeError` and `OSError`; a `RuntimeError` is one of them only if
    this library raised it, for torch raises them for everything.
    """
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or any(words in text for words in _FULL):
        return (
            f"the disk is full ({text}). The checkpoints written before are whole: free some space, or keep fewer of "
            "them with --save_total_limit, and continue with --resume_from_checkpoint true."
        )
    if isinstance(error, KeyError) or not text:
        return None
    if isinstance(error, (ValueError, TypeError, OSError)):
        return text
    return text if isinstance(error, RuntimeError) and _raised_here(error) else None


def _raised_here(error: Exception) -> bool:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return _OWN in Path(last.filename).parents


def _print(text: str) -> None:
    """Print to stderr; of several processes the first one prints plainly, and the others say which they are."""
    rank = int(os.environ.get("RANK", "0"))
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    console.print(text if rank == 0 else f"[process {rank}] {text}", markup=False)
