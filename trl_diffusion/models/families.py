"""The families that this library knows: each registers its config and its model class when it is imported.

A family's file holds a config (`DiffusionConfigMixin` before a stock config class, with `model_type` and the
`published` vocabulary), three layer classes (`Float32Rotary`, `DiffusionAttention` and `LastLayer`, each before the
stock class) and a model (`DiffusionLM` before the stock `…ForCausalLM`, with the config and layer classes as
attributes), and ends with `register`. `dream.py` is the shortest example.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from trl_diffusion.family import MODEL_TYPES
from trl_diffusion.models.diffusion_lm import DiffusionLM

FAMILIES: dict[type[PreTrainedConfig], type[DiffusionLM]] = {}  # by config class, in the order of registration


def register(config_class: Any, model_class: Any) -> None:
    """Register a family with transformers' Auto classes and with this library.

    A family is one file that ends with this call; nothing else names it. Registering a family again replaces it.

    Args:
        config_class: a stock config class with `DiffusionConfigMixin` before it; its `model_type` is that of the
            checkpoints' `config.json`.
        model_class: a stock `…ForCausalLM` with `DiffusionLM` before it.
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    FAMILIES[config_class] = model_class
    MODEL_TYPES[config_class.model_type] = None
