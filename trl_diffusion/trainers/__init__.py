"""Trainers: one file per method, on TRL's."""

from trl_diffusion.trainers.agrpo import AGRPOConfig, AGRPOTrainer
from trl_diffusion.trainers.diffusion_grpo import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_diffusion.trainers.sft import SFTConfig, SFTTrainer

__all__ = [
    "AGRPOConfig",
    "AGRPOTrainer",
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "SFTConfig",
    "SFTTrainer",
]
