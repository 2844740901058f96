"""Sampling by diffusion: prompts in, completions and their `Trajectory` out."""

from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.generation import DiffusionGenerateOutput
from trl_diffusion.sampling.noise import row_generators
from trl_diffusion.sampling.sampler import sample
from trl_diffusion.sampling.state import CanvasState
from trl_diffusion.sampling.trajectory import Trajectory

__all__ = [
    "CanvasState",
    "DiffusionGenerateOutput",
    "SamplingConfig",
    "Trajectory",
    "row_generators",
    "sample",
]
