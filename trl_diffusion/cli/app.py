"""The command `trl-diffusion`: finds the sub-command and runs it, in this process or in several."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from trl_diffusion import __version__
from trl_diffusion.cli.errors import run_reporting_errors, without_debug
from trl_diffusion.validation import near


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Args:
        module: of `trl_diffusion.cli`, whose `main(arguments)` runs it; imported when it is run.
        does: one line for the list of commands.
        launches: whether it may run in several processes.
    """

    module: str
    does: str
    launches: bool = False


COMMANDS = {
    "train": Command("train", "train a model by any method on any task, or by SFT", launches=True),
    "sample": Command("sample", "watch a model denoise its answer to a prompt, or chat with it"),
    "evaluate": Command("evaluate", "measure accuracy, with every sample on disk", launches=True),
    "analyze": Command("analyze", "find where a model hesitates while it denoises"),
    "rescore": Command("rescore", "score completions again under other protocols"),
    "export-adapter": Command("export_adapter", "write a LoRA adapter for the hub's original code"),
    "methods": Command("methods", "list methods, with their papers and configurations"),
    "tasks": Command("tasks", "list tasks, with their data and prompts"),
    "env": Command("env", "print versions and hardware, for a bug report"),
}

USAGE = f"""trl-diffusion {__version__}: reinforcement learning of diffusion language models

  trl-diffusion train agrpo                                      the bundled model, two minutes on a CPU
  trl-diffusion train agrpo --config llada_8b/gsm8k_agrpo \\
      --accelerate_config zero2                                  LLaDA-8B on eight GPUs
  trl-diffusion train agrpo --config llada_8b/gsm8k_agrpo --dry_run
                                                                 its cost and memory, without a GPU

Commands:
{{commands}}

`trl-diffusion COMMAND --help` shows the options of a command, `--debug` the traceback of an error."""


def usage() -> str:
    """Return the text that lists the commands."""
    lines = [f"  {name:<16}{command.does}" for name, command in COMMANDS.items()]
    return USAGE.format(commands="\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of `trl-diffusion` and return its exit status.

    Args:
        arguments: the words after `trl-diffusion`; those of the command line if not given.
    """
    words, debug = without_debug(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"trl-diffusion {__version__}")
        return 0
    # TRL reads these names of transformers', and nobody who types a command can change that.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    status = 0

    def run() -> None:
        nonlocal status
        status = _run(words[0], words[1:])

    return run_reporting_errors(run, debug) or status


def _run(name: str, arguments: list[str]) -> int:
    """Run a sub-command and return its exit status.

    Raises:
        ValueError: if there is no such command.
    """
    if name not in COMMANDS:
        raise ValueError(f"There is no command {name!r}.{near(name, COMMANDS)} There are {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    # `--help` needs no processes.
    if command.launches and not {"-h", "--help", "--help-all"} & {*arguments}:
        from trl_diffusion.cli.launching import launch

        arguments, status = launch([name], arguments)
        if status is not None:
            return status
    import_module(f"trl_diffusion.cli.{command.module}").main(arguments)
    return 0
