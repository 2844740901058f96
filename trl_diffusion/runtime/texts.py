"""Canvases as the texts that reward functions judge."""

from __future__ import annotations

from typing import Any

import torch
from trl.data_utils import is_conversational

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.rollout import FinishedBatch


def arguments_of_rewards(
    rows: list[int],
    canvases: torch.Tensor,
    finished: FinishedBatch,
    family: DiffusionFamily,
    tokenizer: Any,
    trainer_state: Any,
) -> dict[str, Any]:
    """Return the arguments with which a reward function judges other completions of a rollout's prompts.

    Args:
        rows: R places in the rollout, whose prompts and columns the completions share; at least one.
        canvases: long [R, L].
        finished: the rollout's own texts.
        family: of the model.
        tokenizer: of the model.
        trainer_state: transformers' state of the run.
    """
    lengths = family.effective_length(canvases).tolist()
    completion_ids = [ids[:n] for ids, n in zip(canvases.tolist(), lengths, strict=True)]
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids]
    prompts = [finished.prompts[row] for row in rows]
    conversational = is_conversational({"prompt": prompts[0]})
    return {
        "prompts": prompts,
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
        "completion_ids": completion_ids,
        **finished.columns(rows),
        "trainer_state": trainer_state,
        # What a reward function logs is about the finished texts, one entry each.
        "log_extra": ignore,
        "log_metric": ignore,
    }


def ignore(*args, **kwargs) -> None:
    """In place of the logging that TRL offers to reward functions."""
