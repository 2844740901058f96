"""The policy as it is being trained, ready to sample; shared by rollouts and by SAPO's continuations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from trl.models import unwrap_model_for_generation

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.runtime.rollout_adapter import RolloutAdapter
from trl_diffusion.runtime.zero3 import finish_trace
from trl_diffusion.sampling import CanvasState, SamplingConfig, Trajectory, sample


@dataclass(frozen=True)
class RolloutEngine:
    """The policy inside of its wrappers, and how to get at it.

    Args:
        accelerator: of the run.
        model_wrapped: the policy inside of its wrappers.
        summon: TRL's `summon_full_params` for the backend.
        gather: whether ZeRO-3 gathers all weights before sampling.
        checkpointing: `gradient_checkpointing_kwargs`, with which checkpointing is put back on.
        sharded: weights stay sharded while sampling, so that all processes must run the same number of forwards.
        adapter: how the adapter is computed while sampling.
    """

    accelerator: Accelerator
    model_wrapped: Any
    summon: Callable
    gather: bool
    checkpointing: dict[str, Any] | None
    sharded: bool
    adapter: RolloutAdapter

    @contextmanager
    def policy(self) -> Iterator[Any]:
        """The network to sample with, without autograd and checkpointing, its adapter as `adapter` says."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.gather,
                gradient_checkpointing_kwargs=self.checkpointing,
            ) as model,
            torch.no_grad(),
            self.summon(self.model_wrapped, recurse=False),
        ):
            if not self.sharded:
                finish_trace(self.accelerator, model)
            with self.adapter.on(model):
                yield model

    def sample(
        self,
        model: Any,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        config: SamplingConfig,
        generators: Sequence[np.random.Generator],
        state: CanvasState | None = None,
        bounds: torch.Tensor | None = None,
    ) -> Trajectory:
        """Write canvases; see `trl_diffusion.sampling.sample`.

        Args:
            model: what `policy` yields.
            prompt_ids: long [B, P], left-padded.
            prompt_mask: [B, P].
            config: how.
            generators: a private stream for every row.
            state: partly denoised canvases to continue; all masked if not given.
            bounds: float [B], an entropy bound for each row; that of the config if not given.
        """
        together = self._any_process if self.sharded else None
        return sample(
            model, prompt_ids, prompt_mask, config, generators, any_process=together, state=state, bounds=bounds
        )

    def _any_process(self, here: bool) -> bool:
        return bool(self.accelerator.gather(torch.tensor([here], device=self.accelerator.device)).any())


@dataclass(frozen=True)
class RolloutFigures:
    """Metrics of a rollout over all processes.

    Args:
        metrics: by name.
        forward_units: passes that the rollout took on all processes.
    """

    metrics: dict[str, float]
    forward_units: float

    @classmethod
    def of(
        cls, trajectory: Trajectory, family: DiffusionFamily, accelerator: Accelerator, seconds: float
    ) -> RolloutFigures:
        """Reduce the figures of this process's completions with those of the others."""
        sampled = trajectory.unmask_step >= 0
        statistics = torch.stack(
            [
                trajectory.row_forwards.sum().float(),
                sampled.sum().float(),
                (family.is_end(trajectory.completion_ids) & sampled).sum().float(),
                torch.tensor(float(len(sampled)), device=sampled.device),
                family.is_end(trajectory.completion_ids[:, 0]).sum().float(),
                trajectory.row_units.sum(),
            ]
        )
        steps, tokens, ends, rows, empty, units = accelerator.reduce(statistics, reduction="sum").tolist()
        metrics = {
            "rollout/denoising_steps": steps / rows,
            "rollout/tokens_per_forward": tokens / steps,
            "rollout/eos_share": ends / tokens,
            "rollout/seconds": seconds,
            "completions/empty_share": empty / rows,
        }
        return cls(metrics, units)
