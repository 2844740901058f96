"""GRPO over denoising trajectories: the base of every trainer here.

`DiffusionGRPOTrainer` is TRL's `GRPOTrainer` with two things replaced. Generation becomes diffusion sampling, which
records the whole trajectory. The autoregressive log-probability of a token becomes its log-probability at the
denoising step that wrote it; a completion is scored in `num_mc_samples` Monte-Carlo views, each the canvas before one
step. All the rest (losses, clipping, KL, metrics, evaluation, logging) is TRL's.
"""

from __future__ import annotations

import copy
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model, send_to_device
from rich.console import Console
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, disable_dropout_in_model, get_config_model_id, pad, use_adapter

from trl_diffusion.credit import StepDraws, draw_steps, eligible_steps, step_probabilities
from trl_diffusion.credit.step_draws import STEP_DRAWS, STEP_REDUCTIONS, STEP_SCOPES
from trl_diffusion.likelihood import Scores, Views, score_views, trajectory_views
from trl_diffusion.models import family_of
from trl_diffusion.models.lora import coverage_table, lora_coverage
from trl_diffusion.sampling import SamplingConfig, Trajectory, row_generators, sample
from trl_diffusion.sampling.noise import uniforms
from trl_diffusion.trainers.checks import check_arguments, check_columns
from trl_diffusion.trainers.monte_carlo_views import MonteCarloViews

# First element of the key of every private random stream, so that no two purposes share noise.
TRAIN_ROLLOUT, EVAL_ROLLOUT, TRAIN_VIEWS, EVAL_VIEWS = range(4)

# Loss types whose per-token terms are summed and divided by something the view does not change.
_KEEP_FLOAT_MASK = ("dr_grpo", "dapo", "cispo", "luspo")


@dataclass
class DiffusionGRPOConfig(GRPOConfig):
    """Configuration of `DiffusionGRPOTrainer`: TRL's `GRPOConfig` and how the canvas is written and scored.

    TRL's `max_completion_length` is the canvas length L, `temperature`, `top_k` and `top_p` are those of the sampler.
    The defaults give GRPO as TRL defines it (`dapo` token mean, group-scaled rewards) over all denoising steps.

    Args:
        denoising_steps: S, steps in which the canvas is written.
        block_length: positions per block; blocks are written from left to right.
        unmasking: how positions are chosen, see `trl_diffusion.sampling.SamplingConfig`.
        num_mc_samples: M, Monte-Carlo views (drawn denoising steps) per completion and update. Memory does not grow
            with M.
        step_draws: `uniform`, or `entropy`: steps that committed uncertain tokens are drawn more often and weighted
            back (2510.04019).
        step_scope: which steps may learn, `exact` or `paper`, see `trl_diffusion.credit.eligible_steps`.
        step_reduction: `sum` or `mean` over the steps of a completion. `sum` makes a loss what TRL computes over all
            tokens of the completion.

    Raises:
        ValueError: if settings do not fit together, or one cannot work with diffusion sampling.
    """

    denoising_steps: int = field(
        default=128,
        metadata={"help": "Denoising steps in which the canvas of `max_completion_length` positions is written."},
    )
    block_length: int = field(
        default=32, metadata={"help": "Positions per block; blocks are written from left to right."}
    )
    unmasking: str = field(
        default="random",
        metadata={
            "help": "How positions to commit are chosen: random, max_prob, entropy, margin, or LLaDA's (biased) "
            "low_confidence."
        },
    )
    num_mc_samples: int = field(
        default=8, metadata={"help": "Monte-Carlo views (drawn denoising steps) per completion and update."}
    )
    step_draws: str = field(
        default="uniform",
        metadata={"help": "Distribution of the drawn denoising steps: uniform or entropy (weighted back)."},
    )
    step_scope: str = field(
        default="exact",
        metadata={
            "help": "Denoising steps that may learn: exact (every step of every block that was written up to "
            "the first end token) or paper (up to the last step that wrote text)."
        },
    )
    step_reduction: str = field(
        default="sum", metadata={"help": "Reduction over the denoising steps of a completion: sum or mean."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Length of the canvas in tokens."})
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Turn dropout off, so that ratios start at 1; with dropout they measure its noise."},
    )

    def __post_init__(self):
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
        completions = self.generation_batch_size or self.per_device_train_batch_size * micro_batches * processes
        if self.num_generations and completions % self.num_generations:
            raise ValueError(
                f"num_generations ({self.num_generations}) must divide the rollout batch of {completions} completions "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} × {micro_batches} micro-batches × "
                f"{processes} processes): change one of these."
            )
        super().__post_init__()
        self.sampling_config()
        for name, choices in (
            ("step_draws", STEP_DRAWS),
            ("step_scope", STEP_SCOPES),
            ("step_reduction", STEP_REDUCTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        if self.num_mc_samples < 1:
            raise ValueError(f"num_mc_samples must be at least 1, got {self.num_mc_samples}.")
        self._refuse_what_cannot_work()
        self._refuse_biased_weights()

    def sampling_config(self) -> SamplingConfig:
        """How completions are drawn."""
        return SamplingConfig(
            canvas_length=self.max_completion_length,
            denoising_steps=self.denoising_steps,
            block_length=self.block_length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            unmasking=self.unmasking,
        )

    @property
    def weighted_views(self) -> bool:
        """Whether views carry weights other than 1."""
        return self.step_draws == "entropy" or self.step_reduction == "sum"

    def _refuse_what_cannot_work(self) -> None:
        autoregressive = "it generates one token after the other; completions here are drawn by diffusion"
        refused = {
            "use_vllm": (self.use_vllm, autoregressive),
            "use_transformers_continuous_batching": (self.use_transformers_continuous_batching, autoregressive),
            "cache_implementation": (self.cache_implementation is not None, autoregressive),
            "generation_kwargs": (
                self.generation_kwargs is not None,
                "they configure `transformers` generation; use the fields of this config",
            ),
            "min_p": (self.min_p is not None, "the sampler has no min_p; use top_k and top_p"),
            "repetition_penalty": (
                self.repetition_penalty != 1.0,
                "the penalised distribution is not the one that is scored",
            ),
            "max_tool_calling_iterations": (
                self.max_tool_calling_iterations is not None,
                "tools need several turns; a rollout here is one canvas",
            ),
            "use_liger_kernel": (self.use_liger_kernel, "it replaces the forward pass that scores noised views"),
            "temperature=0": (self.temperature == 0, "greedy completions of one prompt are all equal"),
        }
        for name, (is_set, reason) in refused.items():
            if is_set:
                raise ValueError(
                    f"{type(self).__name__} does not support `{name}`: {reason}. Leave it at its default."
                )

    def _refuse_biased_weights(self) -> None:
        if self.step_draws == "entropy":
            biased = {
                "loss_type='bnpo'": self.loss_type == "bnpo",
                "top_entropy_quantile < 1": self.top_entropy_quantile < 1.0,
                "entropy_coef": self.entropy_coef != 0.0 or self.use_adaptive_entropy,
            }
            for name, is_set in biased.items():
                if is_set:
                    raise ValueError(
                        f"{name} takes a statistic over the tokens that happened to be drawn, which "
                        "step_draws='entropy' skews. Set step_draws='uniform'."
                    )
        if (
            self.beta != 0.0
            and self.weighted_views
            and (
                self.loss_type not in _KEEP_FLOAT_MASK
                or self.importance_sampling_level != "token"
                or self.top_entropy_quantile < 1.0
            )
        ):
            raise ValueError(
                f"With beta={self.beta}, the KL term must carry the weights of step_draws={self.step_draws!r} and "
                f"step_reduction={self.step_reduction!r}. That is exact only for loss_type in "
                f"{', '.join(_KEEP_FLOAT_MASK)} with importance_sampling_level='token' and top_entropy_quantile=1; "
                f"got loss_type={self.loss_type!r}, importance_sampling_level={self.importance_sampling_level!r}. "
                "Change these, set step_draws='uniform' with step_reduction='mean', or set beta=0."
            )


class _EpochRepeatSampler(RepeatSampler):
    """`RepeatSampler` whose order is a function of (seed, epoch), so that a resumed run sees the order it left."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed + epoch)


class DiffusionGRPOTrainer(GRPOTrainer, MonteCarloViews):  # type: ignore[misc]
    """GRPO for diffusion language models, over the likelihood of their own denoising steps.

    Args:
        model: a path or hub id, a native diffusion language model, or a `PeftModel` around one.
        reward_funcs: as in TRL.
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
        check_arguments(model, processing_class, kwargs)
        check_columns(train_dataset, reward_funcs)
        if args.sync_ref_model and (is_peft_model(model) or kwargs.get("peft_config") is not None):
            raise ValueError("sync_ref_model=True needs a separate reference model; a LoRA run has none. Turn it off.")

        # TRL would reload the reference model from disk by path, which fails for a model that was never saved and is
        # wrong for one that changed since. So TRL is told that there is none, and gets a copy.
        args = copy.copy(args)
        beta, sync_ref_model, reference = args.beta, args.sync_ref_model, None
        if beta != 0.0 and isinstance(model, PreTrainedModel) and kwargs.get("peft_config") is None:
            if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
                raise ValueError(
                    "With ZeRO-3 and beta != 0 pass the model as a path or hub id, not as an object: its weights are "
                    "sharded and cannot be copied for the reference model."
                )
            reference = copy.deepcopy(model)
            args.beta, args.sync_ref_model = 0.0, False

        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if reference is not None:
            args.beta, args.sync_ref_model = beta, sync_ref_model
            self._adopt_reference(reference)

        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.accelerator.num_processes:
            raise RuntimeError(
                f"{launched} processes were launched, but each believes to be one of {self.accelerator.num_processes} "
                "and would train alone. On a CPU pass --use_cpu true for DDP, or --ddp_backend gloo for DeepSpeed."
            )
        self.family = family_of(self.model)
        self.eos_token_ids = sorted({*self.family.end_token_ids, self._tokenizer.eos_token_id})
        self._checkpointing_kwargs: Any = args.gradient_checkpointing_kwargs
        self._rollouts = {"train": 0, "eval": 0}
        self._trajectory: Trajectory | None = None
        self._scored: tuple[dict[str, torch.Tensor], Views] | None = None
        self._window_rows: dict[str, torch.Tensor] | None = None
        if is_peft_model(self.model) and self.accelerator.is_main_process:
            Console().print(coverage_table(lora_coverage(self.model)))

    def _adopt_reference(self, reference: PreTrainedModel) -> None:
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        self.beta = self.args.beta
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    # ---------------------------------------------------------------- rollout

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        mode = "train" if self.model.training else "eval"
        prompts, mask = self._pad_prompts(prompt_ids)
        purpose = TRAIN_ROLLOUT if mode == "train" else EVAL_ROLLOUT
        rows = self._global_rows(len(prompt_ids))
        generators = row_generators(self.args.seed, purpose, self._rollouts[mode], rows=rows.tolist())
        start = time.perf_counter()
        with (
            profiling_context(self, "diffusion.sample"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self._checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            trajectory = sample(
                model, prompts, mask, self.args.sampling_config(), generators, any_process=self._any_process()
            )
        self._trajectory = trajectory
        self._log_rollout(mode, trajectory, time.perf_counter() - start)
        lengths = self.family.effective_length(trajectory.completion_ids).tolist()
        completions = [ids[:n] for ids, n in zip(trajectory.completion_ids.tolist(), lengths, strict=True)]
        return completions, None

    def _pad_prompts(self, prompt_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.tensor(ids) for ids in prompt_ids]
        padding: dict[str, Any] = {"padding_side": "left", "pad_to_multiple_of": self.pad_to_multiple_of}
        ids = pad(rows, padding_value=self._tokenizer.pad_token_id, **padding)
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, **padding)
        return ids.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _global_rows(self, count: int) -> torch.Tensor:
        """Index (prompt · G + g) of this process's rows in the batch of all processes."""
        return torch.arange(count, device=self.accelerator.device) + self.accelerator.process_index * count

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
                trajectory.steps_taken.sum().float(),
                sampled.sum().float(),
                (self.family.is_end(trajectory.completion_ids) & sampled).sum().float(),
                torch.tensor(float(len(sampled)), device=sampled.device),
            ]
        )
        steps, tokens, ends, rows = self.accelerator.reduce(statistics, reduction="sum").tolist()
        metrics = self._metrics[mode]
        metrics["rollout/denoising_steps"].append(steps / rows)
        metrics["rollout/tokens_per_forward"].append(tokens / steps)
        metrics["rollout/eos_share"].append(ends / tokens)
        metrics["rollout/seconds"].append(seconds)

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        output = super()._generate_and_score_completions(inputs)
        trajectory, self._trajectory = self._trajectory, None
        assert trajectory is not None
        # TRL empties the mask of a completion that `mask_truncated_completions` drops
        learns = output["completion_mask"].any(1)
        output |= self._plan(mode, trajectory, learns)
        output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        self._rollouts[mode] += 1
        if self.beta != 0.0:
            output["ref_per_token_logps"] = self._reference_logps(output)
        return output

    def _plan(self, mode: str, trajectory: Trajectory, learns: torch.Tensor) -> dict[str, torch.Tensor]:
        """Per-row tensors that hold the trajectory, once, and the views of every inner update.

        Returns:
            `view_steps` long and `view_weights` float32, [B, μ, M], and the trajectory's own tensors.
        """
        args, config = self.args, self.args.sampling_config()
        num_eligible = eligible_steps(
            trajectory.completion_ids,
            trajectory.unmask_step,
            self.family,
            args.step_scope,
            config.block_length,
            config.steps_per_block,
        )
        rows = self._global_rows(len(learns))
        updates = [
            self._draw_steps(trajectory, num_eligible, mode, update, rows)
            for update in range(self.num_iterations if mode == "train" else 1)
        ]
        eligible = (trajectory.unmask_step >= 0) & (trajectory.unmask_step < num_eligible.unsqueeze(1))
        plan = {
            "completion_ids": trajectory.completion_ids,
            "completion_mask": (eligible & learns.unsqueeze(1)).long(),
            "unmask_step": trajectory.unmask_step,
            "old_per_token_logps": trajectory.logps,
            "view_steps": torch.stack([draws.steps for draws in updates], dim=1),
            "view_weights": torch.stack([draws.weights for draws in updates], dim=1),
            "global_row": rows,
        }
        if trajectory.support is not None:
            plan["support"] = trajectory.support
        return plan

    def _draw_steps(
        self, trajectory: Trajectory, num_eligible: torch.Tensor, mode: str, update: int, rows: torch.Tensor
    ) -> StepDraws:
        """The denoising steps that learn in one inner update, [B, M]."""
        purpose = TRAIN_VIEWS if mode == "train" else EVAL_VIEWS
        generators = row_generators(self.args.seed, purpose, self._rollouts[mode], update, rows=rows.tolist())
        probabilities = step_probabilities(
            trajectory.entropies,
            trajectory.unmask_step,
            num_eligible,
            self.args.denoising_steps,
            self.args.step_draws,
        )
        noise = uniforms(generators, self.args.num_mc_samples).to(probabilities.device)
        return draw_steps(probabilities, num_eligible, noise, self.args.step_reduction)

    # ---------------------------------------------------------------- likelihood

    def _view_of(self, rows: dict[str, torch.Tensor], update: int, view: int) -> Views:
        steps = rows["view_steps"][:, update, view]
        views = trajectory_views(rows["completion_ids"], rows["unmask_step"], steps, self.family.mask_token_id)
        views.targets &= rows["completion_mask"].bool()
        return views

    def _score(self, model, rows: dict[str, torch.Tensor], views: Views) -> Scores:
        with self.accelerator.autocast():
            return score_views(
                model,
                rows["prompt_ids"],
                rows["prompt_mask"],
                rows["completion_ids"],
                views,
                self.temperature,
                rows.get("support"),
            )

    @torch.no_grad()
    def _reference_logps(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities [B, L] under the reference model of every token that some view asks for."""
        adapter: AbstractContextManager
        if self.ref_model is not None:
            model, adapter = self.ref_model, nullcontext()
        else:
            peft_model = self.accelerator.unwrap_model(self.model)
            model, adapter = self.model, use_adapter(peft_model, "ref" if "ref" in peft_model.peft_config else None)
        size = self.args.per_device_train_batch_size
        logps = torch.zeros_like(rows["old_per_token_logps"])
        was_training = model.training
        model.eval()
        try:
            with adapter, disable_gradient_checkpointing(self.model, self._checkpointing_kwargs):
                # Always every view: where weights are sharded, all processes must run the same number of forwards.
                for update in range(rows["view_steps"].size(1)):
                    for view in range(rows["view_steps"].size(2)):
                        for start in range(0, len(logps), size):
                            part = {k: v[start : start + size] for k, v in rows.items() if v.dim() > 0}
                            views = self._view_of(part, update, view)
                            scored = self._score(model, part, views).logps
                            logps[start : start + size] = torch.where(
                                views.targets, scored, logps[start : start + size]
                            )
        finally:
            model.train(was_training)
        return logps

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._scored is None:  # TRL asks while it makes a rollout; `_plan` attaches what it would have computed
            return None, None, None
        rows, views = self._scored
        scores = self._score(model, rows, views)
        inner_update, micro_batch = self._place_in_buffer()
        if self.model.training and inner_update == 0 and micro_batch < self.current_gradient_accumulation_steps:
            self._log_log_ratio(scores.logps.detach() - rows["old_per_token_logps"] * views.targets)
        return scores.logps, scores.entropies, None

    def _place_in_buffer(self) -> tuple[int, int]:
        """How often the rollout batch was gone through before, and the micro-batch within it."""
        passes, micro_batch = divmod(self._step, int(self.args.steps_per_generation or 1))
        return passes % self.num_iterations, micro_batch

    def _log_log_ratio(self, log_ratio: torch.Tensor) -> None:
        largest = self.accelerator.gather(log_ratio.abs().max()).max().item()
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
        losses = [self._view_loss(model, inputs, 0, view) for view in range(self.args.num_mc_samples)]
        return torch.stack(losses).sum()

    def _view_loss(self, model, rows: dict[str, torch.Tensor], update: int, view: int) -> torch.Tensor:
        """TRL's loss of one view, divided by the number of views."""
        views = self._view_of(rows, update, view)
        weights = rows["view_weights"][:, update, view].unsqueeze(1)
        targets = views.targets.long()
        advantages = rows["advantages"].unsqueeze(1).expand_as(targets)
        inputs = {
            "prompt_ids": rows["prompt_ids"],
            "prompt_mask": rows["prompt_mask"],
            "completion_ids": rows["completion_ids"],
            "completion_mask": targets,
            "num_items_in_batch": rows["num_items_in_batch"],
            "old_per_token_logps": rows["old_per_token_logps"] * targets,
        }
        if self.beta != 0.0:
            inputs["ref_per_token_logps"] = rows["ref_per_token_logps"] * targets
        if self.beta != 0.0 and self.args.weighted_views:
            # The KL must be weighted too: a float mask does it for the loss types that the config lets through.
            inputs |= {"advantages": advantages, "tool_mask": weights.expand_as(targets)}
        else:
            inputs["advantages"] = advantages * weights
        self._scored = rows, views
        try:
            return super()._compute_loss(model, inputs) / self.args.num_mc_samples
        finally:
            self._scored = None

    # ---------------------------------------------------------------- data and checkpoints

    def _get_train_sampler(self, dataset=None):
        of_trl: Any = super()._get_train_sampler(dataset)
        return _EpochRepeatSampler(
            data_source=of_trl.data_source,
            mini_repeat_count=of_trl.mini_repeat_count,
            batch_size=of_trl.batch_size,
            repeat_count=of_trl.repeat_count,
            shuffle=of_trl.shuffle,
            seed=of_trl.seed,
        )

    def evaluate(self, *args, **kwargs):
        self._rollouts["eval"] = 0  # every evaluation draws with the same noise
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        # TRL forgets where it is inside a rollout batch. Written first: a checkpoint with a trainer state has it.
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        os.makedirs(folder, exist_ok=True)
        state = {"step": self._step, "rollouts": self._rollouts, "buffer": self._buffered_inputs}
        torch.save(state, os.path.join(folder, self._rollout_state_name()))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, self._rollout_state_name())
        if not os.path.isfile(path):
            raise ValueError(
                f"{checkpoint} has no {self._rollout_state_name()}, so the run cannot go on where it left off. Resume "
                "with the number of processes that wrote it, from a checkpoint written by this trainer."
            )
        # by way of the CPU: torch.load does not know accelerate's device `cpu:0`
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._step, self._rollouts = state["step"], state["rollouts"]
        self._buffered_inputs = send_to_device(state["buffer"], self.accelerator.device)

    def _rollout_state_name(self) -> str:
        return f"rollout_state_{self.accelerator.process_index}.pt"
