"""What a trainer does with a `StepAwareReward`: continue completions, and add the process reward to the advantages."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl.data_utils import is_conversational
from trl.models import unwrap_model_for_generation

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.credit.probe_states import probe_points, probe_state, settled
from trl_diffusion.credit.step_aware import group_success_rate
from trl_diffusion.sampling import CanvasState, Trajectory, row_generators, sample
from trl_diffusion.sampling.noise import uniforms
from trl_diffusion.trainers.random_streams import PROBE_ROLLOUT, PROBE_STATE
from trl_diffusion.trainers.zero3 import finish_trace

if TYPE_CHECKING:
    from trl_diffusion.trainers.diffusion_grpo import DiffusionGRPOTrainer

# The state lies at a random fraction of the completion within these limits.
_FRACTIONS = (0.1, 0.9)


@dataclass
class FinishedBatch:
    """This process's completions as the reward functions saw them.

    Args:
        inputs: B rows of the data set.
        prompts: B prompts.
        completions: B completions.
        completion_ids: their token ids, cut behind the first end token.
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


class StepAwareProbe:
    """Measures process rewards during training.

    Args:
        trainer: whose rollouts are probed.
        settings: the step-aware reward.
        index: place of the `StepAwareReward` among its reward functions.
    """

    def __init__(self, trainer: DiffusionGRPOTrainer, settings: StepAwareReward, index: int):
        self.trainer, self.settings, self.index = trainer, settings, index

    @classmethod
    def of(cls, trainer: DiffusionGRPOTrainer) -> StepAwareProbe | None:
        """The probe of a trainer, if one of its rewards is step-aware.

        Raises:
            ValueError: if several are, or the tokenizer parses completions into something that is not plain text.
        """
        found = [(reward, i) for i, reward in enumerate(trainer.reward_funcs) if isinstance(reward, StepAwareReward)]
        if not found:
            return None
        tokenizer = trainer._tokenizer
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
        return cls(trainer, *found[0])

    def advantages(
        self, rows: dict[str, torch.Tensor], trajectory: Trajectory, finished: FinishedBatch, rollout: int
    ) -> torch.Tensor:
        """Advantages [B] of this process's completions, with the process reward.

        Args:
            rows: `prompt_ids` and `prompt_mask` [B, P], `advantages` and `global_row` [B].
            trajectory: of the completions.
            finished: the completions and their rewards.
            rollout: number of the rollout, for the random streams.
        """
        start = time.perf_counter()
        trainer, settings = self.trainer, self.settings
        accelerator, group = trainer.accelerator, trainer.group_size("train")
        mine = trainer._own_rows(len(finished.prompts))
        success = self._finished_success(finished, finished.rewards[mine, self.index])
        all_success, all_advantages = accelerator.gather((success, rows["advantages"]))
        baseline = group_success_rate(all_success, group, settings.leave_one_out)[mine]

        # The mean of equal rewards can be off in its last bit; that is no advantage.
        groups = finished.rewards.view(-1, group, finished.rewards.size(1))
        scored = ~groups.isnan().all(2, keepdim=True)
        groups = groups.nan_to_num()
        highest, lowest = (groups.masked_fill(~scored, limit) for limit in (-torch.inf, torch.inf))
        tied = (highest.amax(1) <= lowest.amin(1)).all(1).repeat_interleave(group)[mine]
        probed = settings.probed(rows["advantages"].masked_fill(tied, 0.0), success)
        # TRL empties the mask of a completion that `mask_truncated_completions` drops.
        probed &= rows["completion_mask"].any(1)
        if settings.baseline == "group":
            probed &= ~baseline.isnan()  # nobody left to compare with
        continuations = _Continuations(self, rows, trajectory, finished, rollout)
        process_reward = continuations.process_reward(probed, success, baseline)
        all_rewards = accelerator.gather(process_reward)
        self._log(all_rewards, all_success, continuations, time.perf_counter() - start)
        return settings.advantages(all_advantages, all_rewards, group)[mine]

    def forwards_at_most(self) -> int:
        """Forward passes per completion if every one is continued, on whole canvases."""
        config, settings = self.trainer.args.sampling_config(), self.settings
        steps = config.denoising_steps
        if settings.state != "keep":
            # masks that begin inside of a block (`prefix`) reach into one more
            blocks = -(-settings.num_mask_tokens // config.block_length) + (settings.state == "prefix")
            steps = min(steps, blocks * config.steps_per_block)
        return steps * settings.num_rollouts * (2 if settings.baseline == "earlier_state" else 1)

    def not_probed(self, finished: FinishedBatch) -> None:
        """Keep the column of process rewards in line with the others when completions of an evaluation are logged."""
        logs: Any = self.trainer._logs
        logs["extra"]["process_reward"].extend([None] * len(finished.rewards))

    def _finished_success(self, finished: FinishedBatch, rewards: torch.Tensor) -> torch.Tensor:
        """Success of the finished texts, float64 [B], from rewards that TRL has computed."""
        known = [None if math.isnan(reward) else reward for reward in rewards.tolist()]
        columns = finished.columns(list(range(len(known))))
        return self.success(finished.prompts, finished.completions, finished.completion_ids, columns, known)

    def success(self, prompts, completions, completion_ids, columns, rewards=None) -> torch.Tensor:
        """Success of completions, float64 on the trainer's device; NaN if it cannot be told."""
        success = self.settings.successes(
            prompts,
            completions,
            rewards=rewards,
            completion_ids=completion_ids,
            **columns,
            trainer_state=self.trainer.state,
            # What a reward function logs is about the finished texts, one entry each.
            log_extra=_ignore,
            log_metric=_ignore,
        )
        return success.to(self.trainer.accelerator.device)

    def _log(self, process_reward, success, continuations: _Continuations, seconds: float) -> None:
        trainer = self.trainer
        metrics = trainer._metrics["train"]
        probed = ~process_reward.isnan()
        metrics["step_aware/probed_share"].append(probed.double().mean().item())
        metrics["step_aware/success_rate"].append(success.nanmean().item())
        counts = torch.tensor([continuations.units, continuations.rows], device=process_reward.device)
        units, rows = trainer.accelerator.reduce(counts, reduction="sum").tolist()
        metrics["step_aware/forward_units"].append(units)
        metrics["step_aware/continuations"].append(rows)
        metrics["step_aware/sync_forwards"].append(continuations.sync_forwards)
        metrics["step_aware/seconds"].append(seconds)
        trainer.count_forwards(units)
        if probed.any():
            values = process_reward[probed]
            metrics["step_aware/process_reward_mean"].append(values.mean().item())
            metrics["step_aware/process_reward_std"].append(values.std(correction=0).item())
            pair = torch.stack([values, success[probed]])
            # Probing only what succeeded leaves nothing to correlate with.
            if (pair.std(1, correction=0) > 0).all():
                metrics["step_aware/success_correlation"].append(torch.corrcoef(pair)[0, 1].item())
        logs: Any = trainer._logs
        logs["extra"]["process_reward"].extend(
            None if math.isnan(value) else value for value in process_reward.tolist()
        )


class _Continuations:
    """The continuations of one rollout batch, and what they cost this process."""

    def __init__(self, probe: StepAwareProbe, rows, trajectory: Trajectory, finished: FinishedBatch, rollout: int):
        self.probe, self.trainer, self.settings = probe, probe.trainer, probe.settings
        self.batch, self.trajectory, self.finished, self.rollout = rows, trajectory, finished, rollout
        self.config = dataclasses.replace(self.trainer.args.sampling_config(), record_signals=False)
        self.units, self.rows, self.sync_forwards = 0.0, 0, 0

    def process_reward(self, probed: torch.Tensor, success: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
        """R [B], NaN for completions that are not probed or have no state between the empty canvas and their end."""
        fractions = self._fractions()
        family, kind, block = self.trainer.family, self.settings.state, self.config.block_length
        low, high = _FRACTIONS
        points = probe_points(self.trajectory, family, kind, block, low + (high - low) * fractions[:, 0])
        reached = self._success_rates(probed & (points > 0), points, success, which=0)
        if self.settings.baseline == "earlier_state":
            earlier = (fractions[:, 1] * points).floor().long()
            before = self._success_rates(probed & (earlier > 0), earlier, success, which=1)
            baseline = torch.where(earlier > 0, before, baseline)
        return reached - baseline

    def _fractions(self) -> torch.Tensor:
        """Uniform draws [B, 2], shared by a group or not, the same on every process."""
        keys = self.batch["global_row"]
        if self.settings.state_shared_by == "group":
            keys = keys // self.trainer.group_size("train")
        generators = row_generators(self.trainer.args.seed, PROBE_STATE, self.rollout, rows=keys.tolist())
        return uniforms(generators, 2).to(keys.device)

    def _success_rates(self, asked: torch.Tensor, points, success: torch.Tensor, which: int) -> torch.Tensor:
        """Success rates [B] of N continuations each from the completions' own states, NaN where not asked for."""
        trainer, settings = self.trainer, self.settings
        state = probe_state(
            self.trajectory,
            trainer.family,
            settings.state,
            self.config.block_length,
            points,
            settings.num_mask_tokens,
        )
        known = settled(state, trainer.family)
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
        trainer = self.trainer
        lockstep = trainer._any_process() is not None
        most = int(trainer.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).max())
        drawn = []
        if most > 0:
            with (
                unwrap_model_for_generation(
                    trainer.model_wrapped,
                    trainer.accelerator,
                    gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                    gradient_checkpointing_kwargs=trainer._checkpointing_kwargs,
                ) as model,
                torch.no_grad(),
                trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
            ):
                if not lockstep:
                    finish_trace(trainer, model)
                size = len(self.batch["global_row"])
                # Where weights are sharded, a process without rows left runs the forwards of the others.
                for start in range(0, most if lockstep else len(rows), size):
                    drawn.append(self._sample(model, rows, slice(start, start + size), state, which))
        if len(rows) == 0:
            return torch.zeros(0, dtype=torch.float64, device=rows.device)
        return self._judge(rows, torch.cat(drawn))

    def _sample(self, model, rows: torch.Tensor, part: slice, state: CanvasState, which: int) -> torch.Tensor:
        """Canvases [r, L] continued from the states of a part of the rows; a part may be empty."""
        count = self.settings.num_rollouts
        own = rows[part]
        repeat = torch.arange(len(rows), device=rows.device)[part] % count
        streams = (self.batch["global_row"][own] * count + repeat).tolist()
        start = CanvasState(state.canvas[own], state.length[own])
        if len(own) == 0:
            own, streams = rows.new_zeros(1), [0]
            start = CanvasState(self.trajectory.completion_ids[:1], state.length[:1])  # finished: never written to
        trajectory = sample(
            model,
            self.batch["prompt_ids"][own],
            self.batch["prompt_mask"][own],
            self.config,
            row_generators(self.trainer.args.seed, PROBE_ROLLOUT, self.rollout, which, rows=streams),
            any_process=self.trainer._any_process(),
            state=start,
        )
        prompts = self.batch["prompt_mask"][own].sum(1)
        share = (prompts + start.length) / (prompts + self.config.canvas_length)
        self.units += (trajectory.row_units * share).sum().item()
        self.sync_forwards += trajectory.sync_forwards
        self.rows += len(rows[part])
        return trajectory.completion_ids[: len(rows[part])]

    def _judge(self, rows: torch.Tensor, canvases: torch.Tensor) -> torch.Tensor:
        """Success of continued canvases [R, L], as the reward and success functions see it."""
        lengths = self.trainer.family.effective_length(canvases).tolist()
        completion_ids = [ids[:n] for ids, n in zip(canvases.tolist(), lengths, strict=True)]
        texts = [str(self.trainer._tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids]
        index = rows.tolist()
        prompts = [self.finished.prompts[row] for row in index]
        conversational = is_conversational({"prompt": prompts[0]})
        completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        return self.probe.success(prompts, completions, completion_ids, self.finished.columns(index))


def _ignore(*args, **kwargs) -> None:
    """In place of the logging that TRL offers to reward functions."""
