"""Loading of a model or an adapter with its tokenizer, and a checksum of the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_diffusion.adapters.merging import merge_obstacle, product_obstacle
from trl_diffusion.adapters.renaming import base_of, is_adapter, load_adapter
from trl_diffusion.family import family_of
from trl_diffusion.models.embedded import EMBEDDED_MODELS

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load_model(
    name: str | None,
    adapter: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    block_size: int | None = None,
    block_origin: str | None = None,
    device: torch.device | str = "cpu",
    allow_other_base: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a diffusion language model, with an adapter on top if there is one, and its tokenizer.

    Args:
        name: model on the Hub or in a folder, or the name of an embedded one (`embedded`, `embedded_sdar`); that of an
            adapter is taken as `adapter`. `None` for the base that the adapter was trained on.
        adapter: PEFT adapter on the Hub or in a folder.
        revision: revision of the model on the Hub.
        dtype: `"auto"` for the checkpoint's, else for example `"bfloat16"`.
        attn_implementation: as in transformers.
        block_size: attention block of a checkpoint whose config.json leaves it out; 0 for full attention.
        block_origin: where the first attention block begins, `sequence` or `completion`; as the checkpoint says if not
            given.
        device: where to put it.
        allow_other_base: load an adapter although its config names another base, for example one that has moved. Its
            weights must have the shapes of the base's layers.

    Returns:
        The model in evaluation mode, and the base's tokenizer.

    Raises:
        ValueError: if there is neither model nor adapter, or the adapter was trained on another base.
        TypeError: if the model is not a diffusion language model.
    """
    if name is not None:
        name = EMBEDDED_MODELS.get(name, name)
    if name is not None and adapter is None and is_adapter(name):
        name, adapter = None, name
    if adapter is not None:
        name = _base_of(adapter, name, allow_other_base)
    if name is None:
        raise ValueError("load_model() needs a model or an adapter, got neither.")
    blocks = {"block_size": block_size, "block_origin": block_origin}
    settings: dict[str, Any] = {key: value for key, value in blocks.items() if value is not None}
    model: Any = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype,
        attn_implementation=attn_implementation,
        device_map={"": device},
        **settings,
    )
    family_of(model)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
    if adapter is not None:
        model = load_adapter(model, name, adapter)
    return model.eval(), tokenizer


def merge_for_decoding(model: Any, wanted: bool | None = None) -> tuple[Any, str | None]:
    """Merge the adapter of a loaded model into its base, in place, so that a pass costs what it costs without one.

    Args:
        model: from `load_model`.
        wanted: `None` merges where only the rounding of float32 changes. `True` merges in low precision as well, which
            rounds what is small in the adapter away.

    Returns:
        (the model to decode with; whether its adapter is merged, `yes` or `no` with the reason, `None` without one).

    Raises:
        ValueError: if it is wanted and cannot be done.
    """
    obstacle = merge_obstacle(model, lossless=not wanted)
    if obstacle is None and not wanted:
        obstacle = product_obstacle(model.device)
    if wanted and obstacle is not None:
        raise ValueError(f"merge_adapter=True cannot be done: {obstacle}. Leave it out.")
    if not isinstance(model, PeftModel):
        return model, None
    if wanted is False:
        obstacle = "merge_adapter is off"
    return (model, f"no: {obstacle}") if obstacle is not None else (model.merge_and_unload().eval(), "yes")


def _base_of(adapter: str, name: str | None, allow_other_base: bool) -> str:
    """Return the base to load for an adapter."""
    trained_on = base_of(adapter)
    if name is None:
        if not trained_on:
            raise ValueError(f"The adapter {adapter} does not name the base it was trained on; give the base too.")
        return trained_on
    if allow_other_base or _same_model(name, trained_on or ""):
        return name
    raise ValueError(
        f"The adapter {adapter} was trained on {trained_on!r}, not on {name!r}. Give that base, or none to load it by "
        "itself; if the base has only moved, pass allow_other_base."
    )


def _same_model(name: str, other: str) -> bool:
    return name == other or (Path(name).exists() and Path(name).resolve() == Path(other).resolve())


@torch.no_grad()
def weights_checksum(model: PreTrainedModel) -> str:
    """Return a checksum of all weights, adapters included: 16 hexadecimal digits.

    It adds the weights' bit patterns as integers, so it is exact and the same on every device.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.state_dict().items()):
        total = weight.contiguous().view(_INTEGER[weight.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {total}\n".encode())
    return digest.hexdigest()
