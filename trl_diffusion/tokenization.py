"""Turn prompts into token ids, in the same way for training, evaluation and analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad


def encode_prompt(
    prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any
) -> list[int]:
    """Return the token ids of a prompt; a final assistant message is the beginning of the answer, to be continued.

    Args:
        prompt: a text, or messages that go through the chat template.
        tokenizer: with a chat template, if the prompt is a list of messages.
        **template_kwargs: further arguments of the template, such as TRL's `chat_template_kwargs`.

    Raises:
        ValueError: if a message holds more than text, or the last one is the assistant's and its content is not a
            string.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    parts = [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
    if other := [part["type"] for part in parts if part["type"] != "text"]:
        raise ValueError(
            f"A message of a prompt has a part of type {other[0]!r}; only text is supported. Remove the part."
        )
    # The template would end an assistant message with the token that ends a turn, so its text is put after the header
    # of the answer instead.
    begun = prompt[-1]["role"] == "assistant"
    beginning = prompt[-1]["content"] if begun else ""
    if not isinstance(beginning, str):
        raise ValueError(
            f"The last message of a prompt is of the assistant, and its content is {beginning!r}. As the beginning of "
            "the answer it must be a string."
        )
    turns = prompt[:-1] if begun else prompt
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **template_kwargs)
    return tokenizer(f"{text}{beginning}", add_special_tokens=False)["input_ids"]


def left_pad(
    rows: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids of different length on the left.

    Args:
        rows: B lists of ids; at least one.
        pad_token_id: fills the padding.
        pad_to_multiple_of: round P up to a multiple of this.

    Returns:
        (ids long [B, P]; mask long [B, P], 0 on padding), with P the length of the longest row.
    """
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]  # the type is given for rows that are empty
    masks = [torch.ones_like(row) for row in ids]
    padding: dict[str, Any] = {"padding_side": "left", "pad_to_multiple_of": pad_to_multiple_of}
    return pad(ids, padding_value=pad_token_id, **padding), pad(masks, padding_value=0, **padding)
