"""Programs that tests start: one that the runtime aborts is started once more, and a collective mismatch is not; one
that prints nothing is stopped, however long another takes."""

from __future__ import annotations

import subprocess
import sys
import time

import launching
import pytest
from launching import run

# Counts its starts in the first folder, leaves a file in the second, and is aborted in its first starts as
# torch's launcher reports it.
PROGRAM = """
import sys
from pathlib import Path

starts, folder, aborted, words = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
(starts / str(len([*starts.iterdir()]))).touch()
assert not (folder / "left").exists() and (folder / "given").exists()
(folder / "left").mkdir()
if len([*starts.iterdir()]) <= aborted:
    print(words, "Signal 6 (SIGABRT) received by PID 1", sep="\\n")
    sys.exit(1)
print("done")
"""


@pytest.fixture
def started(tmp_path):
    """Exit status, output and number of starts of the program."""
    starts, folder = tmp_path / "starts", tmp_path / "folder"
    starts.mkdir()
    folder.mkdir()
    (folder / "given").touch()

    def started(aborted: int, words: str) -> tuple[int | None, str, int]:
        command = [sys.executable, "-c", PROGRAM, str(starts), str(folder), str(aborted), words]
        return *run(command, folder), len([*starts.iterdir()])

    return started


def test_a_program_that_the_runtime_aborts_is_started_once_more(started):
    with pytest.warns(UserWarning, match="started once more.*\nterminate called"):
        code, output, starts = started(1, "terminate called after an exception")
    assert (code, starts) == (0, 2) and output == "done\n"


def test_but_only_once(started):
    with pytest.warns(UserWarning, match="started once more"):
        code, output, starts = started(3, "")
    assert (code, starts) == (1, 2) and "SIGABRT" in output


def test_a_program_that_ends_is_started_once(started):
    assert started(0, "") == (0, "done\n", 1)


def test_processes_that_call_different_collectives_are_not_started_again(started):
    code, output, starts = started(1, "Is there a distributed collective mismatch in your code?")
    assert (code, starts) == (1, 1) and "SIGABRT" in output


def test_only_a_program_that_prints_nothing_for_long_is_given_up(tmp_path, monkeypatch):
    clock, output = [0.0], tmp_path / "output.txt"

    class Program:
        """Prints a character at each of these seconds, and ends at 100."""

        def __init__(self, *prints: float):
            clock[0], self.prints = 0.0, prints
            output.write_text("")

        def wait(self, seconds: float) -> None:
            clock[0] += seconds
            output.write_text("." * sum(moment <= clock[0] for moment in self.prints))
            if clock[0] < 100:
                raise subprocess.TimeoutExpired("program", seconds)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(launching, "SILENCE", 30)
    for prints, ended in (((5, 30, 55, 80), 100), ((), 30), ((5, 30), 60), ((5, 36), 35)):
        launching.wait(Program(*prints), output)
        assert clock[0] == ended, prints
