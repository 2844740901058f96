"""How an adapter is computed while completions are drawn: merged into its base, or with its matrices cast once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from trl_diffusion.adapters.merging import (
    SMALL_IS_LOST,
    cast_adapter,
    merge_obstacle,
    merged_adapter,
    product_obstacle,
)
from trl_diffusion.runtime.planned_launch import Launch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def rollout_merge_obstacle(model: Any, mixed_precision: str, launch: Launch) -> str | None:
    """Return why a run's adapter is not merged for its rollouts; `None` if it can be.

    It can be where the merged network's log-probabilities are the trained policy's up to the rounding of float32. Else
    importance ratios would not be 1 on policy.

    Args:
        model: what is trained.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        launch: how processes train together.
    """
    if isinstance(model, PeftModel):
        if launch.zero_stage == 3:
            return "weights are divided among processes (ZeRO-3 or FSDP)"
        if mixed_precision != "no":
            return f"passes are computed in {mixed_precision}, {SMALL_IS_LOST}"
    return merge_obstacle(model)


def check_wanted_merge(wanted: bool | None, obstacle: str | None) -> None:
    """Refuse `merge_adapter_for_rollout=True` where it cannot be done.

    Raises:
        ValueError: if it is wanted and there is an obstacle.
    """
    if wanted and obstacle is not None:
        raise ValueError(
            f"merge_adapter_for_rollout=True cannot be done: {obstacle}. Leave it out; rollouts then compute the "
            "adapter as training does."
        )


@dataclass(frozen=True)
class RolloutAdapter:
    """What is done to the adapter for a rollout, and undone after it.

    Args:
        merges: the adapter is added to its layers' weights.
        cast_to: the dtype that autocast computes in, to which the adapter's matrices are cast; `None` for no cast.
        obstacle: why it is not merged.
    """

    merges: bool = False
    cast_to: torch.dtype | None = None
    obstacle: str | None = None

    @classmethod
    def of(cls, trainer: Any, wanted: bool | None) -> RolloutAdapter:
        """Choose for a trainer that is set up.

        Args:
            trainer: any trainer of this library.
            wanted: `merge_adapter_for_rollout`; `None` to merge where nothing forbids it.

        Raises:
            ValueError: if it is wanted and cannot be done.
        """
        accelerator, launch = trainer.accelerator, Launch.of_trainer(trainer)
        precision = accelerator.mixed_precision
        obstacle = rollout_merge_obstacle(trainer.model, precision, launch) or product_obstacle(accelerator.device)
        check_wanted_merge(wanted, obstacle)
        if wanted is False:
            obstacle = "merge_adapter_for_rollout is off"
        # `native_amp` is accelerate's own autocast; DeepSpeed casts the weights themselves.
        autocast = accelerator.native_amp and launch.zero_stage < 3
        return cls(obstacle is None, _AUTOCAST.get(precision) if autocast else None, obstacle)

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Draw with the adapter of a model in this form; afterwards the model has the parameters it had.

        Args:
            model: outside of its wrappers.
        """
        if self.merges:
            with merged_adapter(model):
                yield
        elif self.cast_to is not None:
            with cast_adapter(model, self.cast_to):
                yield
        else:
            yield
