"""Continues completions for a `StepAwareReward` (SAPO) and adds the process reward to their advantages."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.credit.step_aware import group_success_rate
from trl_diffusion.credit.step_aware_states import probe_points, probe_state, settled
from trl_diffusion.family import DiffusionFamily
from trl_diffusion.runtime.rollouts import RolloutEngine
from trl_diffusion.runtime.texts import arguments_of_rewards, ignore
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators
from trl_diffusion.sampling.rollout import FinishedBatch, Rollout
from trl_diffusion.streams import Purpose, uniforms

# The state lies at a random fraction of the completion within these limits.
_FRACTIONS = (0.1, 0.9)


@dataclass(frozen=True)
class Probed:
    """Process rewards of one rollout.

    Args:
        advantages: [B], of this process's completions, with the process reward.
        process_rewards: one per completion of all processes, `None` for those not probed.
        metrics: by name.
        forward_units: that the continuations cost all processes.
    """

    advantages: torch.Tensor
    process_rewards: list[float | None]
    metrics: dict[str, float]
    forward_units: float


@dataclass(frozen=True)
class StepAwareProbe:
    """Measures process rewards during training.

    Args:
        settings: the step-aware reward.
        index: place of the `StepAwareReward` among the reward functions.
        family: of the model.
        sampling: how completions are sampled, and so how they are continued.
        tokenizer: decodes continuations.
        accelerator: of the run.
    """

    settings: StepAwareReward
    index: int
    family: DiffusionFamily
    sampling: SamplingConfig
    tokenizer: Any
    accelerator: Accelerator

    @classmethod
    def of(cls, reward_functions: Sequence, tokenizer: Any, **values: Any) -> StepAwareProbe | None:
        """The probe for the step-aware reward among a trainer's reward functions, if there is one.

        Raises:
            ValueError: if there are several, or the tokenizer parses completions into something that is not plain
                text.
        """
        found = [(reward, i) for i, reward in enumerate(reward_functions) if isinstance(reward, StepAwareReward)]
        if not found:
            return None
        if any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema")):
            raise ValueError(
                f"{type(tokenizer).__name__} parses completions into structured messages; StepAwareReward judges "
                "continuations as plain text. Remove the tokenizer's response template."
            )
        if len(found) > 1:
            raise ValueError(
                f"{len(found)} of the reward functions are StepAwareReward; which one defines success is unclear. "
                "Wrap one function and pass the others as they are."
            )
        return cls(*found[0], tokenizer=tokenizer, **values)

    def measure(self, rollout: Rollout, advantages: torch.Tensor, engine: RolloutEngine, trainer_state: Any) -> Probed:
        """Continue completions and measure how often that succeeds.

        Args:
            rollout: the completions and their rewards.
            advantages: [B], the method's own; NaN for a completion without a reward.
            engine: the policy.
            trainer_state: transformers' state of the run, which reward functions are given.
        """
        start = time.perf_counter()
        settings, group, finished = self.settings, rollout.group_size, rollout.finished
        rewards = rollout.own(finished.rewards[:, self.index])
        success = self._finished_success(finished, rewards, trainer_state)
        all_success = rollout.gather(success)
        baseline = rollout.own(group_success_rate(all_success, group, settings.leave_one_out))

        # Subtracting the mean of equal rewards leaves rounding noise; such groups are ties.
        groups = finished.rewards.view(-1, group, finished.rewards.size(1))
        scored = ~groups.isnan().all(2, keepdim=True)
        groups = groups.nan_to_num()
        highest, lowest = (groups.masked_fill(~scored, limit) for limit in (-torch.inf, torch.inf))
        tied = rollout.own((highest.amax(1) <= lowest.amin(1)).all(1).repeat_interleave(group))
        probed = settings.probed(advantages.masked_fill(tied, 0.0), success)
        probed &= rollout.trainable
        if settings.baseline == "group":
            probed &= ~baseline.isnan()  # nobody left to compare with
        continuations = _Continuations(self, rollout, engine, trainer_state)
        process_reward = continuations.process_reward(probed, success, baseline)
        all_rewards = rollout.gather(process_reward)
        advantages = rollout.own(settings.advantages(rollout.gather(advantages), all_rewards, group))
        metrics = self._metrics(all_rewards, all_success, continuations)
        metrics["step_aware/seconds"] = time.perf_counter() - start
        listed = [None if math.isnan(value) else value for value in all_rewards.tolist()]
        return Probed(advantages, listed, metrics, metrics["step_aware/forward_units"])

    def forwards_at_most(self) -> int:
        """Forward passes per completion if every one is continued, on whole canvases."""
        config, settings = self.sampling, self.settings
        steps = config.denoising_steps
        if settings.state != "keep":
            # masks that begin inside of a block (`prefix`) reach into one more
            blocks = -(-settings.num_mask_tokens // config.block_length) + (settings.state == "prefix")
            steps = min(steps, blocks * config.steps_per_block)
        return steps * settings.num_rollouts * (2 if settings.baseline == "earlier_state" else 1)

    def _finished_success(self, finished: FinishedBatch, rewards: torch.Tensor, trainer_state: Any) -> torch.Tensor:
        """Success of the finished texts, float64 [B], from rewards that TRL has computed; NaN if it is unknown."""
        known = [None if math.isnan(reward) else reward for reward in rewards.tolist()]
        success = self.settings.successes(
            finished.prompts,
            finished.completions,
            rewards=known,
            completion_ids=finished.completion_ids,
            **finished.columns(list(range(len(known)))),
            trainer_state=trainer_state,
            log_extra=ignore,
            log_metric=ignore,
        )
        return success.to(self.accelerator.device)

    def _metrics(self, process_reward, success, continuations: _Continuations) -> dict[str, float]:
        probed = ~process_reward.isnan()
        counts = torch.tensor([continuations.units, continuations.rows], device=process_reward.device)
        units, rows = self.accelerator.reduce(counts, reduction="sum").tolist()
        found = {
            "step_aware/probed_share": probed.double().mean().item(),
            "step_aware/success_rate": success.nanmean().item(),
            "step_aware/forward_units": units,
            "step_aware/continuations": rows,
            "step_aware/sync_forwards": continuations.sync_forwards,
        }
        if probed.any():
            values = process_reward[probed]
            found["step_aware/process_reward_mean"] = values.mean().item()
            found["step_aware/process_reward_std"] = values.std(correction=0).item()
            pair = torch.stack([values, success[probed]])
            # Probing only what succeeded leaves nothing to correlate with.
            if (pair.std(1, correction=0) > 0).all():
                found["step_aware/success_correlation"] = torch.corrcoef(pair)[0, 1].item()
        return found


class _Continuations:
    """The continuations of one rollout batch, and what they cost this process."""

    def __init__(self, probe: StepAwareProbe, rollout: Rollout, engine: RolloutEngine, trainer_state: Any):
        self.probe, self.settings, self.engine, self.trainer_state = probe, probe.settings, engine, trainer_state
        self.rollout, self.trajectory, self.finished = rollout, rollout.trajectory, rollout.finished
        self.config = dataclasses.replace(probe.sampling, record_signals=False, shift_window=None)
        self.units, self.rows, self.sync_forwards = 0.0, 0, 0

    def process_reward(self, probed: torch.Tensor, success: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
        """R [B], NaN for completions that are not probed or have no state between the empty canvas and their end."""
        fractions = self._fractions()
        family, kind, block = self.probe.family, self.settings.state, self.config.block_length
        low, high = _FRACTIONS
        points = probe_points(
            self.trajectory, family, kind, block, low + (high - low) * fractions[:, 0], self.rollout.prompt_tail
        )
        reached = self._success_rates(probed & (points > 0), points, success, which=0)
        if self.settings.baseline == "earlier_state":
            earlier = (fractions[:, 1] * points).floor().long()
            before = self._success_rates(probed & (earlier > 0), earlier, success, which=1)
            baseline = torch.where(earlier > 0, before, baseline)
        return reached - baseline

    def _fractions(self) -> torch.Tensor:
        """Uniform draws [B, 2], shared by a group or not, the same on every process."""
        keys = self.rollout.global_rows
        if self.settings.state_shared_by == "group":
            keys = keys // self.rollout.group_size
        key = (Purpose.PROBE_STATE, self.rollout.number)
        generators = row_generators(self.rollout.seed, *key, rows=keys.tolist())
        return uniforms(generators, 2).to(keys.device)

    def _success_rates(self, asked: torch.Tensor, points, success: torch.Tensor, which: int) -> torch.Tensor:
        """Success rates [B] of N continuations each from the completions' own states, NaN where not asked for."""
        settings, family = self.settings, self.probe.family
        state = probe_state(
            self.trajectory,
            family,
            settings.state,
            self.config.block_length,
            points,
            settings.num_mask_tokens,
            self.rollout.prompt_tail,
        )
        known = settled(state, family)
        rates = torch.where(asked & known, success, torch.full_like(success, float("nan")))
        chosen = (asked & ~known).nonzero().squeeze(1)
        count = settings.num_rollouts
        drawn = self._continue(chosen.repeat_interleave(count), state, which)
        if len(chosen):
            # A continuation whose success cannot be told is left out.
            rates[chosen] = drawn.view(-1, count).nanmean(1)
        return rates

    def _continue(self, rows: torch.Tensor, state: CanvasState, which: int) -> torch.Tensor:
        """Success, float64 [R], of one continuation for each of the `rows` (each stands N times)."""
        most = int(self.rollout.gather(torch.tensor([len(rows)], device=rows.device)).max())
        drawn = []
        if most > 0:
            with self.engine.policy() as model:
                size = len(self.rollout.global_rows)
                # Where weights are sharded, a process without rows left runs the forwards of the others.
                for start in range(0, most if self.engine.sharded else len(rows), size):
                    drawn.append(self._sample(model, rows, slice(start, start + size), state, which))
        if len(rows) == 0:
            return torch.zeros(0, dtype=torch.float64, device=rows.device)
        return self._judge(rows, torch.cat(drawn))

    def _sample(self, model, rows: torch.Tensor, part: slice, state: CanvasState, which: int) -> torch.Tensor:
        """Canvases [r, L] continued from the states of a part of the rows; a part may be empty."""
        count = self.settings.num_rollouts
        own = rows[part]
        repeat = torch.arange(len(rows), device=rows.device)[part] % count
        streams = (self.rollout.global_rows[own] * count + repeat).tolist()
        start = CanvasState(state.canvas[own], state.length[own])
        if len(own) == 0:
            own, streams = rows.new_zeros(1), [0]
            start = CanvasState(self.trajectory.completion_ids[:1], state.length[:1])  # finished: never written to
        key = (Purpose.PROBE_ROLLOUT, self.rollout.number, which)
        prompt_mask = self.rollout.prompt_mask[own]
        trajectory = self.engine.sample(
            model,
            self.rollout.prompt_ids[own],
            prompt_mask,
            self.config,
            row_generators(self.rollout.seed, *key, rows=streams),
            start,
        )
        prompts = prompt_mask.sum(1)
        share = (prompts + start.length) / (prompts + self.config.canvas_length)
        self.units += (trajectory.row_units * share).sum().item()
        self.sync_forwards += trajectory.sync_forwards
        self.rows += len(rows[part])
        return trajectory.completion_ids[: len(rows[part])]

    def _judge(self, rows: torch.Tensor, canvases: torch.Tensor) -> torch.Tensor:
        """Success of continued canvases [R, L], as the reward and success functions see it."""
        probe = self.probe
        texts = arguments_of_rewards(
            rows.tolist(), canvases, self.finished, probe.family, probe.tokenizer, self.trainer_state
        )
        return self.settings.successes(**texts).to(rows.device)
