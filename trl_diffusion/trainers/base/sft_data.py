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
        dataset: columns `prompt` and `completion`; with a column `unscored`, spans of the completion's characters that
            are shown and not scored.
        tokenizer: with a chat template, if the rows are conversational.
        family: names the id that ends a turn, the last of its end set.
        max_completion_length: canvas length.

    Returns:
        Columns `prompt_ids`, `completion_ids` (with the turn-end id, without the tail), `shown` (the numbers of the
        tokens in `completion_ids` that are not scored) and `row`.

    Raises:
        ValueError: if a message is not text, a completion is not one assistant message, completions do not fit, or a
            span of `unscored` does not lie in its text.
    """

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        text, spans = completion_content(row["completion"]), row.get("unscored") or []
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(spans))
        return {
            "prompt_ids": encode_prompt(_checked_text(row["prompt"]), tokenizer),
            "completion_ids": [*encoded["input_ids"], family.end_token_ids[-1]],
            "shown": _tokens_of(_checked_spans(spans, text, index), encoded["offset_mapping"]) if spans else [],
            "row": index,
        }

    if "unscored" in dataset.column_names and not tokenizer.is_fast:
        raise ValueError(
            f"The column `unscored` gives spans of characters, and a {type(tokenizer).__name__} does not say which "
            "characters a token has. Use a fast tokenizer, or leave the column out."
        )
    rows = dataset.map(
        tokenize,
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


def _checked_spans(spans: Any, text: str, row: int) -> list[list[int]]:
    """Return the spans of a row if each of them lies in its text."""
    for span in spans:
        if len(span) != 2 or not 0 <= span[0] < span[1] <= len(text):
            raise ValueError(
                f"Row {row} has {span!r} in `unscored`, which is no span of its completion of {len(text)} characters. "
                "Give [start, end) with 0 ≤ start < end ≤ the number of characters."
            )
    return spans


def _tokens_of(spans: list[list[int]], offsets: list[tuple[int, int]]) -> list[int]:
    """Return the numbers of the tokens that share a character with a span."""
    return [
        number
        for number, (start, end) in enumerate(offsets)
        if any(start < span_end and span_start < end for span_start, span_end in spans)
    ]


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
        A function from rows to `prompt_ids` long [B, P], `prompt_mask` [B, P], `completion_ids` long [B, L], `scored`
        bool [B, L] and `row` long [B].
    """

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        # Which id fills the padding does not matter: attention never reads it.
        prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows], tail_token_id)
        canvases = [
            row["completion_ids"] + [tail_token_id] * (max_completion_length - len(row["completion_ids"]))
            for row in rows
        ]
        scored = torch.ones(len(rows), max_completion_length, dtype=torch.bool)
        for row, own in zip(rows, scored, strict=True):
            own[row["shown"]] = False
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": torch.tensor(canvases),
            "scored": scored,
            "row": torch.tensor([row["row"] for row in rows]),
        }

    return collate
