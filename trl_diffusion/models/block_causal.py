"""The parts that families with block-causal attention share: the blocks, and the attention that can compute them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_diffusion.family import BLOCK_ORIGINS
from trl_diffusion.models.config import DiffusionConfigMixin
from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.validation import at_least, one_of

ATTENTION = ("eager", "sdpa")  # implementations that take a mask of their own for every query


@dataclass(kw_only=True, repr=False)
class BlockCausalConfigMixin(DiffusionConfigMixin):
    """Adds the blocks of attention to `DiffusionConfigMixin`.

    Args:
        block_size: tokens per attention block.
        block_origin: where the first block begins, `sequence` or `completion`, see `DiffusionFamily`.
    """

    block_size: int = 4
    block_origin: str = "sequence"

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        at_least("block_size", self.block_size, 1)
        one_of("block_origin", self.block_origin, BLOCK_ORIGINS)
        if keys.get("attn_implementation") == "flex_attention":  # published configs name it for their own code
            del keys["attn_implementation"]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Check the attention asked of `from_pretrained`, which from here on looks like a key of `config.json`."""
        check_block_attention(cls.__name__.removesuffix("Config"), kwargs.get("attn_implementation"))
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]  # the stock config comes next


class BlockCausalLM(DiffusionLM):
    """Mixin that turns a stock `…ForCausalLM` into a diffusion language model with block-causal attention.

    Raises:
        ValueError: if the attention implementation does not take block-causal masks.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        check_block_attention(type(config).__name__.removesuffix("Config"), config._attn_implementation)
        self.attention_block, self.block_origin = config.block_size, config.block_origin


def check_block_attention(name: str, implementation: Any) -> None:
    """Refuse an attention implementation that takes no mask of its own for every query.

    Args:
        name: of the family, for the message.
        implementation: what was asked for, `None` for the default.

    Raises:
        ValueError: if it is not one of `ATTENTION`.
    """
    if implementation is not None and implementation not in ATTENTION:
        raise ValueError(
            f"{name}'s block-causal attention runs with attn_implementation {' or '.join(map(repr, ATTENTION))}; "
            f"got {implementation!r}."
        )
