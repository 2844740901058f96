"""Build networks without their weights, on PyTorch's `meta` device: to look at their layers, and to count."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

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
    """Build a checkpoint's native model without weights, to look at its layers.

    Arguments and errors are those of `native_config`: only the config is read.
    """
    config = native_config(name_or_path, revision)
    with torch.device("meta"):  # not by `from_config`, which under ZeRO-3 shards what it builds
        return FAMILIES[type(config)](config)


def empty_model(
    config: PreTrainedConfig,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
) -> DiffusionLM:
    """Build a native model without weights that has every tensor's shape and dtype as `from_pretrained` loads it.

    Args:
        config: of one of this library's families.
        dtype: of the weights, or its name; `None` or `"auto"` for that of the checkpoint.
        attn_implementation: of attention.
        quantization_config: bitsandbytes' config; its 4-bit weights are packed two in a byte.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.float32
    with torch.device("meta"):
        model: Any = FAMILIES[type(config)]._from_config(  # type: ignore[attr-defined]
            config, dtype=dtype, attn_implementation=attn_implementation
        )
        if quantization_config is not None:
            _quantise(model, quantization_config)
    return model


def _quantise(model: Any, quantization_config: QuantizationConfigMixin) -> None:
    """Replace linear layers by bitsandbytes', as transformers does before it loads weights, and give them their size.

    Loading weights is what quantises them, so here their quantised shapes are made by hand.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # optional

    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    model.hf_quantizer = quantizer
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.weight.data = torch.empty(math.ceil(layer.weight.numel() / 2), 1, dtype=torch.uint8)
        elif isinstance(layer, Linear8bitLt):
            layer.weight.data = torch.empty(layer.weight.shape, dtype=torch.int8)
