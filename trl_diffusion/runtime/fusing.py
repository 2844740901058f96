"""Settings that compile: elementwise work in single kernels, part of every config, and the steps of rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl_diffusion.models.fused import check_compiler, fuse_elementwise
from trl_diffusion.runtime.launch import is_pretended
from trl_diffusion.runtime.planned_launch import Launch
from trl_diffusion.sampling.static_windows import check_compiles


@dataclass
class FusingConfig:
    """The field of the setting.

    Args:
        fuse_elementwise: compute rotations, norms and gates in single kernels, made by `torch.compile`; equal to
            rounding. The first pass takes longer, by the time that compiling takes.
    """

    fuse_elementwise: bool = field(
        default=False,
        metadata={"help": "Compute rotations, norms and gates in single kernels, compiled at the start of a run."},
    )


def fuse_models(args: FusingConfig, *models: Any) -> None:
    """Fuse the elementwise work of a run's models if its config asks for it; a dry run computes nothing.

    Args:
        args: the run's config.
        *models: policy and reference, possibly wrapped; `None` for none.

    Raises:
        ValueError: if the kernels cannot be compiled here.
    """
    if args.fuse_elementwise and not is_pretended():
        for model in models:
            if model is not None:
                fuse_elementwise(model)


def check_rollout_compile(trainer: Any) -> None:
    """Check at the start that `rollout_compile` can be done, if it is asked for.

    Args:
        trainer: a trainer with rollouts whose model is set up.

    Raises:
        ValueError: if it cannot, or kernels cannot be compiled here.
    """
    if trainer.args.rollout_compile:
        check_compiles(trainer.model, sharded=Launch.of_trainer(trainer).zero_stage == 3)
        if not is_pretended():
            check_compiler(trainer.accelerator.device, "rollout_compile")
