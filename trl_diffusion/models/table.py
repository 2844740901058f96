"""One table of all families: their published checkpoints with sizes, special tokens and attention.

The documentation's page on models holds it; `python -m trl_diffusion.models.table` prints it as it stands there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_diffusion.models.families import FAMILIES
from trl_diffusion.models.published import PUBLISHED, published_config


@dataclass(frozen=True)
class FamilyRow:
    """Published checkpoints of one network.

    Args:
        model_type: of the family.
        checkpoints: ids on the Hub whose sizes are the same.
        class_name: of the native class.
        stock_class: of transformers that it computes as.
        parameters: how many.
        mask_token_id: the mask token.
        end_token_ids: ids that end a text, without those that are read from a tokenizer only.
        attention_block: `None` for full attention, else the block size of block-causal attention.
        logit_shift: 1 if the logits at position i predict the token at i + 1, else 0.
    """

    model_type: str
    checkpoints: tuple[str, ...]
    class_name: str
    stock_class: str
    parameters: int
    mask_token_id: int
    end_token_ids: tuple[int, ...]
    attention_block: int | None
    logit_shift: int


def family_table() -> list[FamilyRow]:
    """Return a row for every network whose sizes come with this library, built without weights."""
    alike: dict[str, list[str]] = {}
    for name in PUBLISHED:
        config_class, sizes = PUBLISHED[name]
        alike.setdefault(f"{config_class.__name__} {sizes}", []).append(name)
    return [_row(names) for names in alike.values()]


def _row(names: list[str]) -> FamilyRow:
    config = published_config(names[0])
    model_class = FAMILIES[type(config)]
    with torch.device("meta"):
        model: Any = model_class(config)
    stock = next(base for base in model_class.__mro__ if base.__module__.startswith("transformers.models."))
    return FamilyRow(
        model_type=config.model_type,
        checkpoints=tuple(names),
        class_name=model_class.__name__,
        stock_class=stock.__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mask_token_id=model.family.mask_token_id,
        end_token_ids=model.family.end_token_ids,
        attention_block=model.family.attention_block,
        logit_shift=model.family.logit_shift,
    )


def as_markdown(rows: list[FamilyRow]) -> str:
    """Format the table for the documentation."""
    lines = [
        "| `model_type` | checkpoints | class, stock class | parameters | mask | end ids | attention |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        attention = "full" if row.attention_block is None else f"blocks of {row.attention_block}"
        cells = [
            f"`{row.model_type}`",
            ", ".join(name.partition("/")[2] for name in row.checkpoints),
            f"`{row.class_name}`, `{row.stock_class}`",
            f"{row.parameters / 1e9:.1f} billion",
            str(row.mask_token_id),
            ", ".join(map(str, row.end_token_ids)),
            f"{attention}, logits shifted by 1" if row.logit_shift else attention,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown(family_table()))
