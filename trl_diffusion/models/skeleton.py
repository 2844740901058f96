"""The native classes by the hub's `model_type`, and models without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.dream import DreamModel
from trl_diffusion.models.llada import LLaDAModelLM

NATIVE_CLASSES: dict[str, Any] = {cls.config_class.model_type: cls for cls in (LLaDAModelLM, DreamModel)}


def skeleton(name_or_path: str, revision: str | None = None) -> DiffusionLM:
    """A checkpoint's native model without weights (on the `meta` device), to look at its layers.

    Args:
        name_or_path: checkpoint on the Hub or in a folder; only its config is read.
        revision: revision on the Hub.

    Raises:
        TypeError: if the checkpoint is not of one of this library's families.
    """
    values, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
    model_type = values.get("model_type")
    if model_type not in NATIVE_CLASSES:
        raise TypeError(
            f"{name_or_path} has model_type {model_type!r}, which is not a diffusion language model. Supported: "
            f"{', '.join(NATIVE_CLASSES)}."
        )
    native = NATIVE_CLASSES[model_type]
    with torch.device("meta"):
        return native(native.config_class.from_dict(values))
