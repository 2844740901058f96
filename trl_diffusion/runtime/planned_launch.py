"""How processes train together: read from a trainer, from a launcher's environment, or from an accelerate config."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, parse_flag_from_env

from trl_diffusion.runtime.launch import launched_processes
from trl_diffusion.runtime.text import plural


@dataclass(frozen=True)
class Launch:
    """How many processes train together, and what they divide among them.

    Args:
        processes: how many.
        deepspeed: DeepSpeed's config if DeepSpeed is the backend, else `None`.
        fsdp: whether FSDP is the backend.
        fsdp_offloads: whether FSDP keeps weights and the optimizer's state in the memory of the CPU.
        mixed_precision: accelerate's setting, which counts where the trainer's config sets neither `bf16` nor `fp16`.
    """

    processes: int = 1
    deepspeed: dict[str, Any] | None = None
    fsdp: bool = False
    fsdp_offloads: bool = False
    mixed_precision: str = "no"

    def __str__(self) -> str:
        backend = f"DeepSpeed ZeRO-{self.zero_stage}" if self.deepspeed else "FSDP" if self.fsdp else "DDP"
        moved = f", {' and '.join(self.offloaded)} in the memory of the CPU" if self.offloaded else ""
        alone = self.processes == 1 and backend == "DDP"
        return plural(self.processes, "process") + ("" if alone else f", {backend}{moved}")

    @property
    def zero_stage(self) -> int:
        """1 if processes divide the optimizer's state, 2 if gradients too, 3 if weights too (also under FSDP)."""
        return int(self._zero["stage"]) if self.deepspeed else 3 if self.fsdp else 0

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Of `"optimizer"` and `"weights"`, what lies in the memory of the CPU."""
        if self.fsdp:
            return ("optimizer", "weights") if self.fsdp_offloads else ()
        keys = {"optimizer": "offload_optimizer", "weights": "offload_param"}
        return tuple(name for name, key in keys.items() if self._zero.get(key, {}).get("device", "none") != "none")

    @property
    def _zero(self) -> dict[str, Any]:
        return self.deepspeed["zero_optimization"] if self.deepspeed else {}

    def share(self, stage: int) -> float:
        """Return the share that a process holds of what is divided from a stage of DeepSpeed's on."""
        return 1 / self.processes if self.zero_stage >= stage else 1.0

    @classmethod
    def of_trainer(cls, trainer: Any) -> Launch:
        """Return how the processes of a trainer that is set up train together."""
        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        return cls(
            trainer.args.world_size,
            None if plugin is None else plugin.deepspeed_config,
            trainer.is_fsdp_enabled,
            parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
        )

    @classmethod
    def of_environment(cls) -> Launch:
        """Return the launch that a launcher has described in the environment of this process."""
        return cls(
            launched_processes(),
            DeepSpeedPlugin().deepspeed_config if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None,
            parse_flag_from_env("ACCELERATE_USE_FSDP"),
            parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
            os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        )

    @classmethod
    def of_file(cls, path: Path) -> Launch:
        """Return the launch that a YAML file of accelerate's describes.

        Raises:
            ValueError: if it is no such file.
        """
        config: Any = load_config_from_file(str(path))
        deepspeed = config.distributed_type == DistributedType.DEEPSPEED
        return cls(
            int(config.num_processes),
            _deepspeed_config(config.deepspeed_config, path.parent) if deepspeed else None,
            config.distributed_type == DistributedType.FSDP,
            bool(config.fsdp_config.get("fsdp_offload_params", False)),
            str(config.mixed_precision or "no"),
        )


def _deepspeed_config(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return DeepSpeed's config for the `deepspeed_config` of an accelerate config in a folder.

    accelerate's plugin completes it, and can be made without DeepSpeed.
    """
    if file := settings.get("deepspeed_config_file"):
        # Files that ship with the package are named from the root of the repository.
        found = Path(file) if Path(file).is_file() else folder / "deepspeed" / Path(file).name
        return DeepSpeedPlugin(hf_ds_config=str(found)).deepspeed_config
    names = ("zero_stage", "offload_optimizer_device", "offload_param_device")
    given = {name: settings[name] for name in names if name in settings}
    return DeepSpeedPlugin(**given).deepspeed_config
