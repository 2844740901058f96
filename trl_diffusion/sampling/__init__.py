"""Sampling by diffusion: prompts in, completions and their `Trajectory` out."""

from trl_diffusion.sampling.arguments import SamplingArguments
from trl_diffusion.sampling.canvas import CanvasState
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.generation import DiffusionGenerateOutput
from trl_diffusion.sampling.observing import Commits, Observer
from trl_diffusion.sampling.sampler import sample
from trl_diffusion.sampling.trajectory import Trajectory
from trl_diffusion.streams import row_generators

__all__ = [
    "CanvasState",
    "Commits",
    "DiffusionGenerateOutput",
    "Observer",
    "SamplingArguments",
    "SamplingConfig",
    "Trajectory",
    "row_generators",
    "sample",
]
