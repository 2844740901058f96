"""Reinforcement learning of diffusion language models on Hugging Face TRL."""

from typing import Any

from trl_diffusion.registration import register_families

__version__ = "0.1.0.dev0"

register_families()


def __getattr__(name: str) -> Any:
    # `from trl_diffusion import AGRPOTrainer` works without loading TRL's trainers, which are slow to load, for
    # everybody else.
    if name.endswith(("Trainer", "Config")):
        from trl_diffusion import trainers

        if name in trainers.__all__:
            return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
