"""The setting that computes elementwise work in single kernels, part of every config of this library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl_diffusion.models.fused import fuse_elementwise
from trl_diffusion.runtime.launch import is_pretended


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
