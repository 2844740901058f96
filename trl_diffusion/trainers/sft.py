"""Masked supervised fine-tuning of diffusion language models, as in d1 (2504.12216) and LLaDA (2502.09992).

Every answer is noised at its own level t ~ U(1e-3, 1): each of its positions is masked with probability t, and the
loss is the sum of cross-entropy / t over masked positions, divided by the number of answer positions. The answer is
the completion, the id that ends a turn, and the tail id up to the end of the canvas, which is trained like the rest so
that the network learns where texts end. Prompts are never masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

from trl_diffusion.likelihood import noised_views, score_views
from trl_diffusion.models import DiffusionFamily, family_of
from trl_diffusion.sampling import row_generators
from trl_diffusion.trainers.adapter_setup import native_peft_config
from trl_diffusion.trainers.backends import check_backend
from trl_diffusion.trainers.checkpoints import Checkpoints, ResumeConfig
from trl_diffusion.trainers.model_card import card_arguments, complete_card

# Keeps the noise of training and of evaluation apart.
_TRAIN, _EVAL = 0, 1


@dataclass
class SFTConfig(ResumeConfig, _BaseConfig):
    """Configuration of [`SFTTrainer`]; defaults are d1's (2504.12216).

    The fields of `transformers.TrainingArguments` are there too; those below are new or have another default.
    """

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
    model_init_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained`, such as `dtype`, where the model is given by name."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_noise_level <= 1:
            raise ValueError(f"min_noise_level must lie in (0, 1], got {self.min_noise_level}.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}.")


class SFTTrainer(Checkpoints, _BaseTrainer):
    """Masked supervised fine-tuning.

    Args:
        model: a diffusion language model, or its name or path.
        args: configuration; d1's defaults if not given.
        train_dataset: columns `prompt` and `completion`, both strings or both lists of messages. Messages of the
            prompt go through the chat template; the completion is one assistant message.
        eval_dataset: same form. Its noise is the same at every evaluation, so that losses can be compared.
        processing_class: the tokenizer; loaded from the model's name if not given.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`.
        peft_config: trains an adapter if given.

    Raises:
        ValueError: if a column is missing or a completion does not fit on the canvas.
        TypeError: if the model is not a diffusion language model.
    """

    _tag_names = ["trl", "sft", "diffusion"]
    _name = "masked SFT"
    _paper = {
        "title": "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
        "id": "2504.12216",
    }
    # Every row has the same number of answer positions, so the mean over a micro-batch is all the scaling there is,
    # and Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False  # type: ignore[assignment]

    args: SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        args = args or SFTConfig()
        check_backend(args)
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
        self.family = family_of(model)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        if peft_config is not None:
            peft_config = native_peft_config(peft_config, model, args.model_init_kwargs)
            model = get_peft_model(model, peft_config)  # type: ignore[assignment, arg-type]
            if args.gradient_checkpointing:
                model.enable_input_require_grads()
        model.config.use_cache = False

        def tokenize(dataset: Dataset) -> Dataset:
            return tokenize_dataset(dataset, processing_class, self.family, args.max_completion_length)

        if isinstance(eval_dataset, dict):
            eval_dataset = {name: tokenize(dataset) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = tokenize(eval_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if train_dataset is None else tokenize(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=make_collator(self.family.tail_token_id, args.max_completion_length),
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):  # type: ignore[override]  # as TRL's
        super().create_model_card(**card_arguments(self, model_name, dataset_name), tags=tags)
        if self.is_world_process_zero():
            complete_card(self, dataset_name, {"max_new_tokens": self.args.max_completion_length})

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", "row"]  # type: ignore[assignment]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The masked loss of a micro-batch, with noise keyed by (seed, update, row of the data set)."""
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
        )
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.mean().detach(), None, None


def draw_noise(
    *key: int, rows: Sequence[int], length: int, min_noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise level and mask of every row, each from its own stream.

    Args:
        *key: non-negative integers, such as (seed, purpose, update).
        rows: the row of the data set that each answer comes from.
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
) -> torch.Tensor:
    """Sum of cross-entropy / t over masked positions ÷ number of answer positions (2504.12216), mean over rows.

    With block-causal attention every block is noised beside the finished ones before it, all in one pass (2503.09573).

    Args:
        model: a diffusion language model, also behind a wrapper.
        prompt_ids: long [B, P], left-padded.
        prompt_mask: [B, P], 0 on padding.
        completion_ids: long [B, L], the whole canvas.
        masked: bool [B, L].
        level: float32 [B], the noise level t of each row.
        family: names the mask token and the kind of attention.

    Returns:
        Scalar, in nats per answer position.
    """
    views = noised_views(
        completion_ids,
        masked,
        masked,
        family.mask_token_id,
        beside_context=family.attention_block is not None,
    )
    logps = score_views(model, prompt_ids, prompt_mask, completion_ids, views).logps
    return -(logps / level.unsqueeze(1)).mean()


def tokenize_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, family: DiffusionFamily, max_completion_length: int
) -> Dataset:
    """Token ids of prompts and completions.

    Args:
        dataset: columns `prompt` and `completion`.
        tokenizer: with a chat template, if the rows are conversational.
        family: names the id that ends a turn, the last of its end set.
        max_completion_length: canvas length.

    Returns:
        Columns `prompt_ids`, `completion_ids` (with the turn-end id, without the tail) and `row`.

    Raises:
        ValueError: if a column is missing, a completion is not one assistant message, or completions do not fit.
    """
    if missing := {"prompt", "completion"} - set(dataset.column_names):
        raise ValueError(
            f"SFT needs the columns `prompt` and `completion`; {sorted(missing)} missing, found "
            f"{sorted(dataset.column_names)}. Rename or build them, see trl_diffusion.tasks for examples."
        )
    rows = dataset.map(
        lambda row, index: {
            "prompt_ids": prompt_token_ids(row["prompt"], tokenizer),
            "completion_ids": [
                *tokenizer(completion_content(row["completion"]), add_special_tokens=False)["input_ids"],
                family.end_token_ids[-1],
            ],
            "row": index,
        },
        with_indices=True,
        remove_columns=dataset.column_names,
        desc="Tokenizing",
    )
    lengths = [len(ids) for ids in rows["completion_ids"]]
    if too_long := [length for length in lengths if length > max_completion_length]:
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} completions do not fit on a canvas of max_completion_length="
            f"{max_completion_length} positions (the longest needs {max(too_long)}, its turn-end id included). Raise "
            "max_completion_length or filter the data set."
        )
    return rows


def prompt_token_ids(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, through the chat template if it is a list of messages."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def completion_content(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion.

    Raises:
        ValueError: if it is neither a string nor one assistant message.
    """
    if isinstance(completion, str):
        return completion
    if [message["role"] for message in completion] != ["assistant"]:
        raise ValueError(
            f"A completion must be a string or one assistant message, got {completion!r}. Move earlier turns to "
            "`prompt`."
        )
    return completion[0]["content"]


def make_collator(tail_token_id: int, max_completion_length: int) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Batches of left-padded prompts and of whole canvases.

    Returns:
        A function of rows to `prompt_ids` long [B, P], `prompt_mask` [B, P], `completion_ids` long [B, L] and `row`
        long [B].
    """

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["prompt_ids"]) for row in rows)
        padding = [width - len(row["prompt_ids"]) for row in rows]
        canvases = [
            row["completion_ids"] + [tail_token_id] * (max_completion_length - len(row["completion_ids"]))
            for row in rows
        ]
        return {
            # Which id fills the padding does not matter: attention never reads it.
            "prompt_ids": torch.tensor(
                [[tail_token_id] * pad + row["prompt_ids"] for pad, row in zip(padding, rows, strict=True)]
            ),
            "prompt_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
            "completion_ids": torch.tensor(canvases),
            "row": torch.tensor([row["row"] for row in rows]),
        }

    return collate
