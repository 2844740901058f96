"""GRPO for diffusion language models: the base of every trainer here.

`DiffusionGRPOTrainer` is TRL's `GRPOTrainer` with two things replaced. Generation becomes diffusion sampling, which
records the whole trajectory. The autoregressive log-probability of a token becomes its log-probability in noised views
of the completion. A method is four choices: settings say how completions are drawn, and three values say the rest,

    credit      which weight each completion gets from the rewards of its prompt's group
    likelihood  in which noised views a completion is scored
    loss        what is minimised; by default TRL's own loss of token ratios

All the rest (rewards, clipping, KL, metrics, evaluation, logging) is TRL's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from rich.console import Console
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import get_config_model_id

from trl_diffusion.adapters.precision import (
    AdapterPrecision,
    load_to_train,
    native_peft_config,
    share_checkpointing_kwargs,
)
from trl_diffusion.adapters.renaming import is_adapter
from trl_diffusion.credit.group_credit import Credit
from trl_diffusion.credit.step_aware import PAPER as STEP_AWARE_PAPER
from trl_diffusion.family import family_of
from trl_diffusion.likelihood import Likelihood, Scores
from trl_diffusion.likelihood.base import Rows
from trl_diffusion.losses import Loss, LossInputs, TokenRatio
from trl_diffusion.papers import parts_of
from trl_diffusion.runtime.arguments import (
    check_adapter,
    check_arguments,
    check_eval_batch,
    check_load_arguments,
    check_model,
    check_prompts_fit,
    check_rollout_data,
    check_router_loss,
    check_trainable,
    named_eval_datasets,
    warn_of_eight_bit,
)
from trl_diffusion.runtime.card_method import Source, sources_of_methods
from trl_diffusion.runtime.cost import completion_cost, padded_length
from trl_diffusion.runtime.credit_assignment import CreditAssignment
from trl_diffusion.runtime.fusing import check_rollout_compile, fuse_models
from trl_diffusion.runtime.launch import check_backend, check_device_map
from trl_diffusion.runtime.loss_inputs import collect_loss_inputs
from trl_diffusion.runtime.meter import Meter
from trl_diffusion.runtime.model_card import ModelCards
from trl_diffusion.runtime.reference import ReferenceSource, reference_policy
from trl_diffusion.runtime.report import rollout_figures, startup_report
from trl_diffusion.runtime.reward_guard import RewardGuard
from trl_diffusion.runtime.rollout_adapter import RolloutAdapter
from trl_diffusion.runtime.rollout_checkpoints import RolloutCheckpoints
from trl_diffusion.runtime.rollouts import RolloutEngine, RolloutFigures
from trl_diffusion.runtime.run import CompletionCost, RolloutRun
from trl_diffusion.runtime.run_facts import Facts
from trl_diffusion.runtime.scoring import ViewScorer
from trl_diffusion.runtime.step_aware_probe import StepAwareProbe
from trl_diffusion.runtime.update_guard import GuardedUpdates
from trl_diffusion.runtime.view_credit import ViewCreditAssignment
from trl_diffusion.sampling import Trajectory, row_generators
from trl_diffusion.sampling.rollout import FinishedBatch, Rollout
from trl_diffusion.streams import Purpose
from trl_diffusion.tokenization import encode_prompt, left_pad
from trl_diffusion.trainers.base.choices import Choices, CreditChoice, check_composition
from trl_diffusion.trainers.base.config import DiffusionGRPOConfig
from trl_diffusion.trainers.base.luspo_hint import no_luspo_hint
from trl_diffusion.trainers.base.view_loop import ViewLoop


# `ViewLoop` stands on the far side of TRL's trainer, so that TRL's `training_step` calls it; see there.
class DiffusionGRPOTrainer(ModelCards, RolloutCheckpoints, GuardedUpdates, GRPOTrainer, ViewLoop):  # type: ignore[misc]
    """GRPO for diffusion language models, composed of a credit, a likelihood and a loss.

    A method overrides `credit`, `likelihood` and `loss`; or they are handed over, and then go before the method's own.
    A `StepAwareReward` (SAPO, 2510.01544) among the reward functions adds its process reward to the advantages of any
    method.

    Args:
        model: a path or hub id, also of an adapter, which is then trained further; a native diffusion language model,
            or a `PeftModel` around one.
        reward_funcs: as in TRL; at most one may be a `StepAwareReward`.
        args: a `DiffusionGRPOConfig`.
        train_dataset: as in TRL; a column `prompt` and whatever the reward functions need.
        eval_dataset: as in TRL.
        processing_class: the tokenizer; loaded with the model if not given.
        credit: a `Credit`, or a function from TRL's advantages [N, G] to the method's.
        likelihood: a `Likelihood`.
        loss: a `Loss`.
        **kwargs: the other arguments of TRL's `GRPOTrainer` (`peft_config`, `quantization_config`, `callbacks`,
            `optimizers`, `reward_processing_classes`). Tools, environments and rollout functions are refused.

    Raises:
        TypeError: if the model is not a diffusion language model, or `args` not a config of this library.
        ValueError: if something cannot work with diffusion sampling, the choices do not go together, or a column is
            missing.
    """

    _tag_names = ["trl", "trl_diffusion", "diffusion-grpo"]
    _name = "DiffusionGRPO"
    config_class: type[DiffusionGRPOConfig] = DiffusionGRPOConfig
    args: DiffusionGRPOConfig
    model: Any  # transformers types it as optional
    ref_model: Any

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: DiffusionGRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        credit: CreditChoice | None = None,
        likelihood: Likelihood | None = None,
        loss: Loss | None = None,
        **kwargs: Any,
    ):
        args = self._checked_arguments(model, args, processing_class, kwargs)
        check_rollout_data(args, train_dataset, eval_dataset, reward_funcs)
        if isinstance(model, str) and is_adapter(model):
            model = load_to_train(model, args, kwargs.pop("quantization_config", None))
            args.model_init_kwargs = None  # used; TRL warns where they come with a model
        check_model(model)
        check_adapter(model, kwargs.get("peft_config"))
        kwargs["peft_config"] = native_peft_config(kwargs.get("peft_config"), model, args.model_init_kwargs)
        adapter_precision = AdapterPrecision(model)
        self._choose(args, credit, likelihood, loss)

        needed = self.choices.loss.needs_reference(args) or self.choices.credit.needs_reference
        source = ReferenceSource.of(model, args, kwargs["peft_config"], needed)
        beta, sync_ref_model = args.beta, args.sync_ref_model
        source.arguments_for_trl(args)
        with no_luspo_hint():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        args.beta, args.sync_ref_model = beta, sync_ref_model
        # Without a reference model TRL must not look for one while it generates; its loss gets β from `_as_trl_reads`.
        self.beta = beta if self.choices.loss.needs_reference(args) else 0.0
        share_checkpointing_kwargs(args)
        copied = source.prepare(args, self.accelerator, self.is_deepspeed_enabled, self.is_fsdp_enabled)
        if copied is not None:
            self.ref_model = copied
            if args.sync_ref_model:
                self.add_callback(SyncRefModelCallback(ref_model=copied, accelerator=self.accelerator))

        check_trainable(self.model)
        adapter_precision.restore(self.model, args.deepspeed_plugin)
        self.family = family_of(self.model)
        self._check_loaded_model({"train_dataset": train_dataset} | named_eval_datasets(eval_dataset))
        fuse_models(args, self.model, self.ref_model)
        check_rollout_compile(self)
        self._set_up_rollouts()

    def _checked_arguments(self, model, args, processing_class, kwargs: dict[str, Any]) -> DiffusionGRPOConfig:
        """Refuse arguments that cannot work, before anything is loaded; return a copy of the config, to be changed."""
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, DiffusionGRPOConfig):
            raise TypeError(f"args must be a {self.config_class.__name__}, got {type(args).__name__}.")
        check_backend(args)
        check_arguments(processing_class, kwargs)
        check_load_arguments(args.model_init_kwargs)
        check_router_loss(args.router_aux_loss_coef)
        args = copy.copy(args)
        args.router_aux_loss_coef = 0.0  # `None` is the checkpoint's own coefficient for TRL
        return args

    def _choose(
        self,
        args: DiffusionGRPOConfig,
        credit: CreditChoice | None,
        likelihood: Likelihood | None,
        loss: Loss | None,
    ) -> None:
        """Take the choices that were handed over, and for the others the method's own."""
        self.args = args  # transformers sets it again; the choices read it
        check_composition(args, likelihood, loss)
        self._composed = any(choice is not None for choice in (credit, likelihood, loss))
        self.choices = Choices.of(
            self.credit() if credit is None else credit,
            self.likelihood() if likelihood is None else likelihood,
            self.loss() if loss is None else loss,
            args,
        )
        args.record_signals |= self.choices.likelihood.needs_signals or self.choices.credit.needs_signals
        args.shift_window = self.choices.likelihood.shift_window

    def _check_loaded_model(self, datasets: dict[str, Any]) -> None:
        """Refuse a model that cannot be sampled or scored with these settings, and prompts too long for it."""
        args = self.args
        check_device_map(self.model)
        self.choices.likelihood.check_family(self.family, self._name)
        args.sampling_config().check_family(self.family)
        warn_of_eight_bit(self.model)
        check_prompts_fit(
            self.model, args.max_completion_length, datasets, lambda prompts: self._tokenize_prompts(prompts)[0]
        )
        self.check_update_policy()

    def _set_up_rollouts(self) -> None:
        """Make what draws, judges and scores completions, and what is remembered between updates."""
        args = self.args
        self.eos_token_ids = sorted({*self.family.end_token_ids, self._tokenizer.eos_token_id})
        self._checkpointing_kwargs: Any = args.gradient_checkpointing_kwargs
        self.rollout_adapter = RolloutAdapter.of(self, args.merge_adapter_for_rollout)
        self.meter = Meter(self.accelerator, self._metrics)
        self.scorer = ViewScorer(
            self.accelerator,
            self.family.mask_token_id,
            self.temperature,
            args.per_device_train_batch_size,
            self._checkpointing_kwargs,
        )
        self._credit = CreditAssignment(self.choices.credit, self._logps, self.accelerator.gather)
        self._reward_guard = RewardGuard(args, self.accelerator)
        self.reward_funcs = [self._reward_guard.wrap(function) for function in self.reward_funcs]
        self._view_credit = ViewCreditAssignment(
            self.choices.credit,
            self.choices.likelihood,
            self.reward_funcs,
            self.reward_weights,
            self.family,
            self._tokenizer,
        )
        self._probe = StepAwareProbe.of(
            self.reward_funcs,
            self._tokenizer,
            family=self.family,
            sampling=args.sampling_config(),
            accelerator=self.accelerator,
        )
        self._rollouts = {"train": 0, "eval": 0}  # drawn so far; the number is part of a stream's key
        self.last_rollout: tuple[Trajectory, FinishedBatch] | None = None
        # TRL calls three hooks for a rollout, to which the first two hand over what they made.
        self._trajectory: Trajectory | None = None
        self._finished: FinishedBatch | None = None
        self._scored: Scores | None = None  # handed to TRL's loss, see `_as_trl_reads`
        self._window_rows: Rows | None = None  # of the views of one update, see `ViewLoop`
        self._unshown_completions = False

    # ---------------------------------------------------------------- choices

    def credit(self) -> CreditChoice:
        """Return the method's credit; by default TRL's advantages."""
        return Credit()

    def likelihood(self) -> Likelihood:
        """Return the method's likelihood."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say in which views completions are scored. Pass `likelihood=`, for "
            "example MaskedViews(FullMask()), or take the trainer of a method."
        )

    def loss(self) -> Loss:
        """Return the method's loss; by default TRL's loss of token ratios."""
        return TokenRatio()

    # ---------------------------------------------------------------- start

    def train(self, *args, **kwargs):
        """Train as TRL does; with the progress bar (`disable_tqdm=False`) print the start-up report first."""
        if not self.args.disable_tqdm:
            self.print_report()
        return super().train(*args, **kwargs)

    def print_report(self) -> None:
        """Print the start-up report, on the main process only."""
        if self.accelerator.is_main_process:
            Console().print(startup_report(self.as_run()))

    figures = staticmethod(rollout_figures)  # what a report is made of, from the values below

    def as_run(self) -> RolloutRun:
        """Return the values from which the start-up report and the estimates of cost are computed."""
        return RolloutRun.of(
            self,
            self.family,
            reference=self.ref_model,
            compares=self.args.beta != 0.0,
            group=self.group_size("train"),
            prompt_length=self.prompt_length(),
            completion=self.completion_cost(),
            views=self.choices.likelihood.num_views,
            backwards=self.num_backwards(),
            choices=self.card_choices(),
            step_aware=self._probe is not None,
            rewards=tuple(zip(self.reward_func_names, self.args.reward_weights or repeat(1.0), strict=False)),
            rollout_adapter=self.rollout_adapter,
        )

    def prompt_length(self) -> float:
        """Estimate the tokens that a process's prompts are padded to, from the first rows of the data set."""
        args = self.args
        rows = args.per_device_train_batch_size * int(args.steps_per_generation or 1)
        together = rows // self.group_size("train")
        return padded_length(self.train_dataset, lambda prompts: self._tokenize_prompts(prompts)[0], together)

    def completion_cost(self) -> CompletionCost:
        """Estimate what one completion costs, for the start-up report."""
        return completion_cost(
            self.choices.credit,
            self.choices.likelihood,
            self.choices.loss,
            self.args,
            self.family,
            self.prompt_length(),
            probe=0 if self._probe is None else self._probe.forwards_at_most(),
        )

    @property
    def forward_units(self) -> float:
        """Compute spent on training by all processes so far, see `Meter`."""
        return self.meter.forward_units

    # ---------------------------------------------------------------- rollout

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        mode = "train" if self.model.training else "eval"
        multiple: Any = self.pad_to_multiple_of  # TRL types it as text too
        padded = left_pad(prompt_ids, self._tokenizer.pad_token_id, multiple)
        prompts, mask = (part.to(self.accelerator.device) for part in padded)
        purpose = Purpose.TRAIN_ROLLOUT if mode == "train" else Purpose.EVAL_ROLLOUT
        rows = self._global_rows(len(prompt_ids))
        generators = row_generators(self.args.seed, purpose, self._rollouts[mode], rows=rows.tolist())
        start, engine = time.perf_counter(), self._engine()
        with profiling_context(self, "diffusion.sample"), engine.policy() as model:
            bounds = self.bounds(model, prompts, mask)
            trajectory = engine.sample(model, prompts, mask, self.args.sampling_config(), generators, bounds=bounds)
        self._trajectory = trajectory
        figures = RolloutFigures.of(trajectory, self.family, self.accelerator, time.perf_counter() - start)
        self.meter.add(mode, figures.metrics)
        if mode == "train":
            self.meter.count_forwards(figures.forward_units)
        lengths = self.family.effective_length(trajectory.completion_ids).tolist()
        completions = [ids[:n] for ids, n in zip(trajectory.completion_ids.tolist(), lengths, strict=True)]
        return completions, None

    def bounds(self, model: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor | None:
        """Return an entropy bound for each completion, float [B]; `None` where the setting `entropy_bound` is all."""
        return None

    def _tokenize_prompts(self, prompts):
        # TRL would close a last assistant message, which is the beginning of the answer
        kwargs: Any = self.chat_template_kwargs
        return [encode_prompt(prompt, self._tokenizer, **kwargs) for prompt in prompts], None, {}

    def _global_rows(self, count: int) -> torch.Tensor:
        """Index (prompt · G + g) of this process's rows in the batch of all processes."""
        return torch.arange(count, device=self.accelerator.device) + self.accelerator.process_index * count

    def group_size(self, mode: str) -> int:
        """Completions per prompt, G."""
        size = self.num_generations if mode == "train" else self.num_generations_eval
        assert size is not None
        return size

    def _engine(self) -> RolloutEngine:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        gather = self.args.ds3_gather_for_generation
        return RolloutEngine(
            self.accelerator,
            self.model_wrapped,
            summon=self._dist.summon_full_params,
            gather=gather,
            checkpointing=self._checkpointing_kwargs,
            sharded=self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3 and not gather),
            adapter=self.rollout_adapter,
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards = self._reward_guard.check_models(rewards, self.reward_funcs, self.reward_func_names)
        self._finished = FinishedBatch(inputs, prompts, completions, completion_ids_list, rewards)
        return rewards

    def _take_rollout(self, mode: str, rows: Rows) -> Rollout:
        """Return the rollout that TRL has just had drawn and judged.

        Args:
            mode: `"train"` or `"eval"`.
            rows: TRL's: `prompt_ids` and `prompt_mask` [B, P]; `completion_mask` [B, n], which TRL empties for a
                completion that `mask_truncated_completions` drops.
        """
        trajectory, self._trajectory = self._trajectory, None
        finished, self._finished = self._finished, None
        assert trajectory is not None and finished is not None
        args, trains, count = self.args, mode == "train", len(finished.prompts)
        first = self.accelerator.process_index * count
        evaluated = args.per_device_eval_batch_size * self.accelerator.num_processes
        return Rollout(
            mode=mode,
            number=self._rollouts[mode],
            seed=args.seed,
            updates=range(self.num_iterations if trains else 1),
            group_size=self.group_size(mode),
            num_rows=(args.generation_batch_size or 1) if trains else evaluated,
            global_rows=self._global_rows(count),
            own_rows=slice(first, first + count),
            family=self.family,
            sampling=args.sampling_config().on_grid(self.family),
            prompt_ids=rows["prompt_ids"],
            prompt_mask=rows["prompt_mask"],
            trajectory=trajectory,
            finished=finished,
            trainable=rows["completion_mask"].any(1),
            gather=self.accelerator.gather,
        )

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        rows = super()._generate_and_score_completions(inputs)
        rollout = self._take_rollout(mode, rows)
        self._unshown_completions = True
        advantages = self._advantages(rollout, rows["advantages"])
        if self.choices.credit.only_scored:
            rollout = replace(rollout, trainable=rollout.trainable & ~advantages.isnan())
        # The whole canvas: the network saw all of it when the tokens were drawn.
        rows |= {"global_row": rollout.global_rows, "completion_ids": rollout.trajectory.completion_ids}
        rows |= self.choices.likelihood.plan(rollout)
        rows["num_items_in_batch"] = self.accelerator.gather(rows["completion_mask"].sum()).sum()
        self._rollouts[mode] += 1
        likelihood, loss = self.choices.likelihood, self.choices.loss
        if loss.needs_old and "old_per_token_logps" not in rows:
            rows["old_per_token_logps"] = self._logps(rows, likelihood, rollout.updates)
        if loss.needs_reference(self.args):
            rows["ref_per_token_logps"] = self._logps(rows, likelihood, rollout.updates, reference=True)
        weights, metrics = self._credit.assign(rollout, rows, advantages)
        self.meter.add(mode, metrics)
        rows |= weights
        if mode == "train":
            weights, metrics, units = self._view_credit.assign(rollout, rows, self._engine(), self.state)
            self.meter.add(mode, metrics)
            self.meter.count_forwards(units)
            rows |= weights
        return rows

    # ---------------------------------------------------------------- credit

    def _advantages(self, rollout: Rollout, advantages: torch.Tensor) -> torch.Tensor:
        """Return the method's advantages [B] with a process reward (SAPO); NaN for completions without a reward.

        Args:
            rollout: the completions.
            advantages: TRL's [B], 0 for a completion without a reward. NaN keeps it out of its group's statistics.
        """
        mode, finished = rollout.mode, rollout.finished
        groups = rollout.groups(advantages.masked_fill(~rollout.scored, torch.nan))
        advantages = rollout.own_of_groups(self.choices.credit.centre(groups))
        process_rewards: list[float | None] = [None] * len(finished.rewards)
        if mode == "train":
            self.last_rollout = rollout.trajectory, finished
            if self._probe is not None:
                probed = self._probe.measure(rollout, advantages, self._engine(), self.state)
                advantages, process_rewards = probed.advantages, probed.process_rewards
                self.meter.add(mode, probed.metrics)
                self.meter.count_forwards(probed.forward_units)
            tied = self._reward_guard.watch_ties(finished.rewards, self.reward_weights, rollout.group_size)
            self.meter.add(mode, tied)
        if self._probe is not None:  # in an evaluation too: the table of completions has one length for all columns
            logs: Any = self._logs
            logs["extra"]["process_reward"].extend(process_rewards)
        self.meter.add(mode, self._reward_guard.metrics(finished.rewards))
        return advantages

    def _refresh_credit(self) -> None:
        """Weigh the completions again before each update of a rollout but the first, if the credit asks for it."""
        trained = self._trained_micro_batches()
        if self.choices.credit.refreshes and trained and trained % self.current_gradient_accumulation_steps == 0:
            assert self._buffered_inputs is not None
            batches: list[Rows] = self._buffered_inputs
            self.meter.add("train", self._credit.refresh(batches, self.group_size("train")))

    # ---------------------------------------------------------------- likelihood

    def _logps(
        self, rows: Rows, likelihood: Likelihood, updates: Sequence[int], reference: bool = False
    ) -> torch.Tensor:
        """Score every view under the policy or the reference model, without gradient; [B, μ, V, L]."""
        scorer, training = self.scorer, self.model.training
        if reference:
            with reference_policy(self.model, self.ref_model, self.accelerator) as model:
                logps, units = scorer.logps(model, self.model, rows, likelihood, updates)
        else:
            logps, units = scorer.logps(self.model, self.model, rows, likelihood, updates)
        if training:
            self.meter.count_forwards(units * self.accelerator.num_processes)
        return logps

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        # TRL asks while it makes a rollout, where nothing reads the answer, and in its loss, once the view is scored.
        return (None, None, None) if self._scored is None else (self._scored.logps, self._scored.entropies, None)

    def _place_in_buffer(self) -> tuple[int, int]:
        """Return how many passes through the rollout batch are over, and the micro-batch within the present one."""
        passes, micro_batch = divmod(self._step, int(self.args.steps_per_generation or 1))
        return passes % self.num_iterations, micro_batch

    def _trained_micro_batches(self) -> int:
        """Return how many micro-batches of the rollout have been trained on before this one, in all passes."""
        passes, micro_batch = self._place_in_buffer()
        return passes * int(self.args.steps_per_generation or 1) + micro_batch

    def _on_policy(self) -> bool:
        """Return whether the policy has not been updated since it wrote the completions."""
        return self.model.training and self._trained_micro_batches() < self.current_gradient_accumulation_steps

    # ---------------------------------------------------------------- loss

    def num_backwards(self) -> int:
        return self.choices.num_backwards()

    def _prepare_inputs(self, generation_batch):
        if self._view == 0:
            self._window_rows = super()._prepare_inputs(generation_batch)
            if self.model.training:
                self._refresh_credit()
        assert self._window_rows is not None
        return self._window_rows

    def _compute_loss(self, model, inputs):
        if self.model.training:
            return self._view_loss(model, inputs, self._place_in_buffer()[0], self._view)
        losses = [self._view_loss(model, inputs, 0, view) for view in range(self.num_backwards())]
        return torch.stack(losses).sum()

    def _view_loss(self, model, rows: Rows, update: int, view: int) -> torch.Tensor:
        """Compute the loss of one view, or of all scored together, divided by the backward passes of an update."""
        mode = "train" if self.model.training else "eval"
        inputs = self._loss_inputs(model, rows, update, view)
        self._log_distances(inputs)
        loss = self.choices.loss
        if isinstance(loss, TokenRatio):
            return self._token_loss(model, rows, loss, inputs)
        outputs = loss(inputs)
        self.meter.add_means(mode, outputs.metrics)
        self.meter.add_mean_of(mode, "entropy", inputs.entropies, inputs.views.targets)
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        return outputs.loss.mean() / (accumulation * self.num_backwards())

    def _loss_inputs(self, model, rows: Rows, update: int, view: int) -> LossInputs:
        """Score the policy on a view, or on all that are scored together, and collect what the loss compares with."""
        likelihood, loss = self.choices.likelihood, self.choices.loss
        views = range(likelihood.num_views) if self.choices.scored_together else range(view, view + 1)
        inputs, units = collect_loss_inputs(model, rows, update, views, likelihood, loss, self.scorer)
        if self.model.training:
            self.meter.count_forwards(3 * units * self.accelerator.num_processes)
        return inputs

    def _log_distances(self, inputs: LossInputs) -> None:
        """Log how far log-probabilities that should be equal before the first update are from each other.

        Those under an approximate cache go by TRL's names for vLLM.
        """
        if not self._on_policy():
            return
        logps = inputs.logps.detach()
        if inputs.old is not None:
            self.meter.keep_largest("train", "rollout/max_abs_log_ratio", (logps - inputs.old).abs().max())
        if inputs.drawn is not None:
            name, targets = "sampling/sampling_logp_difference", inputs.views.targets
            difference = (logps - inputs.drawn).abs() * targets
            self.meter.add_mean_of("train", f"{name}/mean", difference, targets)
            self.meter.keep_largest("train", f"{name}/max", difference.max())

    def _token_loss(self, model, rows: Rows, loss: TokenRatio, inputs: LossInputs) -> torch.Tensor:
        """Compute TRL's loss, divided by the number of backward passes of an update."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "num_items_in_batch")
        given = {name: rows[name] for name in names} | loss.trl_inputs(inputs, self.args)
        with self._as_trl_reads(Scores(inputs.logps[:, 0], inputs.entropies[:, 0])):
            return super()._compute_loss(model, given) / self.num_backwards()

    @contextmanager
    def _as_trl_reads(self, scores: Scores) -> Iterator[None]:
        """Set the scores of the view and β on the trainer while TRL's loss reads them; TraceRL's β is 0 otherwise."""
        beta, self.beta, self._scored = self.beta, self.args.beta, scores
        try:
            yield
        finally:
            self.beta, self._scored = beta, None

    # ---------------------------------------------------------------- logs, model card, evaluation and checkpoints

    def log(self, logs, start_time=None):
        # TRL shows the last completions with every log, also with those that report an accuracy or the run time.
        wanted, self.log_completions = self.log_completions, self.log_completions and self._unshown_completions
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = wanted
        self._unshown_completions = False

    def card_generation(self) -> dict[str, int]:
        """Return arguments of `generate` for the example in the model card."""
        return {
            "max_new_tokens": self.args.max_completion_length,
            "block_length": self.args.block_length,
            "denoising_steps": self.args.denoising_steps,
        }

    def card_choices(self) -> dict[str, str]:
        return self.choices.facts() if self._composed else {}

    def card_sources(self) -> list[Source]:
        """Return the papers of step-aware rewards, of what settings have added and, without a paper, of all parts."""
        known = sources_of_methods(DiffusionGRPOTrainer)
        whole = self._composed or not self._paper
        found = {"": Source("step-aware rewards (SAPO)", STEP_AWARE_PAPER)} if self._probe is not None else {}
        for part in parts_of(self.choices.credit, self.choices.likelihood, self.choices.loss):
            if part.paper is not None and (whole or part.extends) and part.paper != self._paper.get("id"):
                found[part.paper] = known.get(part.paper, Source(type(part).__name__, {"id": part.paper}))
        return [*found.values()]

    def evaluate(self, *args, **kwargs):
        check_eval_batch(self.args)
        self._rollouts["eval"] = 0  # every evaluation draws with the same noise
        return super().evaluate(*args, **kwargs)

    def _collect_facts(self) -> Facts:
        facts = super()._collect_facts()
        return facts | {"run": facts["run"] | self.choices.facts()} if self._composed else facts
