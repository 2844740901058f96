"""Load adapters onto native models without losing weights, and rename LoRA adapters to the hub's names and back.

An adapter saved here names layers as the native classes do (`model.layers.3.self_attn.o_proj`); the remote code of
LLaDA's checkpoints calls the same layer `model.transformer.blocks.3.attn_out`. Only names differ: tensors are copied
bit for bit. Dream's and SDAR's names are the same on both sides.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from trl_diffusion.adapters.targets import LinearLayers, shortest_names
from trl_diffusion.models.meta_model import meta_model

# The key of a weight in PEFT's files: prefix, the layer's name, a tensor of its adapter.
_LORA_KEY = re.compile(r"base_model\.model\.(?P<layer>.+?)(?P<tensor>\.lora_\w+(\.weight)?)")


def is_adapter(name: str) -> bool:
    """Return whether a folder or a repository on the Hub holds an adapter."""
    return find_adapter_config_file(name) is not None


def base_of(adapter: str) -> str | None:
    """Return the model that an adapter was trained on, as the adapter's config names it.

    Args:
        adapter: on the Hub or in a folder.

    Raises:
        ValueError: if there is no such folder or repository, or it holds no adapter.
    """
    if Path(adapter).exists() and not (Path(adapter) / CONFIG_NAME).is_file():
        raise ValueError(f"{adapter} holds no adapter: there is no {CONFIG_NAME} in it. Give the folder PEFT wrote.")
    try:
        return PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except ValueError as error:
        raise ValueError(
            f"There is no adapter {adapter!r}: neither a folder of that name nor, as far as it can be reached, a "
            f"repository on the Hub. PEFT says: {error}"
        ) from error


def load_adapter(model: PreTrainedModel, name: str, adapter: str, *, is_trainable: bool = False) -> PeftModel:
    """Load an adapter and check that every one of its weights found its layer.

    `PeftModel.from_pretrained` alone skips weights that it finds no layer for.

    Args:
        model: the native base model.
        name: name of the base, for messages.
        adapter: on the Hub or in a folder.
        is_trainable: whether it is going to be trained.

    Raises:
        ValueError: if the adapter has weights that the base has no layer for, or lacks some.
    """
    mismatch = f"The adapter {adapter} does not fit the weights of {name}"
    advice = (
        "Give the base that it was trained on; an adapter of the hub's original code is renamed by "
        "trl_diffusion.models.import_adapter"
    )
    try:
        adapted = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    except (ValueError, RuntimeError) as error:  # how PEFT reports that no layer matches, or shapes differ
        raise ValueError(f"{mismatch}. {advice}. PEFT says: {error}") from error
    # PEFT skips weights without a counterpart, with a warning at most. A file may also hold whole embeddings.
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    given = load_peft_weights(adapter, device="cpu").keys()
    if alone := sorted((expected - given) | (given - expected - adapted.state_dict().keys())):
        raise ValueError(f"{mismatch}: only one of them has {', '.join(alone[:3])} ({len(alone)} in all). {advice}.")
    return adapted


def export_adapter(adapter: str | Path, output: str | Path, base: str | None = None) -> Path:
    """Write a LoRA adapter as PEFT would have written it on the hub's original code.

    Args:
        adapter: adapter of a native model, on the Hub or in a folder.
        output: folder for `adapter_config.json` and `adapter_model.safetensors`.
        base: the base model, if the adapter's config names none, or one that was moved; only its config is read.

    Returns:
        `output`.

    Raises:
        TypeError: if the base is not of one of this library's families.
        ValueError: if the adapter is more than LoRA on linear layers, or has weights that do not belong to the base.
    """
    return _rename(adapter, output, base, to_hub=True)


def import_adapter(adapter: str | Path, output: str | Path, base: str | None = None) -> Path:
    """Write a LoRA adapter that was trained on the hub's original code as an adapter of the native model.

    Arguments, result and errors are those of `export_adapter`, with the hub's names turned into native ones.
    """
    return _rename(adapter, output, base, to_hub=False)


def _rename(adapter: str | Path, output: str | Path, base: str | None, to_hub: bool) -> Path:
    adapter, output = str(adapter), Path(output)
    if output.resolve() == Path(adapter).resolve():
        raise ValueError(f"The renamed adapter would replace the given one in {output}; give another folder.")
    config = PeftConfig.from_pretrained(adapter)
    _check_plain_lora(adapter, config)
    base = base or config.base_model_name_or_path
    if base is None:
        raise ValueError(f"The config of {adapter} does not name the model it was trained on; pass it as `base`.")
    layers = LinearLayers(meta_model(base, config.revision))
    if fused := {hub for hub in layers.hub_names if layers.hub_names.count(hub) > 1}:
        raise ValueError(
            f"{base} stores several layers of the native model as one ({sorted(fused)[0]} …), so an adapter of one "
            "side has no counterpart on the other. Merge the adapter (`merge_and_unload`) and save the model instead."
        )
    native_to_hub = dict(zip(layers.names, layers.hub_names, strict=True))
    names = native_to_hub if to_hub else {hub: native for native, hub in native_to_hub.items()}

    tensors, adapted, unknown = _renamed_tensors(load_peft_weights(adapter, device="cpu"), names)
    if unknown:
        given = "native" if to_hub else "the hub's"
        raise ValueError(
            f"Of the weights of {adapter}, {len(unknown)} do not belong to a linear layer of {base} under {given} "
            f"names; the first is {unknown[0]}. Check the base, and the direction: export_adapter turns native names "
            "into the hub's, import_adapter the hub's into native ones."
        )
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    renamed = _renamed_config(config, base, {name: names[name] for name in adapted}, list(names.values()))
    renamed.save_pretrained(str(output))
    return output


def _renamed_tensors(
    weights: dict[str, torch.Tensor], names: dict[str, str]
) -> tuple[dict[str, torch.Tensor], set[str], list[str]]:
    """Rename the weights of an adapter.

    Args:
        weights: by their keys in PEFT's file.
        names: new name of every linear layer by its old one.

    Returns:
        (weights by their new keys; old names of the adapted layers; keys that belong to no linear layer).
    """
    tensors, adapted, unknown = {}, set(), []
    for key, tensor in weights.items():
        parts = _LORA_KEY.fullmatch(key)
        if parts is None or parts["layer"] not in names:
            unknown.append(key)
            continue
        adapted.add(parts["layer"])
        tensors[f"base_model.model.{names[parts['layer']]}{parts['tensor']}"] = tensor.contiguous()
    return tensors, adapted, unknown


def _check_plain_lora(adapter: str, config: PeftConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{adapter} is an adapter of type {PeftType(config.peft_type).value}; only LoRA can be renamed."
        )
    more_than_lora = {
        "modules_to_save": config.modules_to_save,
        "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
        "bias": None if config.bias == "none" else config.bias,
    }
    for name, value in more_than_lora.items():
        if value:
            raise ValueError(
                f"{adapter} has {name}={value!r}; only LoRA on linear layers can be renamed. Merge the adapter "
                "(`merge_and_unload`) and save the model instead: `save_pretrained` writes the hub's names."
            )


def _renamed_config(config: LoraConfig, base: str, names: dict[str, str], all_names: list[str]) -> LoraConfig:
    """Return a config that selects the renamed layers and no other.

    Args:
        config: config of the given adapter.
        base: name of the base model.
        names: new name of every adapted layer by its old one.
        all_names: new names of all linear layers.
    """
    renamed = copy.deepcopy(config)
    renamed.base_model_name_or_path = base
    renamed.auto_mapping = None  # it would name the Python class that the given adapter was trained on
    renamed.inference_mode = True
    renamed.target_modules = shortest_names(names.values(), all_names)
    # The full names in `target_modules` already say which layers these would have selected.
    renamed.exclude_modules = renamed.layers_to_transform = renamed.layers_pattern = None
    renamed.rank_pattern = _renamed_pattern(config.rank_pattern or {}, names)
    renamed.alpha_pattern = _renamed_pattern(config.alpha_pattern or {}, names)
    return renamed


def _renamed_pattern(pattern: dict[str, int], names: dict[str, str]) -> dict[str, int]:
    """Return a rank or alpha pattern with an entry for every renamed layer that the given one has a value for."""
    # Written out layer by layer, because a pattern such as `ff_out` can match other layers under the new names.
    found = {new: get_pattern_key(list(pattern), old) for old, new in sorted(names.items())}
    return {re.escape(new): pattern[key] for new, key in found.items() if key in pattern}
