"""Facts of a diffusion language model that sampling, scoring and losses need: special tokens, shift, attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Where the first block of block-causal attention begins: at the first token of the prompt, or of the completion.
BLOCK_ORIGINS = ("sequence", "completion")


@dataclass(frozen=True)
class DiffusionFamily:
    """Facts of a diffusion language model (dLLM) that sampling and scoring depend on.

    Args:
        name: model type, as in the checkpoint's `config.json` (for example `"llada"`).
        mask_token_id: the mask token *m*, which stands for a position without a token yet.
        num_tokens: ids `>= num_tokens` are rows of the embedding without a token; they are never sampled.
        end_token_ids: the end set, ids that end a text (for LLaDA `<|eot_id|>` and `<|endoftext|>`).
        tail_token_id: the end id that fills the canvas after a finished text (`<|endoftext|>`).
        logit_shift: 0 if the logits at position i predict the token at i, 1 if they predict the token at i + 1.
        attention_block: `None` for full attention, else the block size of block-causal attention.
        block_origin: the token from which blocks are counted, the first one of the `sequence` or of the `completion`.
            From the start of the sequence, the last tokens of a prompt that does not fill its last block share that
            block with the first tokens of the completion.
    """

    name: str
    mask_token_id: int
    num_tokens: int
    end_token_ids: tuple[int, ...]
    tail_token_id: int
    logit_shift: int = 0
    attention_block: int | None = None
    block_origin: str = "completion"

    @property
    def longest_prompt_tail(self) -> int:
        """The most tokens of a prompt that can share a block of attention with its completion."""
        if self.attention_block is None or self.block_origin == "completion":
            return 0
        return self.attention_block - 1

    def prompt_tail(self, prompt_lengths: torch.Tensor) -> torch.Tensor:
        """Count the last tokens of each prompt that share a block of attention with its completion.

        Args:
            prompt_lengths: long [B], tokens of each prompt.

        Returns:
            Long [B], below the block size; zeros where blocks begin with the completion, and with full attention.
        """
        return prompt_lengths % (self.longest_prompt_tail + 1)

    def exclude_never_sampled(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the logits of the mask token and of unused ids to -inf, in place.

        Args:
            logits: float tensor [..., V].

        Returns:
            The same tensor.
        """
        logits[..., self.mask_token_id] = -torch.inf
        logits[..., self.num_tokens :] = -torch.inf
        return logits

    def is_end(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return which ids belong to the end set: bool tensor, same shape as `token_ids`."""
        return torch.isin(token_ids, torch.tensor(self.end_token_ids, device=token_ids.device))

    def effective_length(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """Count the tokens up to and including the first end id (the canvas length if there is none).

        Args:
            completion_ids: long tensor [B, L].

        Returns:
            Long tensor [B].
        """
        is_end = self.is_end(completion_ids)
        length = completion_ids.size(1)
        return torch.where(is_end.any(1), is_end.int().argmax(1) + 1, length)


# Model types of the families that `trl_diffusion.models.families.register` has made known, in this order.
MODEL_TYPES: dict[str, None] = {}


class HasFamily:
    """Base class of the native models, by which code that imports no model recognises them."""

    @property
    def family(self) -> DiffusionFamily:
        """The facts of this model."""
        raise NotImplementedError


def family_of(model: Any) -> DiffusionFamily:
    """Return the `DiffusionFamily` of a native model, also of one inside of a PEFT wrapper.

    Raises:
        TypeError: if the model is not one of this library's diffusion language models.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, HasFamily):
        raise TypeError(
            f"{type(base).__name__} is not a diffusion language model known to trl_diffusion. Load one of the "
            f"supported families ({', '.join(MODEL_TYPES)}) by name with AutoModelForCausalLM after "
            "`import trl_diffusion`; "
            "if this is such a checkpoint, make sure that its config.json has the family's `model_type` and that "
            "`architectures` does not name a stock transformers class."
        )
    return base.family
