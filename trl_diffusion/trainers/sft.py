"""Masked supervised fine-tuning of diffusion language models, as in d1 (2504.12216) and LLaDA (2502.09992).

Every answer is noised at its own level t ~ U(1e-3, 1): each of its positions is masked with probability t. The loss is
the sum of cross-entropy / t over masked positions, divided by the number of answer positions. The answer consists of
the completion, the id that ends a turn, and the tail id up to the end of the canvas. The tail is trained like the
rest, so that the network learns where texts end. Prompts are never masked, and neither are spans of an answer that a
data set marks as `unscored`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import get_config_model_id

from trl_diffusion.family import DiffusionFamily, family_of
from trl_diffusion.likelihood import noised_views, score_views
from trl_diffusion.runtime.arguments import check_arguments, check_load_arguments
from trl_diffusion.runtime.checkpoints import Checkpoints, ResumeConfig
from trl_diffusion.runtime.fusing import FusingConfig, fuse_models
from trl_diffusion.runtime.guards import UpdateGuardConfig
from trl_diffusion.runtime.launch import LaunchedConfig, check_backend, check_device_map, fit_to_cpu
from trl_diffusion.runtime.meter import Meter
from trl_diffusion.runtime.model_card import ModelCards
from trl_diffusion.runtime.sft_report import SFTRun, padded_prompts, sft_figures, sft_report
from trl_diffusion.runtime.update_guard import GuardedUpdates
from trl_diffusion.sampling import row_generators
from trl_diffusion.sampling.positions import check_fits
from trl_diffusion.tokenization import encode_prompt as prompt_token_ids  # noqa: F401  # the import path it had
from trl_diffusion.trainers.base.sft_data import check_sft_data, make_collator, tokenize_dataset
from trl_diffusion.trainers.base.sft_data import completion_content as completion_content  # the import path it had
from trl_diffusion.trainers.base.sft_model import load_arguments, load_policy
from trl_diffusion.validation import at_least

# First element of the key of a noise stream, so that training and evaluation do not share noise.
_TRAIN, _EVAL = 0, 1
_PARTS = ("prompt", "completion")


@dataclass
class SFTConfig(LaunchedConfig, UpdateGuardConfig, ResumeConfig, FusingConfig, _BaseConfig):
    """Configuration of [`SFTTrainer`]; defaults are d1's (2504.12216).

    It has all fields of `transformers.TrainingArguments`; those below are new or have another default.

    Raises:
        ValueError: if a value is out of its range, or a setting has no meaning for this loss.
    """

    # Fields that are given as JSON on the command line.
    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Passes over the data set."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Micro-batches per update."})

    max_completion_length: int = field(
        default=256,
        metadata={
            "help": "Canvas length: completion, turn-end id and tail. A row that does not fit is an error, because a "
            "cut answer would teach the network to stop early or never."
        },
    )
    min_noise_level: float = field(
        default=1e-3, metadata={"help": "Smallest noise level t; the largest is 1. The loss has the weight 1/t."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained`, such as `dtype`, where the model is given by name."},
    )

    def __post_init__(self) -> None:
        fit_to_cpu(self)
        super().__post_init__()
        if not 0 < self.min_noise_level <= 1:
            raise ValueError(f"min_noise_level must lie in (0, 1], got {self.min_noise_level}.")
        at_least("max_completion_length", self.max_completion_length, 1)
        self.check_guards()
        refused = {
            "label_smoothing_factor": (self.label_smoothing_factor != 0, "the masked loss scores the data's tokens"),
            "use_liger_kernel": (self.use_liger_kernel, "it replaces the forward pass that scores noised views"),
            "hub_token": (
                self.hub_token is not None,
                "it would be saved in training_args.bin and pushed with it; use `hf auth login` or HF_TOKEN",
            ),
        }
        for name, (is_set, reason) in refused.items():
            if is_set:
                raise ValueError(f"SFTConfig does not support `{name}`: {reason}. Leave it at its default.")


class SFTTrainer(ModelCards, Checkpoints, GuardedUpdates, _BaseTrainer):  # type: ignore[misc]
    """Masked supervised fine-tuning.

    Args:
        model: a diffusion language model, or a `PeftModel` around one, or its name or path, which is loaded in
            float32 unless `model_init_kwargs` says otherwise.
        args: configuration; d1's defaults if not given.
        train_dataset: columns `prompt` and `completion`, both strings or both lists of messages. Messages of the
            prompt go through the chat template; the completion is one assistant message. A column `unscored`, if
            there is one, lists spans [start, end) of the completion's characters. Their tokens are treated as the
            prompt's: always shown, never scored.
        eval_dataset: in the same form. Its noise is the same at every evaluation, so that losses can be compared.
        processing_class: the tokenizer; loaded from the model's name if not given.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`.
        peft_config: trains a new adapter if given. Its weights depend on `args.seed` alone.
        quantization_config: how a model given by name is quantised while it is loaded; with an adapter only.

    Raises:
        ValueError: if a column is missing, rows are too few for one update, a completion does not fit on the canvas,
            or a prompt and the canvas do not fit into the model's positions.
        TypeError: if the model is not a diffusion language model, or `args` is not an `SFTConfig`.
        RuntimeError: if several processes were launched and each would train alone.
    """

    _tag_names = ["trl", "sft", "diffusion"]
    _name = "masked SFT"
    _paper = {
        "title": "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
        "id": "2504.12216",
    }
    # Every row has the same number of answer positions, so the loss is a mean over the micro-batch and Trainer has to
    # divide by the accumulation steps.
    loss_is_scaled_for_ga = False  # type: ignore[assignment]

    args: SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
    ):
        args = args or SFTConfig()
        if not isinstance(args, SFTConfig):
            raise TypeError(f"args must be an SFTConfig, got {type(args).__name__}.")
        check_backend(args)
        check_arguments(processing_class, {})
        check_load_arguments(args.model_init_kwargs)
        check_sft_data(train_dataset, eval_dataset, args)
        set_seed(args.seed)  # before the weights of a new adapter are drawn
        policy = load_policy(model, args, peft_config, quantization_config)
        self.family = family_of(policy)
        if processing_class is None:
            name = get_config_model_id(policy.config)
            processing_class = AutoTokenizer.from_pretrained(name, revision=load_arguments(args).get("revision"))

        def tokenize(dataset: Dataset) -> Dataset:
            rows = tokenize_dataset(dataset, processing_class, self.family, args.max_completion_length)
            check_fits(policy, max(map(len, rows["prompt_ids"])), args.max_completion_length, "the data set")
            return rows

        if isinstance(eval_dataset, dict):
            eval_dataset = {name: tokenize(rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = tokenize(eval_dataset)
        super().__init__(
            model=policy,
            args=args,
            train_dataset=None if train_dataset is None else tokenize(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=make_collator(self.family.tail_token_id, args.max_completion_length),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_device_map(self.model)
        self.check_update_policy()
        fuse_models(args, self.model)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.meter = Meter(self.accelerator, self._metrics)

    def train(self, *args, **kwargs):
        """Train as TRL does; with the progress bar (`disable_tqdm=False`) print the start-up report first."""
        if self.train_dataset is not None and not self.args.disable_tqdm:
            self.print_report()
        return super().train(*args, **kwargs)

    def print_report(self) -> None:
        """Print the start-up report, on the main process only."""
        if self.accelerator.is_main_process:
            Console().print(sft_report(self.as_run()))

    figures = staticmethod(sft_figures)  # what a report is made of, from the values below

    def as_run(self) -> SFTRun:
        """Return the values from which the start-up report and the estimates of cost are computed."""
        rows: Any = self.train_dataset
        prompts, completions = ([len(ids) for ids in rows[f"{part}_ids"]] for part in _PARTS)
        return SFTRun.of(
            self,
            self.family,
            prompt_length=padded_prompts(prompts, self.args.per_device_train_batch_size),
            longest_prompt=max(prompts),
            completion_lengths=completions,
            evaluates=self.eval_dataset is not None,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with the means of the guards' metrics since the last log added."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        logs |= {name: sum(values) / len(values) for name, values in metrics.items()}
        metrics.clear()
        super().log(logs, start_time)

    def _run_state(self) -> dict[str, Any]:
        return {**super()._run_state(), "metrics": {mode: dict(values) for mode, values in self._metrics.items()}}

    def _take_back(self, state: dict[str, Any], checkpoint: Path) -> None:
        super()._take_back(state, checkpoint)
        for mode, metrics in state["metrics"].items():
            self._metrics[mode].update(metrics)

    def card_generation(self) -> dict[str, int]:
        """Arguments of `generate` for the example in the model card."""
        canvas = self.args.max_completion_length
        return {"max_new_tokens": canvas, "block_length": min(32, canvas), "denoising_steps": max(canvas // 2, 1)}

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", "shown", "row"]  # type: ignore[assignment]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the masked loss of a micro-batch, with noise keyed by (seed, update, row of the data set)."""
        key = (_TRAIN, self.state.global_step) if model.training else (_EVAL, 0)
        masked, level = draw_noise(
            self.args.seed,
            *key,
            rows=inputs["row"].tolist(),
            length=inputs["completion_ids"].size(1),
            min_noise_level=self.args.min_noise_level,
        )
        device = inputs["completion_ids"].device
        loss = masked_loss(
            model,
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["completion_ids"],
            masked.to(device),
            level.to(device),
            self.family,
            inputs["scored"],
        )
        self.look_at_loss(model, loss)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Compute the loss of an evaluation batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.mean().detach(), None, None


def draw_noise(
    *key: int, rows: Sequence[int], length: int, min_noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the noise level and mask of every row, each from its own stream.

    Args:
        *key: non-negative integers, such as (seed, purpose, update).
        rows: number in the data set of each answer's row.
        length: answer positions L.
        min_noise_level: smallest t.

    Returns:
        (masked bool [B, L]; level t float32 [B], uniform in [min_noise_level, 1)).
    """
    levels, masks = [], []
    for generator in row_generators(*key, rows=rows):
        levels.append(min_noise_level + (1 - min_noise_level) * generator.random())
        masks.append(torch.from_numpy(generator.random(length) < levels[-1]))
    return torch.stack(masks), torch.tensor(levels, dtype=torch.float32)


def masked_loss(
    model: torch.nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    masked: torch.Tensor,
    level: torch.Tensor,
    family: DiffusionFamily,
    scored: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return Σ cross-entropy / t over masked positions ÷ number of scored positions (2504.12216), mean over rows.

    With block-causal attention the clean answer is part of the input too, and every noised block sees the clean blocks
    before it, all in one forward pass (2503.09573).

    Args:
        model: a diffusion language model, wrapped or not.
        prompt_ids: long [B, P], left-padded.
        prompt_mask: [B, P], 0 on padding.
        completion_ids: long [B, L], the whole canvas.
        masked: bool [B, L].
        level: float32 [B], the noise level t of each row.
        family: names the mask token and the kind of attention.
        scored: bool [B, L], False where the answer is shown whatever `masked` says; every position is scored if not
            given.

    Returns:
        Scalar, in nats per scored position.
    """
    scored = torch.ones_like(masked) if scored is None else scored
    masked = masked & scored
    views = noised_views(
        completion_ids,
        masked,
        masked,
        family.mask_token_id,
        two_stream=family.attention_block is not None,
    )
    logps = score_views(model, prompt_ids, prompt_mask, completion_ids, views).logps
    return -((logps / level.unsqueeze(1)).sum(1) / scored.sum(1)).mean()
