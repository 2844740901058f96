"""Trainers: one file per method, on TRL's."""

from trl_diffusion.trainers.agrpo import AGRPOConfig, AGRPOTrainer
from trl_diffusion.trainers.atpo import ATPOConfig, ATPOTrainer
from trl_diffusion.trainers.diffu_grpo import DiffuGRPOConfig, DiffuGRPOTrainer
from trl_diffusion.trainers.diffusion_grpo import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_diffusion.trainers.sft import SFTConfig, SFTTrainer
from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOConfig, TrajectoryGRPOTrainer

__all__ = [
    "AGRPOConfig",
    "AGRPOTrainer",
    "ATPOConfig",
    "ATPOTrainer",
    "DiffuGRPOConfig",
    "DiffuGRPOTrainer",
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "TrajectoryGRPOConfig",
    "TrajectoryGRPOTrainer",
]
