"""A checkpoint's native config and layers, without its weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.dream import DreamConfig, DreamModel
from trl_diffusion.models.llada import LLaDAConfig, LLaDAModelLM
from trl_diffusion.models.sdar import SDARConfig, SDARForCausalLM

_CLASSES: dict[Any, Any] = {
    LLaDAConfig: LLaDAModelLM,
    DreamConfig: DreamModel,
    SDARConfig: SDARForCausalLM,
}


def native_config(name_or_path: str, revision: str | None = None) -> LLaDAConfig | DreamConfig | SDARConfig:
    """The config of a checkpoint of one of this library's families.

    Args:
        name_or_path: checkpoint on the Hub or in a folder.
        revision: revision on the Hub.

    Raises:
        TypeError: if the checkpoint is of another family.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    if type(config) not in _CLASSES:
        raise TypeError(
            f"{name_or_path} has model_type {config.model_type!r}, which is not a diffusion language model. "
            f"Supported: {', '.join(known.model_type for known in _CLASSES)}."
        )
    return config


def skeleton(name_or_path: str, revision: str | None = None) -> DiffusionLM:
    """A checkpoint's native model without weights (on the `meta` device), to look at its layers.

    Arguments and errors are those of `native_config`, the only thing that is read.
    """
    config = native_config(name_or_path, revision)
    with torch.device("meta"):  # not by `from_config`, which under ZeRO-3 shards what it builds
        return _CLASSES[type(config)](config)
