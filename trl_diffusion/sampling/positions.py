"""Check that prompt and canvas fit into the positions of a model together."""

from __future__ import annotations

from typing import Any


def check_fits(model: Any, longest: int, canvas_length: int, what: str) -> None:
    """Refuse prompts that do not fit into the model's positions together with the canvas.

    Nothing else would raise: rotary embeddings are defined beyond the positions that the network was trained on, but
    what it computes there is noise.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        longest: tokens of the longest prompt.
        canvas_length: positions to write.
        what: the origin of the prompts, for the message.

    Raises:
        ValueError: if prompt and canvas have more positions than the model.
    """
    positions = model.config.max_position_embeddings
    if longest + canvas_length > positions:
        raise ValueError(
            f"A canvas of {canvas_length} does not fit: the longest prompt of {what} has {longest} tokens, and the "
            f"model has {positions} positions. Choose a canvas of at most {max(0, positions - longest)}, or leave out "
            "the longest prompts."
        )
