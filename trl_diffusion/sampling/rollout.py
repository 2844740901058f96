"""A rollout: completions of a batch of prompts, their rewards, and the random streams that belong to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.trajectory import Trajectory
from trl_diffusion.streams import Purpose, row_generators, uniforms


@dataclass(frozen=True)
class FinishedBatch:
    """This process's completions as the reward functions saw them.

    Args:
        inputs: B rows of the data set.
        prompts: B prompts.
        completions: B completions.
        completion_ids: their token ids, cut after the first end token.
        rewards: float [rows of all processes, reward functions], NaN for `None`.
    """

    inputs: list[dict[str, Any]]
    prompts: list
    completions: list
    completion_ids: list[list[int]]
    rewards: torch.Tensor

    def columns(self, rows: list[int]) -> dict[str, list]:
        """The data set's other columns, of some rows."""
        names = [name for name in dict(self.inputs[0]) if name not in ("prompt", "completion", "completion_ids")]
        return {name: [self.inputs[row][name] for row in rows] for name in names}


@dataclass(frozen=True)
class Rollout:
    """This process's B completions of one rollout, and all that credit and likelihood need to know about them.

    Args:
        mode: `"train"` or `"eval"`.
        number: rollouts of this mode before it.
        seed: of the run.
        updates: the inner updates that learn from it; one for an evaluation.
        group_size: G, completions per prompt.
        num_rows: R, completions of all processes.
        global_rows: long [B], index prompt · G + g of each completion among those of all processes.
        own_rows: where this process's rows lie in what `gather` returns.
        family: of the model.
        sampling: how the completions were drawn, on the grid of blocks that they lie on.
        prompt_ids: long [B, P], left-padded.
        prompt_mask: [B, P], 0 on the padding.
        trajectory: the completions and the denoising steps that wrote them.
        finished: texts and rewards.
        trainable: bool [B], completions that may learn.
        gather: concatenates a tensor's rows over all processes.
    """

    mode: str
    number: int
    seed: int
    updates: range
    group_size: int
    num_rows: int
    global_rows: torch.Tensor
    own_rows: slice
    family: DiffusionFamily
    sampling: SamplingConfig
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    trajectory: Trajectory
    finished: FinishedBatch
    trainable: torch.Tensor
    gather: Callable[[torch.Tensor], torch.Tensor]

    @property
    def device(self) -> torch.device:
        return self.global_rows.device

    @property
    def scored(self) -> torch.Tensor:
        """Bool [B], completions that some reward function gave a reward."""
        return self.own(~self.finished.rewards.isnan().all(1))

    @property
    def text(self) -> torch.Tensor:
        """Bool [B, L], tokens up to and including the first end token."""
        length = self.family.effective_length(self.trajectory.completion_ids).unsqueeze(1)
        return torch.arange(self.trajectory.completion_ids.size(1), device=length.device) < length

    @property
    def prompt_tail(self) -> torch.Tensor:
        """Long [B], tokens of each prompt that lie in the first block of its completion."""
        return self.family.prompt_tail(self.prompt_mask.sum(1))

    def own(self, gathered: torch.Tensor) -> torch.Tensor:
        """The rows [B, …] of this process among those of all."""
        return gathered[self.own_rows]

    def groups(self, values: torch.Tensor) -> torch.Tensor:
        """Values [B] of every process as whole prompt groups, [N, G]; a group may span processes."""
        return self.gather(values).view(-1, self.group_size)

    def own_of_groups(self, groups: torch.Tensor) -> torch.Tensor:
        """This process's values [B] of whole prompt groups [N, G]."""
        return self.own(groups.flatten())

    # ---------------------------------------------------------------- noise

    def view_noise(self, update: int) -> RowNoise:
        """Noise for the views of one inner update, with a private stream for every completion."""
        rows = self.global_rows.tolist()
        return RowNoise(row_generators(self.seed, self._views, self.number, update, rows=rows), self.device)

    def shared_noise(self, purpose: Purpose, update: int, count: int) -> RowNoise:
        """Noise for an inner update that is the same on every process, from `count` streams."""
        key = (purpose, self._views, self.number, update)
        return RowNoise(row_generators(self.seed, *key, rows=range(count)), self.device)

    @property
    def _views(self) -> Purpose:
        return Purpose.TRAIN_VIEWS if self.mode == "train" else Purpose.EVAL_VIEWS


@dataclass(frozen=True)
class RowNoise:
    """Uniform noise from one random stream per row. Each call goes on where the last one ended.

    Args:
        generators: one per row.
        device: of the noise.
    """

    generators: list[np.random.Generator]
    device: torch.device

    def uniform(self, *shape: int) -> torch.Tensor:
        """Float64 [rows, *shape] in [0, 1)."""
        return uniforms(self.generators, *shape).to(self.device)
