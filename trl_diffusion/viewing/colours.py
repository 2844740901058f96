"""Colours of tokens, by the step that wrote them or by the confidence with which they were drawn."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import matplotlib
from matplotlib.colors import to_hex

from trl_diffusion.validation import one_of
from trl_diffusion.viewing.denoising import Cell

# People who are colour-blind can tell the colours of either map apart. The darkest ends are cut.
_MAPS = {"step": ("viridis", 0.12, 1.0), "confidence": ("RdYlBu", 0.08, 0.92)}
COLOURINGS = tuple(_MAPS)


class Colour(NamedTuple):
    """A colour behind a token, and the black or white that is read best on it; both as `#rrggbb`."""

    fill: str
    ink: str


def check_colouring(by: str) -> None:
    """Refuse what tokens cannot be coloured by.

    Raises:
        ValueError: naming the choices.
    """
    one_of("color", by, COLOURINGS)


@cache
def colour(by: str, share: float) -> Colour:
    """Return the colour at a place of the scale.

    Args:
        by: `step` or `confidence`.
        share: in 0..1, the place from the first step to the last, or the confidence.
    """
    name, low, high = _MAPS[by]
    rgb = matplotlib.colormaps[name](low + (high - low) * share)[:3]
    # Relative luminance as in WCAG 2; 0.179 is where black and white have the same contrast.
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return Colour(to_hex(rgb), "#000000" if luminance > 0.179 else "#ffffff")


def colour_of(cell: Cell, by: str, num_steps: int) -> Colour:
    """Return the colour of a written cell, of a completion of `num_steps` steps."""
    return colour(by, cell.confidence if by == "confidence" else cell.step / max(num_steps - 1, 1))


def scale_ends(by: str, num_steps: int) -> tuple[str, str]:
    """Return the words at both ends of the scale."""
    return ("step 1", f"step {max(num_steps, 1)}") if by == "step" else ("confidence 0", "1")
