"""GRPO for diffusion language models: the base of every trainer here.

`DiffusionGRPOTrainer` is TRL's `GRPOTrainer` with two things replaced. Generation becomes diffusion sampling, which
records the whole trajectory. The autoregressive log-probability of a token becomes its log-probability in a noised
view of the completion; a completion is scored in `num_mc_samples` Monte-Carlo views per update. Which views is what a
method decides: it overrides `_plan_views` and `_view_of`. All the rest (losses, clipping, KL, metrics, evaluation,
logging) is TRL's.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id, pad, use_adapter

from trl_diffusion.adapters.precision import (
    AdapterPrecision,
    copy_as_reference,
    load_to_train,
    native_peft_config,
    share_checkpointing_kwargs,
)
from trl_diffusion.adapters.renaming import is_adapter
from trl_diffusion.credit.step_aware import CITATION
from trl_diffusion.family import family_of
from trl_diffusion.likelihood import Scores, Views, score_views
from trl_diffusion.runtime.arguments import (
    check_adapter,
    check_arguments,
    check_eval_batch,
    check_load_arguments,
    check_model,
    check_prompts_fit,
    check_rollout_data,
    check_trainable,
    named_eval_datasets,
    warn_of_eight_bit,
)
from trl_diffusion.runtime.cost import padded_length, rollout_units
from trl_diffusion.runtime.launch import check_backend, check_device_map, check_reference_loading
from trl_diffusion.runtime.model_card import PortableCards, card_arguments, complete_card
from trl_diffusion.runtime.report import startup_report
from trl_diffusion.runtime.reward_guard import RewardGuard
from trl_diffusion.runtime.rollout_checkpoints import RolloutCheckpoints, is_plain
from trl_diffusion.runtime.rollouts import FinishedBatch, RolloutEngine
from trl_diffusion.runtime.run import CompletionCost, RolloutRun
from trl_diffusion.runtime.step_aware_probe import StepAwareProbe
from trl_diffusion.runtime.update_guard import GuardedUpdates
from trl_diffusion.sampling import Trajectory, row_generators, sample
from trl_diffusion.streams import Purpose
from trl_diffusion.tokenization import encode_prompt
from trl_diffusion.trainers.base.config import DiffusionGRPOConfig
from trl_diffusion.trainers.base.view_loop import MonteCarloViews


class DiffusionGRPOTrainer(PortableCards, RolloutCheckpoints, GuardedUpdates, GRPOTrainer, MonteCarloViews):  # type: ignore[misc]
    """GRPO for diffusion language models; a method says in which noised views its completions are scored.

    A subclass overrides `_plan_views` and `_view_of`. A `StepAwareReward` (SAPO, 2510.01544) among the reward
    functions adds its process reward to the advantages of any method.

    Args:
        model: a path or hub id, also of an adapter, which is then trained further; a native diffusion language model,
            or a `PeftModel` around one.
        reward_funcs: as in TRL; at most one may be a `StepAwareReward`.
        args: a `DiffusionGRPOConfig`.
        train_dataset: as in TRL; a column `prompt` and whatever the reward functions need.
        eval_dataset: as in TRL.
        processing_class: the tokenizer; loaded with the model if not given.
        **kwargs: the other arguments of TRL's `GRPOTrainer` (`peft_config`, `quantization_config`, `callbacks`,
            `optimizers`, `reward_processing_classes`). Tools, environments and rollout functions are refused.

    Raises:
        TypeError: if the model is not a diffusion language model, or `args` not a config of this library.
        ValueError: if something cannot work with diffusion sampling, or a column is missing.
    """

    _tag_names = ["trl", "trl_diffusion", "diffusion-grpo"]
    _name = "DiffusionGRPO"
    config_class: type[DiffusionGRPOConfig] = DiffusionGRPOConfig
    _compares_with_old: bool = True
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
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, DiffusionGRPOConfig):
            raise TypeError(f"args must be a {self.config_class.__name__}, got {type(args).__name__}.")
        check_backend(args)
        check_arguments(processing_class, kwargs)
        check_load_arguments(args.model_init_kwargs)
        check_rollout_data(args, train_dataset, eval_dataset, reward_funcs)
        if isinstance(model, str) and is_adapter(model):
            model = load_to_train(model, args, kwargs.pop("quantization_config", None))
            args = copy.copy(args)
            args.model_init_kwargs = None  # used; TRL warns where they come with a model
        check_model(model)
        check_adapter(model, kwargs.get("peft_config"))
        kwargs["peft_config"] = native_peft_config(kwargs.get("peft_config"), model, args.model_init_kwargs)
        adapter_precision = AdapterPrecision(model)
        if args.sync_ref_model and (isinstance(model, PeftModel) or kwargs.get("peft_config") is not None):
            raise ValueError("sync_ref_model=True needs a separate reference model; a LoRA run has none. Turn it off.")
        compares = self._needs_reference(args)
        if compares and not isinstance(model, PeftModel) and kwargs.get("peft_config") is None:
            check_reference_loading()

        # TRL would reload the reference model from disk by path, which fails for a model that was never saved and is
        # wrong for one that changed since. So TRL is told that there is none, and gets a copy.
        args = copy.copy(args)
        beta, sync_ref_model, reference = args.beta, args.sync_ref_model, None
        args.beta = float(compares)  # TRL makes a reference model wherever beta is not 0
        if compares and isinstance(model, PreTrainedModel) and kwargs.get("peft_config") is None:
            if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
                raise ValueError(
                    "With ZeRO-3, where a reference model is needed, pass the model as a path or hub id, not as an "
                    "object: its weights are sharded and cannot be copied."
                )
            reference = copy.deepcopy(model)
            args.beta, args.sync_ref_model = 0.0, False
        if compares and isinstance(model, PeftModel) and model.active_adapter != "default":
            copy_as_reference(model)  # TRL would copy the adapter called "default"
            args.beta = 0.0

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
        share_checkpointing_kwargs(args)
        self.beta = beta if compares else 0.0  # TRL looks for a reference model while it generates
        if reference is not None:
            self._adopt_reference(reference)

        check_trainable(self.model)
        adapter_precision.restore(self.model, args.deepspeed_plugin)
        self.family = family_of(self.model)
        check_device_map(self.model)
        self._check_family()
        warn_of_eight_bit(self.model)
        check_prompts_fit(
            self.model,
            args.max_completion_length,
            {"train_dataset": train_dataset} | named_eval_datasets(eval_dataset),
            lambda prompts: self._tokenize_prompts(prompts)[0],
        )
        self.eos_token_ids = sorted({*self.family.end_token_ids, self._tokenizer.eos_token_id})
        self._checkpointing_kwargs: Any = args.gradient_checkpointing_kwargs
        self._rollouts = {"train": 0, "eval": 0}
        self.forward_units = 0.0
        self.last_rollout: tuple[Trajectory, FinishedBatch] | None = None
        self._finished: FinishedBatch | None = None
        self.check_update_policy()
        self._reward_guard = RewardGuard(args, self.accelerator)
        self.reward_funcs = [self._reward_guard.wrap(function) for function in self.reward_funcs]
        self._probe = StepAwareProbe.of(
            self.reward_funcs,
            self._tokenizer,
            family=self.family,
            sampling=args.sampling_config(),
            seed=args.seed,
            group=self.group_size("train"),
            accelerator=self.accelerator,
        )
        self._dataset_name: str | None = None
        self._unshown_completions = False
        self._trajectory: Trajectory | None = None
        self._scored: Scores | None = None
        self._window_rows: dict[str, torch.Tensor] | None = None

    def _check_family(self) -> None:
        """Whether sampling and scoring go with the model's attention.

        Raises:
            ValueError: if not.
        """
        self.args.sampling_config().check_family(self.family)

    @staticmethod
    def _needs_reference(args: DiffusionGRPOConfig) -> bool:
        """Whether completions are scored under a reference model."""
        return args.beta != 0.0

    def _adopt_reference(self, reference: PreTrainedModel) -> None:
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    # ---------------------------------------------------------------- start

    def train(self, *args, **kwargs):
        """TRL's `train`. With the progress bar (`disable_tqdm=False`) the start-up report is printed first."""
        if not self.args.disable_tqdm:
            self.print_report()
        return super().train(*args, **kwargs)

    def print_report(self) -> None:
        """Print the start-up report, on the main process only."""
        if self.accelerator.is_main_process:
            Console().print(startup_report(self.as_run()))

    def as_run(self) -> RolloutRun:
        """The values that the start-up report and the estimates of cost follow from."""
        return RolloutRun.of(
            self,
            self.family,
            reference=self.ref_model,
            compares=self.beta != 0.0,
            group=self.group_size("train"),
            prompt_length=self.prompt_length(),
            completion=self.completion_cost(),
            views=self._num_views(),
            backwards=self._passes(),
            step_aware=self._probe is not None,
        )

    def prompt_length(self) -> float:
        """Tokens that a process's prompts are padded to, on average over rollouts; from the data set's first rows."""
        args = self.args
        rows = args.per_device_train_batch_size * int(args.steps_per_generation or 1)
        together = rows // self.group_size("train")
        return padded_length(self.train_dataset, lambda prompts: self._tokenize_prompts(prompts)[0], together)

    def completion_cost(self) -> CompletionCost:
        """What one completion costs, for the start-up report; a method overrides what is different with it."""
        views = self.num_iterations * self._num_views()
        return CompletionCost(
            rollout=rollout_units(
                self.args.sampling_config(), self.family, self.prompt_length(), self.group_size("train")
            ),
            probe=0 if self._probe is None else self._probe.forwards_at_most(),
            old=views if self._compares_with_old else 0,
            reference=views if self.beta != 0.0 else 0,
            training=views,
            targets=self.args.max_completion_length,
        )

    # ---------------------------------------------------------------- rollout

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        mode = "train" if self.model.training else "eval"
        prompts, mask = self._pad_prompts(prompt_ids)
        purpose = Purpose.TRAIN_ROLLOUT if mode == "train" else Purpose.EVAL_ROLLOUT
        rows = self._global_rows(len(prompt_ids))
        generators = row_generators(self.args.seed, purpose, self._rollouts[mode], rows=rows.tolist())
        start = time.perf_counter()
        engine = self._engine()
        with profiling_context(self, "diffusion.sample"), engine.policy() as model:
            config = self.args.sampling_config()
            trajectory = sample(model, prompts, mask, config, generators, any_process=engine.any_process)
        self._trajectory = trajectory
        self._log_rollout(mode, trajectory, time.perf_counter() - start)
        lengths = self.family.effective_length(trajectory.completion_ids).tolist()
        completions = [ids[:n] for ids, n in zip(trajectory.completion_ids.tolist(), lengths, strict=True)]
        return completions, None

    def _tokenize_prompts(self, prompts):
        # TRL would close a last assistant message, which is the beginning of the answer
        kwargs: Any = self.chat_template_kwargs
        return [encode_prompt(prompt, self._tokenizer, **kwargs) for prompt in prompts], None, {}

    def _pad_prompts(self, prompt_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.tensor(ids) for ids in prompt_ids]
        padding: dict[str, Any] = {"padding_side": "left", "pad_to_multiple_of": self.pad_to_multiple_of}
        ids = pad(rows, padding_value=self._tokenizer.pad_token_id, **padding)
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, **padding)
        return ids.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _global_rows(self, count: int) -> torch.Tensor:
        """Index (prompt · G + g) of this process's rows in the batch of all processes."""
        return torch.arange(count, device=self.accelerator.device) + self.accelerator.process_index * count

    def _own_rows(self, count: int) -> slice:
        """Where this process's rows lie in what is gathered from all processes."""
        first = self.accelerator.process_index * count
        return slice(first, first + count)

    def group_size(self, mode: str) -> int:
        """Completions per prompt, G."""
        size = self.num_generations if mode == "train" else self.num_generations_eval
        assert size is not None
        return size

    def _engine(self) -> RolloutEngine:
        return RolloutEngine(
            self.accelerator,
            self.model_wrapped,
            summon=self._dist.summon_full_params,
            gather=self.args.ds3_gather_for_generation,
            checkpointing=self._checkpointing_kwargs,
            any_process=self._any_process(),
        )

    def _any_process(self):
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        sharded = plugin is not None and plugin.zero_stage == 3 and not self.args.ds3_gather_for_generation
        if not (sharded or self.is_fsdp_enabled):
            return None
        return lambda here: bool(self.accelerator.gather(torch.tensor([here], device=self.accelerator.device)).any())

    def _log_rollout(self, mode: str, trajectory: Trajectory, seconds: float) -> None:
        sampled = trajectory.unmask_step >= 0
        statistics = torch.stack(
            [
                trajectory.row_forwards.sum().float(),
                sampled.sum().float(),
                (self.family.is_end(trajectory.completion_ids) & sampled).sum().float(),
                torch.tensor(float(len(sampled)), device=sampled.device),
                self.family.is_end(trajectory.completion_ids[:, 0]).sum().float(),
                trajectory.row_units.sum(),
            ]
        )
        steps, tokens, ends, rows, empty, units = self.accelerator.reduce(statistics, reduction="sum").tolist()
        metrics = self._metrics[mode]
        metrics["rollout/denoising_steps"].append(steps / rows)
        metrics["rollout/tokens_per_forward"].append(tokens / steps)
        metrics["rollout/eos_share"].append(ends / tokens)
        metrics["rollout/seconds"].append(seconds)
        metrics["completions/empty_share"].append(empty / rows)
        if mode == "train":
            self.count_forwards(units)

    def _with_process_reward(
        self, rows: dict[str, torch.Tensor], trajectory: Trajectory, finished: FinishedBatch
    ) -> torch.Tensor:
        """Advantages [B] with SAPO's process reward."""
        assert self._probe is not None
        number, engine = self._rollouts["train"], self._engine()
        probed = self._probe.measure(rows, trajectory, finished, number, engine, self.state)
        self._log_values("train", probed.metrics)
        self._log_process_rewards(probed.process_rewards)
        self.count_forwards(probed.forward_units)
        return probed.advantages

    def _log_values(self, mode: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics[mode][name].append(value)

    def _log_process_rewards(self, values: list[float | None]) -> None:
        logs: Any = self._logs
        logs["extra"]["process_reward"].extend(values)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards = self._reward_guard.check_models(rewards, self.reward_funcs, self.reward_func_names)
        self._finished = FinishedBatch(inputs, prompts, completions, completion_ids_list, rewards)
        return rewards

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        rows = super()._generate_and_score_completions(inputs)
        self._unshown_completions = True
        trajectory, self._trajectory = self._trajectory, None
        finished, self._finished = self._finished, None
        assert trajectory is not None and finished is not None
        rows["global_row"] = self._global_rows(len(finished.prompts))
        unscored = finished.rewards.isnan().all(1)[self._own_rows(len(finished.prompts))]
        # TRL gives a completion without a reward the advantage 0; NaN keeps it out of every statistic of its group
        advantages = rows["advantages"].masked_fill(unscored, torch.nan)
        rows["advantages"] = self._over_groups(mode, advantages, self._group_advantages)
        if mode == "train":
            self.last_rollout = trajectory, finished
            if self._probe is not None:
                rows["advantages"] = self._with_process_reward(rows, trajectory, finished)
        elif self._probe is not None:  # the column is as long as the others of the table of completions
            self._log_process_rewards([None] * len(finished.rewards))
        self._log_values(mode, self._reward_guard.metrics(finished.rewards))
        if mode == "train":
            weights, group = self.reward_weights, self.group_size(mode)
            self._log_values(mode, self._reward_guard.watch_ties(finished.rewards, weights, group))
        # TRL empties the mask of a completion that `mask_truncated_completions` drops
        learns = rows["completion_mask"].any(1)
        rows["completion_ids"] = trajectory.completion_ids
        rows |= self._plan_views(mode, trajectory, rows, learns)
        rows["num_items_in_batch"] = self.accelerator.gather(rows["completion_mask"].sum()).sum()
        self._rollouts[mode] += 1
        if self._compares_with_old and "old_per_token_logps" not in rows:
            rows["old_per_token_logps"] = self._logps_of_views(mode, self.model, rows)
        if self.beta != 0.0:
            rows["ref_per_token_logps"] = self._reference_logps(mode, rows)
        self._assign_credit(mode, rows)
        rows["advantages"] = rows["advantages"].masked_fill(unscored, 0.0)
        return rows

    def _plan_views(
        self, mode: str, trajectory: Trajectory, rows: dict[str, torch.Tensor], learns: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the views of every inner update are made from.

        Args:
            mode: `"train"` (`num_iterations` inner updates) or `"eval"` (one).
            trajectory: of the B completions.
            rows: `prompt_ids` and `prompt_mask` [B, P], `completion_ids` [B, L], `global_row` and `advantages` [B]
                (NaN for a completion without a reward).
            learns: bool [B], whether a completion may learn at all.

        Returns:
            Tensors with a row per completion, because TRL shuffles and splits rows: `completion_mask` long [B, L], the
            tokens that may learn, and whatever `_view_of` needs; `view_weights` float32 [B, μ, M] if views count
            differently; `old_per_token_logps` [B, L] and `prompt_columns` [B] if the old log-probabilities are those
            of the rollout. Without, they are scored on the views.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say in which views completions are scored.")

    def _view_of(self, rows: dict[str, torch.Tensor], update: int, view: int) -> Views:
        """One view of every row. Always the same for the same arguments."""
        raise NotImplementedError(f"{type(self).__name__} does not say in which views completions are scored.")

    def _num_views(self) -> int:
        """Views per completion and inner update."""
        return self.args.num_mc_samples

    def _group_advantages(self, advantages: torch.Tensor) -> torch.Tensor:
        """The method's own advantages; by default TRL's.

        A process reward (SAPO) is added to them, so what centres or scales the rewards of a group belongs here.

        Args:
            advantages: TRL's, [N, G] for N prompts; NaN for a completion without a reward, which must not count.

        Returns:
            [N, G], NaN where the argument is.
        """
        return advantages

    def _assign_credit(self, mode: str, rows: dict[str, torch.Tensor]) -> None:
        """Turn `rows["advantages"]` [B], NaN for completions without a reward, into weights over their group, for
        methods that learn from such weights."""

    def _over_groups(
        self, mode: str, values: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Apply a function of whole prompt groups [N, G], which may lie on several processes, to values [B]."""
        results = function(self.accelerator.gather(values).view(-1, self.group_size(mode)))
        return results.flatten()[self._own_rows(len(values))]

    # ---------------------------------------------------------------- likelihood

    def _score(self, model, rows: dict[str, torch.Tensor], views: Views) -> Scores:
        with self.accelerator.autocast():
            return score_views(
                model,
                rows["prompt_ids"],
                rows["prompt_mask"],
                rows["completion_ids"],
                views,
                self._scoring_temperature(),
                rows.get("support"),
                rows.get("prompt_columns"),
            )

    def _scoring_temperature(self) -> float:
        """Temperature of the distribution that is scored: 1 but for trajectory methods."""
        return 1.0

    def _reference_logps(
        self, mode: str, rows: dict[str, torch.Tensor], updates: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Log-probabilities [B, μ, V, L] of every view under the reference model, or without the adapter."""
        if self.ref_model is not None:
            return self._logps_of_views(mode, self.ref_model, rows, updates)
        peft_model = self.accelerator.unwrap_model(self.model)
        with use_adapter(peft_model, "ref" if "ref" in peft_model.peft_config else None):
            return self._logps_of_views(mode, self.model, rows, updates)

    @torch.no_grad()
    def _logps_of_views(
        self, mode: str, model, rows: dict[str, torch.Tensor], updates: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Log-probabilities [B, μ, V, L] of the targets of every view, 0 elsewhere; no dropout, no autograd.

        Args:
            mode: `"train"` or `"eval"`.
            model: the policy or the reference model.
            rows: what `_plan_views` planned.
            updates: inner updates whose views are scored; all of them if not given.
        """
        updates, views = range(self._inner_updates(mode)) if updates is None else updates, self._num_views()
        batch, length = rows["completion_ids"].shape
        logps = torch.zeros(batch, len(updates), views, length, device=rows["completion_ids"].device)
        size, units = self.args.per_device_train_batch_size, 0.0
        was_training = model.training
        model.eval()
        try:
            with disable_gradient_checkpointing(self.model, self._checkpointing_kwargs):
                # Always every view: where weights are sharded, all processes must run the same number of forwards.
                for place, update in enumerate(updates):
                    for view in range(views):
                        for start in range(0, batch, size):
                            part = {k: v[start : start + size] for k, v in rows.items() if v.dim() > 0}
                            views_of_part = self._view_of(part, update, view)
                            scores = self._score(model, part, views_of_part)
                            logps[start : start + size, place, view] = scores.logps
                            units += views_of_part.forward_units(part["prompt_ids"].size(1))
        finally:
            model.train(was_training)
        if mode == "train":
            self.count_forwards(units * self.accelerator.num_processes)
        return logps

    def _inner_updates(self, mode: str) -> int:
        return self.num_iterations if mode == "train" else 1

    def count_forwards(self, rows: float) -> None:
        """Add to `forward_units`, the compute spent on training by all processes.

        One unit is one forward pass of one row (prompt and whole canvas); a pass with gradient counts three, one that
        computes a part of the columns in proportion.
        """
        self.forward_units += rows
        self._metrics["train"]["forward_units"] = [self.forward_units]

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        # TRL asks while it makes a rollout, where nothing reads the answer, and in its loss, once `_token_loss` scored
        return (None, None, None) if self._scored is None else (self._scored.logps, self._scored.entropies, None)

    def _old_logps(self, rows: dict[str, torch.Tensor], update: int, view: int, targets: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, L] of a view's targets before the first update, 0 elsewhere."""
        old = rows["old_per_token_logps"]
        return (old if old.dim() == 2 else old[:, update, view]) * targets

    def _place_in_buffer(self) -> tuple[int, int]:
        """How often the rollout batch was gone through before, and the micro-batch within it."""
        passes, micro_batch = divmod(self._step, int(self.args.steps_per_generation or 1))
        return passes % self.num_iterations, micro_batch

    def _on_policy(self) -> bool:
        """Whether the policy that is trained now still is the one that wrote the completions."""
        inner_update, micro_batch = self._place_in_buffer()
        return self.model.training and inner_update == 0 and micro_batch < self.current_gradient_accumulation_steps

    def _log_log_ratio(self, logps: torch.Tensor, old: torch.Tensor) -> None:
        if not self._on_policy():
            return
        largest = self.accelerator.gather((logps.detach() - old).abs().max()).max().item()
        metrics = self._metrics["train"]
        metrics["rollout/max_abs_log_ratio"] = [max([largest, *metrics["rollout/max_abs_log_ratio"]])]

    # ---------------------------------------------------------------- loss

    def _prepare_inputs(self, generation_batch):
        if self._view > 0:
            assert self._window_rows is not None
            return self._window_rows
        self._window_rows = super()._prepare_inputs(generation_batch)
        return self._window_rows

    def _compute_loss(self, model, inputs):
        if self.model.training:
            return self._view_loss(model, inputs, self._place_in_buffer()[0], self._view)
        losses = [self._view_loss(model, inputs, 0, view) for view in range(self._passes())]
        return torch.stack(losses).sum()

    def _view_loss(self, model, rows: dict[str, torch.Tensor], update: int, view: int) -> torch.Tensor:
        """The loss of one view, divided by the number of views."""
        views = self._view_of(rows, update, view)
        scores = self._score(model, rows, views)
        self._count_training(views.forward_units(rows["prompt_ids"].size(1)))
        old = self._old_logps(rows, update, view, views.targets)
        return self._token_loss(
            model,
            rows,
            scores,
            views.targets,
            old,
            self._compared_logps(rows, update, view),
            rows["view_weights"][:, update, view] if "view_weights" in rows else None,
            self._importance(rows, scores.logps.detach(), old, views.targets),
        )

    def _importance(
        self, rows: dict[str, torch.Tensor], logps: torch.Tensor, old: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor | None:
        """Weights [B, L] of tokens that another policy than the old one has drawn; `None` where it is the same."""
        return None

    def _compared_logps(self, rows: dict[str, torch.Tensor], update: int, view: int) -> torch.Tensor | None:
        """Log-probabilities [B, L] that the KL term compares with; `None` without one."""
        return rows["ref_per_token_logps"][:, update, view] if self.args.beta != 0.0 else None

    def _token_loss(
        self,
        model,
        rows: dict[str, torch.Tensor],
        scores: Scores,
        targets: torch.Tensor,
        old: torch.Tensor,
        compared: torch.Tensor | None,
        weights: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """TRL's loss of token ratios, divided by the number of backward passes of an update.

        Args:
            model: the wrapped policy.
            rows: the micro-batch.
            scores: log-probabilities and entropies [B, L], with gradient.
            targets: bool [B, L], the tokens that count.
            old: log-probabilities [B, L] before the first update.
            compared: log-probabilities [B, L] for the KL term.
            weights: [B], weights of the completions' terms.
            importance: [B, L], weights of the tokens' policy terms.
        """
        mask = targets.long()
        inputs = {
            "prompt_ids": rows["prompt_ids"],
            "prompt_mask": rows["prompt_mask"],
            "completion_ids": rows["completion_ids"],
            "completion_mask": mask,
            "num_items_in_batch": rows["num_items_in_batch"],
            "old_per_token_logps": old,
            "advantages": rows["advantages"].unsqueeze(1).expand_as(mask),
        }
        if compared is not None:
            inputs["ref_per_token_logps"] = compared
        if weights is not None:
            weights = weights.unsqueeze(1).expand_as(mask)
            if compared is not None and self.args.weighted_views:
                # The KL must be weighted too: a float mask does it for the loss types that the config lets through.
                inputs["tool_mask"] = weights
            else:
                inputs["advantages"] = inputs["advantages"] * weights
        self._log_log_ratio(scores.logps, old)
        if importance is not None and self.args.loss_type == "vespo":
            inputs["importance_sampling_ratio"] = importance  # vespo weights sequences with it
        elif importance is not None:  # in TRL's other losses a token's policy term is proportional to its advantage
            inputs["advantages"] = inputs["advantages"] * importance
        with self._as_trl_reads(scores):
            return super()._compute_loss(model, inputs) / self._passes()

    @contextmanager
    def _as_trl_reads(self, scores: Scores) -> Iterator[None]:
        """Set the scores of the view and β on the trainer while TRL's loss reads them; TraceRL's β is 0 otherwise."""
        beta, self.beta, self._scored = self.beta, self.args.beta, scores
        try:
            yield
        finally:
            self.beta, self._scored = beta, None

    def _count_training(self, units: float) -> None:
        if self.model.training:
            self.count_forwards(3 * units * self.accelerator.num_processes)

    # ---------------------------------------------------------------- logs, model card, evaluation and checkpoints

    def log(self, logs, start_time=None):
        # TRL shows the last completions with every log, also with those that report an accuracy or the run time.
        wanted, self.log_completions = self.log_completions, self.log_completions and self._unshown_completions
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = wanted
        self._unshown_completions = False

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):  # type: ignore[override]  # as TRL's
        self._dataset_name = dataset_name or self._dataset_name  # TRL does not repeat it with every checkpoint
        super().create_model_card(**card_arguments(self, model_name, self._dataset_name), tags=tags)
        if not self.is_world_process_zero():
            return
        args = self.args
        complete_card(
            self,
            self._dataset_name,
            {
                "max_new_tokens": args.max_completion_length,
                "block_length": args.block_length,
                "denoising_steps": args.denoising_steps,
            },
        )
        if self._probe is not None:
            with open(os.path.join(str(self.args.output_dir), "README.md"), "a") as card:
                card.write(f"\nThe reward is step-aware (SAPO). Cite it as:\n\n```bibtex\n{CITATION}\n```\n")

    def evaluate(self, *args, **kwargs):
        check_eval_batch(self.args)
        self._rollouts["eval"] = 0  # every evaluation draws with the same noise
        return super().evaluate(*args, **kwargs)

    def _extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"unshown_completions": self._unshown_completions}
        # Only `ConfusionZoneCallback` looks at a rollout again.
        if self.last_rollout is not None and self.args.record_signals and self._buffer_in_use():
            trajectory, finished = self.last_rollout
            if is_plain(vars(finished)):
                state["last_rollout"] = vars(trajectory), vars(finished)
        return state

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        self._unshown_completions = state.get("unshown_completions", True)  # checkpoints of 0.1.0.dev0 lack it
        if "last_rollout" in state:
            trajectory, finished = send_to_device(state["last_rollout"], self.accelerator.device)
            self.last_rollout = Trajectory(**trajectory), FinishedBatch(**finished)
