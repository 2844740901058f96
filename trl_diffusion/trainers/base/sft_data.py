"""Check, tokenise and batch the rows of prompts and completions that masked SFT trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.runtime.arguments import check_dataset, check_rows, named_eval_datasets
from trl_diffusion.tokenization import encode_prompt, left_pad


def check_sft_data(train_dataset: Any, eval_dataset: Any, args: Any) -> None:
    """Refuse data sets from which nothing could be trained or measured, before the model is loaded.

    Args:
        train_dataset: the trainer's argument.
        eval_dataset: the trainer's argument, one data set or several by name.
        args: the trainer's config.

    Raises:
        TypeError: see `check_texts`.
        ValueError: see `check_texts`; or if there are fewer rows than one batch and incomplete batches are left out.
    """
    if train_dataset is not None:
        check_texts(train_dataset, "train_dataset")
    for name, rows in named_eval_datasets(eval_dataset).items():
        check_texts(rows, name)
    if train_dataset is not None and args.dataloader_drop_last:
        batch = args.train_batch_size * args.world_size
        check_rows(
            train_dataset,
            batch,
            f"dataloader_drop_last=True leaves out a batch of fewer than {batch} (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} × {args.world_size} processes)",
        )


def check_texts(dataset: Any, name: str) -> None:
    """Refuse something that is no data set of prompts and completions.

    Args:
        dataset: the trainer's argument.
        name: name of the argument, for messages.

    Raises:
        TypeError: if it is a stream or no data set.
        ValueError: if it has several splits, no rows, lacks a column, or a row has no prompt or no completion.
    """
    check_dataset(dataset, name, dict.fromkeys(("prompt", "completion"), "masked SFT"))
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"{name} is a stream, but masked SFT needs all rows: each is noised by its number, and its length is "
            "checked before training starts. Take a part of it, `Dataset.from_list(list(stream.take(n)))`."
        )
    check_rows(dataset, 1, "masked SFT needs one", name)
    for column in ("prompt", "completion"):
        if absent := [row for row, value in enumerate(dataset[column]) if value is None or value == []]:
            raise ValueError(
                f"{len(absent)} of {len(dataset)} rows of {name} have no {column}; the first is row {absent[0]}. Fill "
                "them in or leave these rows out."
            )


def tokenize_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, family: DiffusionFamily, max_completion_length: int
) -> Dataset:
    """Tokenise prompts and completions.

    Args:
        dataset: columns `prompt` and `completion`.
        tokenizer: with a chat template, if the rows are conversational.
        family: names the id that ends a turn, the last of its end set.
        max_completion_length: canvas length.

    Returns:
        Columns `prompt_ids`, `completion_ids` (with the turn-end id, without the tail) and `row`.

    Raises:
        ValueError: if a message is not text, a completion is not one assistant message, or completions do not fit.
    """
    rows = dataset.map(
        lambda row, index: {
            "prompt_ids": encode_prompt(_checked_text(row["prompt"]), tokenizer),
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


def completion_content(completion: str | list[dict[str, Any]]) -> str:
    """Return the text of a completion.

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
    _checked_text(completion)
    return completion[0]["content"]


def _checked_text(prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return the prompt if all its messages are text; a template for text would print other content as a list."""
    for message in [] if isinstance(prompt, str) else prompt:
        if not isinstance(message["content"], str):
            raise ValueError(
                f"The content of a message must be a string, got {message['content']!r}: only text is supported."
            )
    return prompt


def make_collator(tail_token_id: int, max_completion_length: int) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Make a collator that batches left-padded prompts and whole canvases.

    Returns:
        A function from rows to `prompt_ids` long [B, P], `prompt_mask` [B, P], `completion_ids` long [B, L] and `row`
        long [B].
    """

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        # Which id fills the padding does not matter: attention never reads it.
        prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows], tail_token_id)
        canvases = [
            row["completion_ids"] + [tail_token_id] * (max_completion_length - len(row["completion_ids"]))
            for row in rows
        ]
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": torch.tensor(canvases),
            "row": torch.tensor([row["row"] for row in rows]),
        }

    return collate
