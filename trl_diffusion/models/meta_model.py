"""Read what a checkpoint's `config.json` says about its network, without loading weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig, PreTrainedConfig

from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.families import FAMILIES


def native_config(name_or_path: str, revision: str | None = None) -> PreTrainedConfig:
    """Return the config of a checkpoint of one of this library's families.

    Args:
        name_or_path: checkpoint on the Hub or in a folder.
        revision: revision on the Hub.

    Raises:
        TypeError: if the checkpoint is of another family.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    if type(config) not in FAMILIES:
        raise TypeError(
            f"{name_or_path} has model_type {config.model_type!r}, which is not a diffusion language model. "
            f"Supported: {', '.join(known.model_type for known in FAMILIES)}."
        )
    return config


def meta_model(name_or_path: str, revision: str | None = None) -> DiffusionLM:
    """Build a checkpoint's native model without weights (on PyTorch's `meta` device), to look at its layers.

    Arguments and errors are those of `native_config`: only the config is read.
    """
    config = native_config(name_or_path, revision)
    with torch.device("meta"):  # not by `from_config`, which under ZeRO-3 shards what it builds
        return FAMILIES[type(config)](config)
