"""Reinforcement learning of diffusion language models on Hugging Face TRL."""

from trl_diffusion import models as models  # registers the native model classes with transformers

__version__ = "0.1.0.dev0"
