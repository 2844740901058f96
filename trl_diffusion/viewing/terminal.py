"""A denoising in the terminal, redrawn after each step."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from trl_diffusion.sampling.observing import Commits
from trl_diffusion.sampling.trajectory import Trajectory
from trl_diffusion.viewing.colours import check_colouring, colour, colour_of, scale_ends
from trl_diffusion.viewing.denoising import START, Denoising, Kind

_SCALE_CELLS = 16
_DIMMED = {Kind.WAITING, Kind.AFTER_END, Kind.UNUSED}


def picture(denoising: Denoising, step: int, by: str) -> Group:
    """Draw the canvas after a step, with the colour scale below it.

    Args:
        denoising: the completion.
        step: in 0..S-1, or -1 for the canvas before the first.
        by: colour tokens by `step` or by `confidence`.
    """
    canvas = Text(overflow="fold")
    for cell in denoising.frame(step).cells:
        if cell.kind is Kind.WRITTEN:
            fill, ink = colour_of(cell, by, denoising.num_steps)
            canvas.append(cell.text, style=f"{ink} on {fill}")
        else:
            canvas.append(cell.text, style="dim" if cell.kind in _DIMMED else "")
    first, last = scale_ends(by, denoising.num_steps)
    scale = Text.assemble((f"{first} ", "dim"))
    for place in range(_SCALE_CELLS):
        scale.append(" ", style=f"on {colour(by, place / (_SCALE_CELLS - 1)).fill}")
    scale.append(f" {last}", style="dim")
    return Group(canvas, "", scale, Text(f"{step + 1} of {denoising.num_steps} steps", style="dim"))


class LiveView:
    """Shows a completion in the terminal while it is sampled.

    A context manager and an observer of `trl_diffusion.sampling.sample`:

        with LiveView(denoising, console) as view:
            trajectory = sample(model, input_ids, None, config, generators, observer=view)
            view.finish(trajectory)

    Args:
        denoising: the completion, still empty.
        console: a terminal.
        by: colour tokens by `step` or by `confidence`.
        delay: least time between two steps, in seconds.

    Raises:
        ValueError: if tokens cannot be coloured so.
    """

    def __init__(self, denoising: Denoising, console: Console, by: str = "step", delay: float = 0.0):
        check_colouring(by)
        self.denoising, self.by, self.delay = denoising, by, delay
        self._live = Live(picture(denoising, START, by), console=console, auto_refresh=False)

    def __enter__(self) -> LiveView:
        self._live.start(refresh=True)
        self._drawn = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, commits: Commits) -> None:
        """Show the tokens of one denoising step, `delay` seconds after the last one or later."""
        self.denoising.write(commits)
        time.sleep(max(0.0, self._drawn + self.delay - time.monotonic()))
        self._draw()

    def finish(self, trajectory: Trajectory) -> None:
        """Show the finished completion, with the colours spread over the steps that were taken."""
        self.denoising.read(trajectory)
        self._draw()

    def _draw(self) -> None:
        self._live.update(picture(self.denoising, max(self.denoising.unmask_step), self.by), refresh=True)
        self._drawn = time.monotonic()
