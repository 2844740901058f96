"""Load the model that masked SFT trains: by name, with a new or a given adapter, quantised."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl.trainer.utils import create_model_from_path

from trl_diffusion.adapters.precision import load_to_train, native_peft_config, share_checkpointing_kwargs
from trl_diffusion.adapters.renaming import is_adapter
from trl_diffusion.runtime.arguments import check_adapter, check_model, check_trainable


def load_policy(
    model: Any,
    args: Any,
    peft_config: PeftConfig | None,
    quantization_config: QuantizationConfigMixin | None,
) -> Any:
    """Load the model that is trained, with a new adapter if one is asked for.

    Args:
        model: the trainer's argument: a native model, a `PeftModel` around one, or a name or path.
        args: the trainer's config. Under ZeRO-3 its `gradient_checkpointing_kwargs` are changed in place for adapters.
        peft_config: of a new adapter.
        quantization_config: of a model given by name.

    Raises:
        ValueError: if an argument would be ignored, the model has an adapter already, or nothing would be trained.
        TypeError: if the model is not a diffusion language model.
    """
    policy = _loaded(model, args, quantization_config)
    check_adapter(policy, peft_config)
    if peft_config is not None:
        policy = _with_new_adapter(policy, peft_config, args)
    check_trainable(policy)
    if isinstance(policy, PeftModel) and args.gradient_checkpointing:
        policy.enable_input_require_grads()
        if _shards_weights(args):
            args.gradient_checkpointing_kwargs = _reentrant(args.gradient_checkpointing_kwargs)
            share_checkpointing_kwargs(args)
    policy.config.use_cache = False  # the growing cache of autoregressive models, which forward passes refuse
    return policy


def _loaded(model: Any, args: Any, quantization_config: QuantizationConfigMixin | None) -> Any:
    """Return the given model, or load the one that a name stands for, in float32 as TRL's trainers load it."""
    arguments = load_arguments(args)
    if not isinstance(model, str):
        given = {"model_init_kwargs": arguments, "quantization_config": quantization_config}
        if ignored := [name for name, value in given.items() if value]:
            raise ValueError(
                f"{' and '.join(ignored)} would be ignored, because the model given is loaded already. Leave them "
                "out, or give the model's name."
            )
        check_model(model)
        return model
    if is_adapter(model):
        return load_to_train(model, args, quantization_config)
    check_model(model)
    if quantization_config is not None:
        arguments = {**arguments, "quantization_config": quantization_config}
    if args.distributed_state is not None and args.distributed_state.distributed_type != DistributedType.NO:
        arguments = {**arguments, "device_map": None}  # every process holds or shards the whole model
    return create_model_from_path(model, AutoModelForCausalLM, **arguments)  # type: ignore[arg-type]


def load_arguments(args: Any) -> dict[str, Any]:
    """Return the `model_init_kwargs` of a trainer's config; empty if there are none."""
    assert not isinstance(args.model_init_kwargs, str)  # transformers parses the command line's
    return args.model_init_kwargs or {}


def _with_new_adapter(model: Any, config: PeftConfig, args: Any) -> Any:
    """Put a new adapter on a model, as TRL's trainers do."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model has an adapter already, and peft_config asks for another one. Leave peft_config out to train "
            "the adapter that is there, or merge it first (`merge_and_unload`)."
        )
    settings: dict[str, Any] = {}
    if _shards_weights(args) and not model.uses_bitsandbytes:
        settings["autocast_adapter_dtype"] = False  # ZeRO-3 gathers weights of one dtype only
    return get_peft_model(model, native_peft_config(config, model, None), **settings)  # type: ignore[arg-type]


def _reentrant(kwargs: Any) -> dict[str, Any]:
    """Return the arguments with reentrant checkpointing, the only kind that works with an adapter under ZeRO-3.

    The other kind compares the shapes of what a layer saves when it is computed again, and ZeRO-3 has released or
    gathered its weights in between.
    """
    if (kwargs or {}).get("use_reentrant") is False:
        raise ValueError(
            "An adapter under ZeRO-3 needs reentrant gradient checkpointing, but gradient_checkpointing_kwargs says "
            "use_reentrant=False. Leave it out, or turn gradient_checkpointing off."
        )
    return {**(kwargs or {}), "use_reentrant": True}


def _shards_weights(args: Any) -> bool:
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
