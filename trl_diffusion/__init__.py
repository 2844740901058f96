"""Reinforcement learning of diffusion language models on Hugging Face TRL."""

from importlib import import_module
from typing import Any

from trl_diffusion.registration import register_families

__version__ = "0.2.0"

register_families()


def __getattr__(name: str) -> Any:
    # `from trl_diffusion import AGRPOTrainer` works without loading TRL's trainers, which are slow to load, for
    # everybody else.
    if name.endswith(("Trainer", "Config")):
        from trl_diffusion import trainers

        if name in trainers.__all__:
            return getattr(trainers, name)
    # `trl_diffusion.models` is there after `import trl_diffusion`, but loaded only when somebody asks for it.
    if name == "models":
        return import_module("trl_diffusion.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
