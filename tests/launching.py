"""Programs that tests start in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Limits for what hangs, far above what a slow machine takes: no test may depend on how fast one is.
HANG = 1800  # seconds in all
SILENCE = 600  # seconds; what programs of tests do between two lines of output takes up to a minute on two free cores


def accelerate_launch(config: str, *arguments: str) -> list[str]:
    """The command for processes of a config in `trl_diffusion/accelerate_configs`."""
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--main_process_port", str(free_port())]
    return [*launcher, "--config_file", f"trl_diffusion/accelerate_configs/{config}.yaml", *arguments]


def run(command: list[str], folder: Path, cwd: Path = REPOSITORY, **environment: str) -> tuple[int | None, str]:
    """Run a program on the CPU, one thread a process, and return its exit status and output.

    One that prints nothing for `SILENCE` seconds is stopped with all its processes; what it printed is left in
    `folder/output.txt`. How long it takes in all is not limited, because that depends on the machine.

    A program that is aborted (signal 6) is started once more, after everything it wrote to the folder is deleted, and
    a warning names the reason it printed: this happened in two of many runs of CI, whose logs did not keep the reason.
    It is not started again if gloo reports a mismatch of collectives, which is a fault of the program.
    """
    there = {*folder.iterdir()}
    code, output = run_once(command, folder, cwd, environment)
    if "Signal 6 (SIGABRT)" in output and "collective mismatch" not in output:
        warnings.warn(f"Aborted and started once more: {command}.\n{last_words(output)}", stacklevel=2)
        for path in {*folder.iterdir()} - there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        code, output = run_once(command, folder, cwd, environment)
    return code, output


def last_words(output: str) -> str:
    """Return the lines that say why a process was aborted, or the end of the output if there are none."""
    signs = re.compile(r"terminate called|what\(\):|Fatal Python error|FATAL:|free\(\)|corrupt|enforce fail")
    return "\n".join(line for line in output.splitlines() if signs.search(line)) or output[-4000:]


def run_once(command: list[str], folder: Path, cwd: Path, more: dict[str, str]) -> tuple[int | None, str]:
    """Start a program once and return its exit status and output, see `run`."""
    programs = Path(sys.executable).parent  # DeepSpeed looks for ninja on the PATH
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    environment = inherited | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        **more,
    }
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait(process, folder / "output.txt")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the launcher stops its processes
                process.wait(SILENCE)
    return process.returncode, (folder / "output.txt").read_text()


def wait(process: subprocess.Popen, output: Path) -> None:
    """Return when a process ends, or when its output has not grown for `SILENCE` seconds."""
    size, heard = 0, time.monotonic()
    while time.monotonic() < heard + SILENCE:
        try:
            process.wait(1.0)
            return
        except subprocess.TimeoutExpired:
            if output.stat().st_size > size:
                size, heard = output.stat().st_size, time.monotonic()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
