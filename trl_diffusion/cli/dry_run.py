"""The options of `--dry_run`, and the dry run of a command that trains."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers.hf_argparser import string_to_bool

from trl_diffusion.cli.loading import load_tokenizer, new_adapter
from trl_diffusion.cli.names import ACCELERATE_CONFIGS, config_file
from trl_diffusion.cli.parsing import read_yaml, with_config_path
from trl_diffusion.runtime.dry_run import DryRun, is_first_process
from trl_diffusion.runtime.forecast import Machine
from trl_diffusion.runtime.launch import pretended
from trl_diffusion.runtime.planned_launch import Launch
from trl_diffusion.validation import at_least


@dataclass
class DryRunArguments:
    """What a dry run reports on, and what it assumes."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check the run and print its figures: batch, length, hours, memory, disk. Needs no GPU, weights "
            "or network."
        },
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "The dry run's launch, as for a real one: zero2, or the path of a file of accelerate's."},
    )
    world_size: int | None = field(
        default=None,
        metadata={"help": "The dry run's processes; those of the launch, or 1, if not given."},
    )
    peak_tflops: float = field(
        default=989.0, metadata={"help": "For the dry run's hours: peak of a GPU in TFLOP/s (H100 in bfloat16)."}
    )
    assumed_share: float = field(
        default=0.25, metadata={"help": "For the dry run's hours: share of that peak that the run reaches."}
    )
    gpu_gib: float = field(default=80.0, metadata={"help": "Memory of a GPU; the dry run marks what exceeds it."})
    assumed_prompt_length: int = field(
        default=200, metadata={"help": "Tokens of a prompt, for a dry run that cannot read the rows."}
    )
    launch: Launch | None = field(default=None, init=False)  # of a dry run

    def __post_init__(self) -> None:
        for name, least in {"world_size": 1, "assumed_prompt_length": 1}.items():
            if (value := vars(self)[name]) is not None:
                at_least(name, value, least)
        for name in ("peak_tflops", "gpu_gib", "assumed_share"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be positive, got {vars(self)[name]}.")
        if self.assumed_share > 1:
            raise ValueError(f"assumed_share is a share of the peak, between 0 and 1; got {self.assumed_share}.")
        if self.dry_run:
            return
        for option in fields(DryRunArguments):
            if option.init and vars(self)[option.name] != option.default:
                raise ValueError(
                    f"{option.name} is about a dry run, and would have no effect on this one. Add --dry_run, or leave "
                    f"{option.name} out."
                )


@contextmanager
def planned(arguments: Sequence[str]) -> Iterator[Launch | None]:
    """For a dry run, pretend its launch while a config is made, which depends on the number of processes.

    Args:
        arguments: of the command line; `--config` may name a file that has the settings too.

    Yields:
        The launch: that of `accelerate_config`, or the one in which this process was started; `None` without
        `dry_run`.

    Raises:
        SystemExit: in all processes but the first, if several were started.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dry_run", nargs="?", const=True, type=string_to_bool)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--world_size", type=int)
    given = vars(parser.parse_known_args(with_config_path(arguments))[0])
    file = given.pop("config")
    settings = {} if file is None else read_yaml(file)
    settings |= {name: value for name, value in given.items() if value is not None}
    if not settings.get("dry_run"):
        yield None
        return
    if not is_first_process():
        raise SystemExit(0)
    name = settings.get("accelerate_config")
    launch = Launch.of_environment() if name is None else Launch.of_file(config_file(name, ACCELERATE_CONFIGS))
    launch = replace(launch, processes=settings.get("world_size") or launch.processes)
    with pretended(launch.processes, launch.mixed_precision):
        yield launch


def dry_run(
    trainer_class: Callable[..., Any],
    parsed: tuple,
    load_rows: Callable[[], tuple[Dataset, Dataset]],
    columns: Mapping[str, Any],
    needed: int,
    evaluates: bool = False,
    **arguments: Any,
) -> None:
    """Print the report of a run that is planned.

    Args:
        trainer_class: the method's trainer.
        parsed: what `parse` returned.
        load_rows: reads training and held-out rows.
        columns: those of the rows, in addition to `prompt` and `completion`.
        needed: rows that the run needs at least.
        evaluates: the trainer evaluates on the held-out rows itself.
        **arguments: the trainer's other arguments.
    """
    script_args, training_args, model_args, quantization_config = parsed
    run = DryRun(script_args.launch, script_args.assumed_prompt_length, script_args.dataset_size)
    with run.active():
        tokenizer = run.tokenizer(lambda: load_tokenizer(model_args))
        rows, held_out = run.rows(load_rows, columns, tokenizer, needed)
        trainer = run.build(
            trainer_class,
            training_args,
            model=run.policy(model_args.model_name_or_path, training_args.model_init_kwargs, quantization_config),
            train_dataset=rows,
            eval_dataset=held_out if evaluates else None,
            processing_class=tokenizer,
            peft_config=new_adapter(model_args),
            **arguments,
        )
        machine = Machine(script_args.peak_tflops, script_args.assumed_share, script_args.gpu_gib)
        evaluation = script_args.evaluation(training_args, len(held_out) if run.rows_read else script_args.eval_size)
        Console().print(run.report(trainer.as_run(), trainer.figures, machine, evaluation, script_args.data_name))
    trainer.end()
