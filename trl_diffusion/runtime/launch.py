"""Make launches work on a CPU too, and refuse those that would train on another backend than was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

# Under DeepSpeed's offload accelerate replaces the optimizer by DeepSpeed's own of the same kind. There are these; any
# other optimizer becomes Adam.
_OFFLOADED = ("adam", "adagrad", "lion")

# How many processes a dry run pretends; `None` outside of one.
_PRETENDED: ContextVar[int | None] = ContextVar("_PRETENDED", default=None)
# What launchers describe their launch with.
_LAUNCHED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LAUNCHED_WITH = ("ACCELERATE_", "FSDP_")


def launched_processes() -> int:
    """Return how many processes a launcher started together with this one, or a dry run pretends; 1 without either."""
    return _PRETENDED.get() or int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Return whether a launcher (accelerate, torchrun, DeepSpeed's) has started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


@contextmanager
def pretended(processes: int, mixed_precision: str = "no") -> Iterator[None]:
    """Let configs and trainers that are made inside believe to be in the first of several processes.

    This process stays alone, on the CPU: what a launcher has said about it is hidden from accelerate, which would
    otherwise wait for the other processes.

    Args:
        processes: how many.
        mixed_precision: accelerate's setting.
    """
    hidden = {
        name: os.environ.pop(name) for name in [*os.environ] if name in _LAUNCHED_BY or name.startswith(_LAUNCHED_WITH)
    }
    os.environ["ACCELERATE_MIXED_PRECISION"] = mixed_precision
    token = _PRETENDED.set(processes)
    try:
        yield
    finally:
        _PRETENDED.reset(token)
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        os.environ.update(hidden)


def is_pretended() -> bool:
    """Return whether this is inside of `pretended`."""
    return _PRETENDED.get() is not None


class LaunchedConfig:
    """What a config says about its launch; stands before TRL's config in the method resolution order."""

    @property
    def world_size(self) -> int:
        """Processes that train together; in a dry run as many as it pretends."""
        return _PRETENDED.get() or super().world_size  # type: ignore[misc]

    @property
    def place_model_on_device(self) -> bool | None:
        """False in a dry run, whose model has no weights; else as transformers decides."""
        return False if is_pretended() else super().place_model_on_device  # type: ignore[misc]


def fit_to_cpu(args: TrainingArguments) -> None:
    """Set what a machine without an accelerator needs, so that the same command runs with and without one.

    Unless `use_cpu` or a backend is set, accelerate connects processes through accelerators only: processes started on
    a machine without one would not know of each other, and each would train alone. Call this before transformers looks
    for devices, that is at the start of a config's `__post_init__`. A dry run uses the CPU wherever it runs.

    Args:
        args: a config under construction; changed in place.

    Raises:
        ValueError: in a dry run, if DeepSpeed or FSDP are configured where a dry run does not read it.
    """
    if is_pretended():
        _refuse_own_backend(args)
        args.use_cpu = True
    if torch.accelerator.is_available() or is_pretended():
        return
    sharding = args.deepspeed or any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP"))
    if sharding and "LOCAL_RANK" in os.environ:
        args.ddp_backend = args.ddp_backend or "gloo"  # not `use_cpu`, with which accelerate ignores both backends
        args.bf16 = bool(args.bf16)  # TRL's default is true, which transformers refuses on a CPU without `use_cpu`
    elif not args.deepspeed:
        args.use_cpu = True


def _refuse_own_backend(args: TrainingArguments) -> None:
    for name in ("deepspeed", "fsdp"):
        if vars(args)[name]:
            raise ValueError(
                f"A dry run reads what processes share from an accelerate config, not from --{name}. Name one with "
                f"--accelerate_config, and leave --{name} out of the dry run."
            )


def check_backend(args: TrainingArguments) -> None:
    """Refuse to start if accelerate dropped the backend that was launched, or some of the processes.

    Raises:
        RuntimeError: if DeepSpeed or FSDP was launched and this process is not part of it, or if the processes do not
            know of each other.
        ValueError: if the optimizer would silently become another one under DeepSpeed's offload.
    """
    launched = "LOCAL_RANK" in os.environ
    started = args.distributed_state.distributed_type if args.distributed_state else DistributedType.NO
    plugin = args.deepspeed_plugin
    if launched and plugin is not None and started != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"DeepSpeed was launched, but accelerate started {started.value}: with `use_cpu` or the environment "
            "variable ACCELERATE_USE_CPU it leaves DeepSpeed out. The weights would stay in shards ('weight' must be "
            "2-D). Unset both: without an accelerator, DeepSpeed uses the CPU without being told."
        )
    processes = launched_processes()
    fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP") and processes > 1
    if launched and fsdp and started in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise RuntimeError(
            f"FSDP was launched, but accelerate started {started.value}, because it shards on accelerators only. "
            "Every process would hold the whole model. On a CPU launch with trl_diffusion/accelerate_configs/"
            "cpu_zero3.yaml."
        )
    if processes != args.world_size:
        raise RuntimeError(
            f"{processes} processes were launched, but each believes to be one of {args.world_size} and would train "
            "alone. Launch with a file of trl_diffusion/accelerate_configs, one process per GPU; where there are "
            "fewer GPUs than processes, pass --use_cpu true for DDP, or --ddp_backend gloo for DeepSpeed."
        )
    if plugin is not None:
        check_offloaded_optimizer(OptimizerNames(args.optim).value, plugin.deepspeed_config)


def check_offloaded_optimizer(optimizer: str, deepspeed_config: dict[str, Any]) -> None:
    """Refuse an optimizer that DeepSpeed would silently replace by its own, because it offloads its state.

    Args:
        optimizer: transformers' name of it.
        deepspeed_config: DeepSpeed's.

    Raises:
        ValueError: if it would.
    """
    offload = deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {})
    replaced = deepspeed_config.get("zero_force_ds_cpu_optimizer", True)
    if offload.get("device", "none") != "none" and replaced and not optimizer.startswith(_OFFLOADED):
        raise ValueError(
            f"optim={optimizer!r} would silently become DeepSpeed's Adam, because its state is offloaded. Use "
            "adamw_torch, or set `zero_force_ds_cpu_optimizer: false` in a DeepSpeed config file."
        )


def check_device_map(model: Any) -> None:
    """Refuse a model whose layers lie on several devices.

    Raises:
        ValueError: if a `device_map` has split it.
    """
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"The model's layers lie on several devices ({', '.join(devices)}), and its canvases can lie on one only. "
            "Start one process per GPU with `accelerate launch`, or load the model with device_map=None; DeepSpeed "
            "ZeRO-3 and FSDP2 shard its weights over all GPUs."
        )


def check_reference_loading() -> None:
    """Refuse to load a reference model whose weights would be empty.

    Raises:
        ValueError: if FSDP loads the checkpoint in the first process only.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "With `fsdp_cpu_ram_efficient_loading: true` only the first process loads weights, and FSDP sends them to "
            "the others for the policy but not for the reference model that beta != 0 needs. Set it to false in the "
            "accelerate config, or train an adapter, which needs no second model."
        )
