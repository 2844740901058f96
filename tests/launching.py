"""Programs that tests start in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def accelerate_launch(config: str, *arguments: str) -> list[str]:
    """The command for processes of a config in `trl_diffusion/accelerate_configs`."""
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--main_process_port", str(free_port())]
    return [*launcher, "--config_file", f"trl_diffusion/accelerate_configs/{config}.yaml", *arguments]


def run(
    command: list[str], folder: Path, timeout: float, cwd: Path = REPOSITORY, **environment: str
) -> tuple[int | None, str]:
    """Exit status and output of a program on the CPU, one thread a process.

    One that takes longer than `timeout` seconds is stopped with all its processes; what it printed is left in
    `folder/output.txt`. One that the runtime aborts is started once more, without what it left in the folder, and a
    warning repeats its last words: on some machines gloo's threads abort a process in a run of many. Processes that
    call different collectives are aborted by gloo, too; that is their fault, and it says so.
    """
    there = {*folder.iterdir()}
    code, output = run_once(command, folder, timeout, cwd, environment)
    if "Signal 6 (SIGABRT)" in output and "collective mismatch" not in output:
        warnings.warn(f"Aborted and started once more: {command}.\n{last_words(output)}", stacklevel=2)
        for path in {*folder.iterdir()} - there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        code, output = run_once(command, folder, timeout, cwd, environment)
    return code, output


def last_words(output: str) -> str:
    """What a process that is aborted says before other output buries it."""
    signs = re.compile(r"terminate called|what\(\):|Fatal Python error|FATAL:|free\(\)|corrupt|enforce fail")
    return "\n".join(line for line in output.splitlines() if signs.search(line)) or output[-4000:]


def run_once(
    command: list[str], folder: Path, timeout: float, cwd: Path, more: dict[str, str]
) -> tuple[int | None, str]:
    """Exit status and output of a program, see `run`."""
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
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass  # what the tests miss shows it
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the launcher stops its processes
                process.wait(60)
    return process.returncode, (folder / "output.txt").read_text()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
