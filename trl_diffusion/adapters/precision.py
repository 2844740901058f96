"""Prepare adapters before TRL builds them, and repair what TRL does to them.

Before: load an adapter that is trained further, check the names of its layers. After: restore the float32 weights of
    an adapter over a quantised model, because bfloat16 weights do not move by small steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from peft import LoraConfig, PeftConfig, PeftModel
from trl.trainer.utils import create_model_from_path

from trl_diffusion.adapters.renaming import base_of, load_adapter
from trl_diffusion.adapters.targets import native_lora_config
from trl_diffusion.models.meta_model import meta_model


def load_to_train(adapter: str, args: Any, quantization_config: Any = None) -> PeftModel:
    """Load an adapter that is trained further, onto the base that its config names, as TRL would load that base.

    Args:
        adapter: on the Hub or in a folder.
        args: the trainer's config; `model_init_kwargs` are those of the base.
        quantization_config: of the base.

    Raises:
        ValueError: if the config names no base, or one that does not exist or has other weights than the adapter
            needs.
    """
    base = base_of(adapter)
    if base is None or (Path(base).is_absolute() and not Path(base).exists()):
        raise ValueError(
            f"The adapter {adapter} was trained on {base or 'a base that its config does not name'}, which cannot be "
            f"loaded. Set base_model_name_or_path in {adapter}/adapter_config.json to the base's folder or hub id."
        )
    settings = dict(args.model_init_kwargs or {})
    if revision := PeftConfig.from_pretrained(adapter).revision:
        settings["revision"] = revision
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None  # each process holds or shards the whole model, and the trainer moves it
    return load_adapter(create_model_from_path(base, **settings), base, adapter, is_trainable=True)


def native_peft_config(
    config: PeftConfig | None, model: Any, model_init_kwargs: dict[str, Any] | str | None
) -> PeftConfig | None:
    """Return the config with native names of layers, see `native_lora_config`; unchanged if it is not LoRA's.

    Args:
        config: the trainer's argument.
        model: path, hub id or native model.
        model_init_kwargs: arguments of `from_pretrained`, for the revision of a hub id.
    """
    if not isinstance(config, LoraConfig) or isinstance(model, PeftModel):  # TRL refuses the latter, with its reason
        return config
    if isinstance(model, str):
        assert not isinstance(model_init_kwargs, str)  # transformers parses the command line's
        model = meta_model(model, (model_init_kwargs or {}).get("revision"))
    return native_lora_config(config, model)


def copy_as_reference(model: PeftModel) -> None:
    """Add a frozen copy of the active adapter, under the name `ref` that TRL uses for the reference of an adapter."""
    active = f".{model.active_adapter}."
    model.add_adapter("ref", model.active_peft_config)
    for name, weight in model.named_parameters():
        if active in name:
            model.get_parameter(name.replace(active, ".ref.")).data.copy_(weight.data)


def share_checkpointing_kwargs(args: Any) -> None:
    """Copy `gradient_checkpointing_kwargs` to `activation_checkpointing_kwargs`, where transformers 5.24 reads them.

    transformers copies them when the config is made. TRL 1.16 sets `use_reentrant=True` later, for adapters under
    ZeRO-3, and only under the old name.

    Args:
        args: the trainer's config, changed in place.
    """
    args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs


class AdapterPrecision:
    """Keeps the weights of an adapter in the precision they had before TRL; float32 if TRL makes the adapter.

    Over a quantised model TRL casts the trained weights to bfloat16. A bfloat16 weight takes no step smaller than
    about 1/256 of itself. With the learning rates of reinforcement learning (5e-6) the A matrices would never move,
    and the weights of an adapter that is trained further would be rounded.

    Args:
        model: the trainer's argument.
    """

    def __init__(self, model: Any):
        given = model.named_parameters() if isinstance(model, PeftModel) else ()
        self.values = {name: weight.data for name, weight in given if weight.requires_grad}

    def restore(self, model: Any, deepspeed: DeepSpeedPlugin | None) -> None:
        """Undo the cast, in place.

        Args:
            model: the trainer's model, before an optimizer knows its weights.
            deepspeed: the plugin in use. ZeRO-3 needs one dtype for all weights, so there TRL's cast stays.
        """
        if not isinstance(model, PeftModel) or not model.get_base_model().uses_bitsandbytes:
            return
        if deepspeed is not None and deepspeed.zero_stage == 3:
            return
        for name, weight in model.named_parameters():
            if weight.requires_grad and weight.dtype == torch.bfloat16:
                weight.data = self.values.get(name, weight.data.float())
