"""Starts a command in several processes: the options of `accelerate launch` that ours take, and when it is used."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CalledProcessError

import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trl_diffusion.cli.names import ACCELERATE_CONFIGS, config_file
from trl_diffusion.cli.parsing import read_yaml
from trl_diffusion.runtime.launch import is_launched

# Passed on to `accelerate launch` as they are.
_PASSED_ON = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
    "num_cpu_threads_per_process",
    "deepspeed_hostfile",
)
OPTIONS = ("accelerate_config", *_PASSED_ON)


def split(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options for the launch, and the other arguments."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in OPTIONS:
        parser.add_argument(f"--{option}")
    return parser.parse_known_args(list(arguments))


def launch(command: Sequence[str], arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """Start a command in processes of its own if the arguments or the machine ask for several.

    Args:
        command: words that start the command after `trl-diffusion`.
        arguments: of the command line, after these words.

    Returns:
        The arguments without those of the launch, and the exit status, or `None` if nothing was launched and the
        command is to run in this process.

    Raises:
        FileNotFoundError: if there is no such accelerate config.
    """
    options, others = split(arguments)
    given = {name: value for name, value in vars(options).items() if value is not None}
    if is_launched():
        if given:
            raise ValueError(
                f"--{next(iter(given))} is for starting processes, but a launcher has started this one already. Give "
                "it to the launcher."
            )
        return others, None
    if "--dry_run" in others:  # one process reports on the launch
        return [*others, *_described(given)], None
    if not given and torch.cuda.device_count() > 1 and "--use_cpu" not in others:
        print(f"Starting one process for each of {torch.cuda.device_count()} GPUs (--accelerate_config multi_gpu).")
        given = {"accelerate_config": "multi_gpu", "num_processes": str(torch.cuda.device_count())}
    if not given:
        return others, None
    with tempfile.TemporaryDirectory() as folder:
        config = _resolved(given.pop("accelerate_config", "multi_gpu"), Path(folder))
        flags = [word for name, value in given.items() for word in (f"--{name}", value)]
        return others, _accelerate(["--config_file", str(config), *flags, "-m", "trl_diffusion", *command, *others])


def _described(given: Mapping[str, str]) -> list[str]:
    """Return the options of a dry run for a launch with these options."""
    names = {"accelerate_config": "accelerate_config", "num_processes": "world_size"}
    return [word for name, value in given.items() if name in names for word in (f"--{names[name]}", value)]


def _resolved(name: str, folder: Path) -> Path:
    """Return an accelerate config in which DeepSpeed's file has a full path, so that it is found from any folder."""
    path = config_file(name, ACCELERATE_CONFIGS)
    settings = read_yaml(path)
    deepspeed = settings.get("deepspeed_config") or {}
    for key in ("deepspeed_config_file", "deepspeed_hostfile"):
        if key in deepspeed and not Path(deepspeed[key]).is_file():
            deepspeed[key] = str(path.parent / "deepspeed" / Path(deepspeed[key]).name)
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(settings))
    return copy


def _accelerate(arguments: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except (ChildFailedError, CalledProcessError):
        return 1  # the processes have printed why
    return 0
