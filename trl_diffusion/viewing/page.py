"""A denoising as one self-contained HTML file with a slider over its steps."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from trl_diffusion.viewing.colours import COLOURINGS, check_colouring, colour, scale_ends
from trl_diffusion.viewing.denoising import Denoising

_TEMPLATE = Path(__file__).with_name("page.html")
_SCALE_COLOURS = 64


def write_page(path: str | Path, denoising: Denoising, by: str = "step", delay: float = 0.1) -> None:
    """Write a finished denoising as a page that works without a network, from a disk or a server.

    Args:
        path: the file.
        denoising: the completion, read from its trajectory.
        by: colour tokens by `step` or by `confidence` at first; the page can switch.
        delay: seconds for each step while it plays.

    Raises:
        ValueError: if tokens cannot be coloured so.
    """
    check_colouring(by)
    # In a script element `<` could begin the tag that ends it; as an escape it is the same JSON.
    data = json.dumps(page_data(denoising, by, delay), ensure_ascii=False).replace("<", "\\u003c")
    Path(path).write_text(_TEMPLATE.read_text("utf-8").replace("/*denoising*/", data), "utf-8")


def page_data(denoising: Denoising, by: str, delay: float) -> dict[str, Any]:
    """Return what the page shows: prompt, frames and colour scales.

    Every frame lists the cells that differ from those of the frame before: position, kind, text, step, confidence.
    """
    frames = denoising.frames()
    changed: list[dict[str, Any]] = [
        {"step": frames[0].step, "cells": [[place, *cell] for place, cell in enumerate(frames[0].cells)]}
    ]
    for before, frame in pairwise(frames):
        cells = enumerate(zip(before.cells, frame.cells, strict=True))
        changed.append({"step": frame.step, "cells": [[place, *new] for place, (old, new) in cells if new != old]})
    scales = {
        name: {
            "ends": scale_ends(name, denoising.num_steps),
            "colours": [colour(name, place / (_SCALE_COLOURS - 1)) for place in range(_SCALE_COLOURS)],
        }
        for name in COLOURINGS
    }
    return {
        "prompt": denoising.prompt,
        "caption": denoising.caption,
        "num_steps": denoising.num_steps,
        "by": by,
        "delay": delay,
        "frames": changed,
        "scales": scales,
    }
