"""Programs that tests start in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def accelerate_launch(config: str, *arguments: str) -> list[str]:
    """The command for processes of a config in `trl_diffusion/accelerate_configs`."""
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--main_process_port", str(free_port())]
    return [*launcher, "--config_file", f"trl_diffusion/accelerate_configs/{config}.yaml", *arguments]


def run(command: list[str], folder: Path, timeout: float) -> tuple[int | None, str]:
    """Exit status and output of a program on the CPU, one thread a process.

    One that takes longer than `timeout` seconds is stopped with all its processes; what it printed is left in
    `folder/output.txt`.
    """
    programs = Path(sys.executable).parent  # DeepSpeed looks for ninja on the PATH
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
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
