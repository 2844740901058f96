"""Merge an adapter into the weights of its layers while nothing is trained, or compute it without casts.

A layer with LoRA computes two more matrix products in every forward pass, and casts their input. A rollout runs
hundreds of passes with the same weights, so before it the product of the two matrices is added to the layer's weight.

The weights of the base are never written to. A merged layer computes with a copy, and afterwards it gets its parameter
back. PEFT's `unmerge_adapter` subtracts what was added, which leaves rounding errors that add up over a run.

In bfloat16 a merged weight loses what the adapter has learnt wherever that is less than about 1/500 of the weight, and
early in a run that is everywhere. So adapters are not merged in low precision. Under autocast their matrices are cast
once, to the numbers that autocast would compute with in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

SMALL_IS_LOST = "in which a merged weight loses what is small in the adapter"  # the end of several reasons

_SIZE = 256  # of a matrix product for which a device uses the precision that it uses for large ones


def merge_obstacle(model: nn.Module, lossless: bool = True) -> str | None:
    """Return why the active adapter cannot be merged without changing what the model computes; `None` if it can.

    Args:
        model: with or without an adapter, its weights whole.
        lossless: whether weights of less than 32 bits are an obstacle.

    Returns:
        A clause that begins with a small letter, for messages.
    """
    if not isinstance(model, PeftModel):
        return "there is no adapter"
    if model.get_base_model().hf_quantizer is not None:
        return "the base is quantised, and merging into quantised weights would round the adapter away"
    for layer in _layers(model):
        if not _is_mergeable(layer):
            return f"an adapter of the kind {type(layer).__name__} with its settings is not merged here"
        if lossless and (low := [weight.dtype for weight in layer.parameters() if weight.dtype.itemsize < 4]):
            return f"weights are {str(low[0]).removeprefix('torch.')}, {SMALL_IS_LOST}"
    return None


def product_obstacle(device: torch.device) -> str | None:
    """Return why matrix products of a device make merging lossy, as `merge_obstacle` does; `None` if they do not."""
    if products_are_exact(device):
        return None
    return f"matrix products on {device.type} round float32 as TF32 does, {SMALL_IS_LOST}"


def products_are_exact(device: torch.device) -> bool:
    """Return whether matrix products of float32 on a device keep all of its 24 bits, which TF32 does not.

    It is tried and not asked for, because PyTorch has two interfaces for it that must not be mixed.
    """
    value = 1.0 + 2.0**-20
    product = torch.full((_SIZE, _SIZE), value, device=device) @ torch.eye(_SIZE, device=device)
    return bool((product == value).all())


def merged_bytes(model: nn.Module) -> int:
    """Return the memory of the copies that `merged_adapter` computes with."""
    return sum(_weight_of(layer)[2].nbytes for layer in _layers(model))


@contextmanager
def merged_adapter(model: nn.Module) -> Iterator[None]:
    """Merge the active adapter while the context lasts; then the layers have the parameters they had, bit for bit.

    An adapter that is merged or turned off already stays as it is. Inside of the context nothing can be trained, and
    the adapter must not be turned off: PEFT would then unmerge it.

    Args:
        model: for which there is no `merge_obstacle`.
    """
    layers = [layer for layer in _layers(model) if not layer.merged and not layer.disable_adapters]
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                module, name, weight = _weight_of(layer)
                kept.append((module, name, weight))
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
                layer.merge()
        yield
    finally:
        for module, name, weight in reversed(kept):  # the first one kept of a weight is its own
            setattr(module, name, weight)
        for layer in layers:
            layer.merged_adapters.clear()


@contextmanager
def cast_adapter(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute with LoRA's matrices in the dtype of autocast while the context lasts; then in their own again.

    Autocast casts them in every pass. PEFT casts the input of a layer to their dtype, and autocast casts it back. What
    is computed is the same bit for bit.

    Args:
        model: with an adapter or without; under autocast.
        dtype: that autocast computes in.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for layer in _layers(model):
            if _is_plain_lora(layer):
                for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                    for name, weight in list(factor.named_parameters(recurse=False)):
                        kept.append((factor, name, weight))
                        setattr(factor, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
        yield
    finally:
        for module, name, weight in kept:
            setattr(module, name, weight)


def _layers(model: nn.Module) -> list[Any]:  # PEFT does not type them as modules
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _is_plain_lora(layer: Any) -> bool:
    """Return whether a layer computes LoRA with linear layers, which autocast casts; DoRA and experts use weights."""
    return isinstance(layer, LoraLayer) and not layer.lora_variant and isinstance(layer.get_base_layer(), nn.Linear)


def _is_mergeable(layer: Any) -> bool:
    """Return whether a layer is LoRA or DoRA on a linear layer or on a parameter, without further biases."""
    if not isinstance(layer, (LoraLinear, ParamWrapper)) or any(layer.lora_bias.values()):
        return False
    return all(isinstance(variant, DoraLinearVariant) for variant in layer.lora_variant.values())


def _weight_of(layer: Any) -> tuple[nn.Module, str, nn.Parameter]:
    """Return the weight that merging changes: (its module, its name there, the parameter)."""
    module = layer.get_base_layer()
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return module, name, module.get_parameter(name)
