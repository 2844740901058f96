"""The record of a rollout: the completions, and the steps in which they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass
class Trajectory:
    """Completions of B prompts on a canvas of L positions, drawn in S denoising steps.

    Where blocks are counted from the start of the sequence, a completion can begin and end inside a block. It then
    lies on one block more than L positions fill, and S is larger by the steps of a block (`SamplingConfig.on_grid`).

    Args:
        completion_ids: long [B, L], the whole canvas. After the block that ended a text it holds the tail id.
        unmask_step: int [B, L], u_i, the step in 0..S-1 that committed position i; -1 where the canvas was filled
            without sampling.
        logps: float32 [B, L], log-probability of each committed token under the behaviour policy: at the sampling
            temperature and support, given the canvas before its step (at temperature 0: temperature 1). 0 where
            nothing was sampled.
        entropies: float32 [B, L], entropy in nats of the distribution each token was drawn from.
        support: int32 [B, L, top_k], ids that each token was drawn from, -1 for none; `None` for the full vocabulary,
            and where `record_support` was off.
        temperature: the sampling temperature. A greedy trajectory (0) is scored again at temperature 1.
        step_entropy: float32 [B, S], mean entropy in nats over the positions the sampler could commit at a step, at
            temperature 1 on the full vocabulary; 0 where no step was taken; `None` unless asked for.
        step_margin: float32 [B, S], mean of p1 - p2 (the two largest probabilities) over the same positions.
        row_forwards: long [B], denoising steps, of one network evaluation each, that each completion took part in.
        row_units: float32 [B], the network evaluations of each completion, each counted by the share of the columns of
            prompt and canvas that it computed. A forward over the prompt alone is among them.
        forwards: network evaluations run for this batch, the same for every process where weights stay sharded.
        sync_forwards: those among them that no row of this process needed; they keep the processes in step.
        prompt_columns: long [B], columns of the prompts, padding included, in the forwards that wrote each row; `None`
            if they are not known.
        confidence_shift: float32 [B, L], how far a token shifted the network's confidence at masked positions near it
            (see `ShiftRecorder`); -1 where no later step of its block shows it; `None` unless asked for.
        given: bool [B, L], text that was put on the canvas beforehand: shown in every view, never a target; `None` for
            none.
        forced: bool [B, S], steps at which fewer positions reached the confidence threshold (or entropy bound) than
            the schedule demands, so that others committed; `None` without one.
        position_logps: float32 [B, L], log-probability of choosing each committed position after those that its step
            chose before it, 0 where nothing was sampled; `None` if positions are not drawn (`plackett_luce` draws
            them).
        position_ranks: int32 [B, L], how many positions its step chose before each one; `None` likewise.
        settled_step: int32 [B, L], the step of a position's block since which its token had been the likeliest there
            when it was committed; the step after that if it was not. -1 where nothing was sampled; `None` like the
            signals.
    """

    completion_ids: torch.Tensor
    unmask_step: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor
    support: torch.Tensor | None
    temperature: float
    step_entropy: torch.Tensor | None
    step_margin: torch.Tensor | None
    row_forwards: torch.Tensor
    row_units: torch.Tensor
    forwards: int
    sync_forwards: int
    prompt_columns: torch.Tensor | None = None
    confidence_shift: torch.Tensor | None = None
    given: torch.Tensor | None = None
    forced: torch.Tensor | None = None
    position_logps: torch.Tensor | None = None
    position_ranks: torch.Tensor | None = None
    settled_step: torch.Tensor | None = None

    @classmethod
    def gather(cls, parts: Sequence[Trajectory], rows: torch.Tensor) -> Trajectory:
        """Merge the trajectories of completions that were drawn apart.

        Args:
            parts: at least one.
            rows: long [B], the row of the result for each completion of the parts, one part after the other.
        """
        if len(parts) == 1:
            return parts[0]
        merged: dict[str, Any] = {}
        for name, value in vars(parts[0]).items():
            values = [vars(part)[name] for part in parts]
            if isinstance(value, torch.Tensor):
                merged[name] = torch.cat(values)[rows.argsort()]
            else:
                merged[name] = sum(values) if name in ("forwards", "sync_forwards") else value
        return cls(**merged)

    def cut(self, length: int) -> Trajectory:
        """Return the trajectory of the first `length` positions of the canvas."""
        return replace(self, **{name: value[:, :length] for name, value in self.of_positions().items()})

    def of_positions(self) -> dict[str, Any]:
        """Return what is recorded of each position of the canvas, [B, L, …] by name."""
        names = (
            *("completion_ids", "unmask_step", "logps", "entropies", "support", "confidence_shift", "given"),
            *("position_logps", "position_ranks", "settled_step"),
        )
        return {name: value for name in names if (value := vars(self)[name]) is not None}

    @property
    def steps_taken(self) -> torch.Tensor:
        """Long [B], the step after the last one that each completion took, 0 if it took none.

        With parallel unmasking some steps before it were not taken; `row_forwards` counts those that were.
        """
        return self.unmask_step.max(1).values.long() + 1


def taken_steps(unmask_step: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The denoising steps that committed a token, bool [B, S].

    Parallel unmasking may finish a block before its last step, so there can be gaps.

    Args:
        unmask_step: int [B, L], -1 where nothing was sampled.
        num_steps: S.
    """
    taken = torch.zeros(len(unmask_step), num_steps + 1, dtype=torch.bool, device=unmask_step.device)
    return taken.scatter(1, unmask_step.long() + 1, True)[:, 1:]
