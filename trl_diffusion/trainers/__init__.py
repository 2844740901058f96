"""Trainers: one file per method, on TRL's."""

from trl_diffusion.trainers.agrpo import AGRPOConfig, AGRPOTrainer
from trl_diffusion.trainers.atpo import ATPOConfig, ATPOTrainer
from trl_diffusion.trainers.base.config import DiffusionGRPOConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer
from trl_diffusion.trainers.coupled_grpo import CoupledGRPOConfig, CoupledGRPOTrainer
from trl_diffusion.trainers.daca import DACAConfig, DACATrainer
from trl_diffusion.trainers.diffpo import DiFFPOConfig, DiFFPOTrainer
from trl_diffusion.trainers.diffu_grpo import DiffuGRPOConfig, DiffuGRPOTrainer
from trl_diffusion.trainers.dipo import DiPOConfig, DiPOTrainer
from trl_diffusion.trainers.dmpo import DMPOConfig, DMPOTrainer
from trl_diffusion.trainers.egspo import EGSPOConfig, EGSPOTrainer
from trl_diffusion.trainers.espo import ESPOConfig, ESPOTrainer
from trl_diffusion.trainers.fork_grpo import ForkGRPOConfig, ForkGRPOTrainer
from trl_diffusion.trainers.gdpo import GDPOConfig, GDPOTrainer
from trl_diffusion.trainers.gdsd import GDSDConfig, GDSDTrainer
from trl_diffusion.trainers.just_grpo import JustGRPOConfig, JustGRPOTrainer
from trl_diffusion.trainers.mapg import MAPGConfig, MAPGTrainer
from trl_diffusion.trainers.sft import SFTConfig, SFTTrainer
from trl_diffusion.trainers.spg import SPGConfig, SPGTrainer
from trl_diffusion.trainers.stable_drl import (
    StableDRLConfig,
    StableDRLTrainer,
    StableESPOConfig,
    StableESPOTrainer,
)
from trl_diffusion.trainers.step_rs import StepRSConfig, StepRSTrainer
from trl_diffusion.trainers.tracerl import TraceRLConfig, TraceRLTrainer
from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOConfig, TrajectoryGRPOTrainer
from trl_diffusion.trainers.uni_grpo import UniGRPOConfig, UniGRPOTrainer
from trl_diffusion.trainers.wd1 import WD1Config, WD1Trainer

# Methods by the name that recipes, comparison and tests call them; a method's config is its `config_class`.
METHODS: dict[str, type[DiffusionGRPOTrainer]] = {
    "agrpo": AGRPOTrainer,
    "atpo": ATPOTrainer,
    "dipo": DiPOTrainer,
    "diffu_grpo": DiffuGRPOTrainer,
    "dmpo": DMPOTrainer,
    "espo": ESPOTrainer,
    "gdpo": GDPOTrainer,
    "gdsd": GDSDTrainer,
    "coupled_grpo": CoupledGRPOTrainer,
    "wd1": WD1Trainer,
    "spg": SPGTrainer,
    "stable_drl": StableDRLTrainer,
    "stable_espo": StableESPOTrainer,
    "uni_grpo": UniGRPOTrainer,
    "tracerl": TraceRLTrainer,
    "just_grpo": JustGRPOTrainer,
    "fork_grpo": ForkGRPOTrainer,
    "mapg": MAPGTrainer,
    "egspo": EGSPOTrainer,
    "step_rs": StepRSTrainer,
    "daca": DACATrainer,
    "diffpo": DiFFPOTrainer,
}

__all__ = [
    "METHODS",
    "AGRPOConfig",
    "AGRPOTrainer",
    "ATPOConfig",
    "ATPOTrainer",
    "CoupledGRPOConfig",
    "CoupledGRPOTrainer",
    "DACAConfig",
    "DACATrainer",
    "DMPOConfig",
    "DMPOTrainer",
    "DiFFPOConfig",
    "DiFFPOTrainer",
    "DiPOConfig",
    "DiPOTrainer",
    "DiffuGRPOConfig",
    "DiffuGRPOTrainer",
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "EGSPOConfig",
    "EGSPOTrainer",
    "ESPOConfig",
    "ESPOTrainer",
    "ForkGRPOConfig",
    "ForkGRPOTrainer",
    "GDPOConfig",
    "GDPOTrainer",
    "GDSDConfig",
    "GDSDTrainer",
    "JustGRPOConfig",
    "JustGRPOTrainer",
    "MAPGConfig",
    "MAPGTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SPGConfig",
    "SPGTrainer",
    "StableDRLConfig",
    "StableDRLTrainer",
    "StableESPOConfig",
    "StableESPOTrainer",
    "StepRSConfig",
    "StepRSTrainer",
    "TraceRLConfig",
    "TraceRLTrainer",
    "TrajectoryGRPOConfig",
    "TrajectoryGRPOTrainer",
    "UniGRPOConfig",
    "UniGRPOTrainer",
    "WD1Config",
    "WD1Trainer",
]
