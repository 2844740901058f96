"""A denoising as an animated GIF, on a dark card that suits light and dark pages."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from trl_diffusion.viewing.colours import check_colouring, colour, colour_of, scale_ends
from trl_diffusion.viewing.denoising import Cell, Denoising, Frame, Kind

WIDTH = 960
_MARGIN, _FONT, _LINE, _BOX, _GAP = 36, 30, 54, 44, 16  # a line holds a box and the space below it
_PAD = 5  # at both sides of a token's text, within its box
_BACKGROUND, _MUTED = "#16191f", "#a3abb6"
_FILLS = {Kind.MASKED: "#68727f", Kind.WAITING: "#363d48"}
_INKS = {Kind.GIVEN: "#f0f2f5", Kind.AFTER_END: "#68727f", Kind.UNUSED: "#4a525e"}
_SCALE_PARTS, _SCALE_PART, _SCALE_HEIGHT = 32, 7, 20
# Pillow draws shapes without smooth edges, so everything is drawn larger and made smaller.
_OVERSAMPLING = 2
# The first frame shows the prompt and the last one the result, so they stay longer; in seconds.
_FIRST, _LAST = 0.8, 3.0


def write_gif(path: str | Path, denoising: Denoising, by: str = "step", delay: float = 0.1) -> None:
    """Write a finished denoising as an animation that repeats.

    Every token stands where it stands in the finished text, so nothing moves: a mask is as wide as the token to come.

    Args:
        path: the file.
        denoising: the completion, read from its trajectory.
        by: colour tokens by `step` or by `confidence`.
        delay: seconds for each step; GIFs count hundredths.

    Raises:
        ValueError: if tokens cannot be coloured so.
    """
    check_colouring(by)
    frames = denoising.frames()
    sheet = _Sheet.of(denoising, frames[-1])
    # One palette for all frames, from two that hold all colours: masks are in the first, tokens in the last.
    first, last = _pictures(sheet, denoising, [frames[0], frames[-1]], by)
    both = Image.new("RGB", (WIDTH, 2 * sheet.height))
    both.paste(first, (0, 0))
    both.paste(last, (0, sheet.height))
    palette = both.quantize(128)
    pictures = _pictures(sheet, denoising, frames, by)
    images = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    steps = [max(delay, 0.02)] * len(images)
    steps[0], steps[-1] = max(delay, _FIRST), max(delay, _LAST)
    durations = [10 * round(100 * seconds) for seconds in steps]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)


@dataclass(frozen=True)
class _Part:
    """Characters `start` to `end` of a cell's text, which stand on one line at (x, y); in pixels."""

    start: int
    end: int
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class _Sheet:
    """The layout that all frames share.

    Args:
        font: of all text.
        prompt: lines of the prompt.
        parts: of each cell; more than one where a token is longer than a line.
        height: of the image.
    """

    font: ImageFont.FreeTypeFont
    prompt: list[str]
    parts: list[list[_Part]]
    height: int

    @classmethod
    def of(cls, denoising: Denoising, last: Frame) -> _Sheet:
        """Lay out the prompt, and below it the cells of the finished completion."""
        file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
        font = ImageFont.truetype(str(file), _FONT)
        columns = int((WIDTH - 2 * _MARGIN) / font.getlength("m"))
        prompt = [line for text in denoising.prompt.splitlines() for line in textwrap.wrap(text, columns) or [""]]
        x, y = float(_MARGIN), float(_MARGIN + len(prompt) * _LINE + _GAP)
        parts: list[list[_Part]] = []
        for cell in last.cells:
            found, x, y = _place(cell.text, font, x, y)
            parts.append(found)
        return cls(font, prompt, parts, int(y) + _LINE + _GAP + _BOX + _MARGIN)


def _place(text: str, font: ImageFont.FreeTypeFont, x: float, y: float) -> tuple[list[_Part], float, float]:
    """Place a cell's text at (x, y); returns its parts and where the next cell begins."""
    parts: list[_Part] = []
    start = 0
    while start < len(text) or not parts:  # a token without a text, see `pieces`, has a box too
        if text[start : start + 1] == "\n":
            start, x, y = start + 1, _MARGIN, y + _LINE
            continue
        end = (text + "\n").index("\n", start)
        if x > _MARGIN and x + _box_width(text[start:end], font) > WIDTH - _MARGIN:
            x, y = _MARGIN, y + _LINE
        while end > start + 1 and x + _box_width(text[start:end], font) > WIDTH - _MARGIN:
            end -= 1  # a token is broken only if it is longer than a line
        width = _box_width(text[start:end], font)
        parts.append(_Part(start, end, x, y, width))
        start, x = end, x + width
    return parts, x, y


def _box_width(text: str, font: ImageFont.FreeTypeFont) -> float:
    return font.getlength(text) + 2 * _PAD


def _pictures(sheet: _Sheet, denoising: Denoising, frames: list[Frame], by: str) -> Iterator[Image.Image]:
    """Draw frames one after the other; of each, what differs from the one before."""
    large = Image.new("RGB", (WIDTH * _OVERSAMPLING, sheet.height * _OVERSAMPLING), _BACKGROUND)
    pen = _Pen(ImageDraw.Draw(large), sheet.font.font_variant(size=_FONT * _OVERSAMPLING))
    for number, line in enumerate(sheet.prompt):
        pen.text(_MARGIN, _MARGIN + number * _LINE, line, _MUTED)
    bottom = sheet.height - _MARGIN - _BOX
    _draw_scale(pen, bottom, scale_ends(by, denoising.num_steps), by)
    digits = len(str(denoising.num_steps))
    drawn: list[Cell | None] = [None] * len(sheet.parts)
    for frame in frames:
        for place, (cell, parts) in enumerate(zip(frame.cells, sheet.parts, strict=True)):
            if cell != drawn[place]:
                drawn[place] = cell
                for part in parts:
                    _draw_part(pen, cell, part, denoising.num_steps, by)
        count = f"step {frame.step + 1:>{digits}} / {denoising.num_steps}"
        x = WIDTH - _MARGIN - pen.width(count)
        pen.box(x, bottom, pen.width(count), _BOX, _BACKGROUND)  # where the last number was
        pen.text(x, bottom, count, _INKS[Kind.GIVEN])
        yield large.reduce(_OVERSAMPLING)


def _draw_part(pen: _Pen, cell: Cell, part: _Part, num_steps: int, by: str) -> None:
    fill, ink = _FILLS.get(cell.kind), _INKS.get(cell.kind, _BACKGROUND)
    if cell.kind is Kind.WRITTEN:
        fill, ink = colour_of(cell, by, num_steps)
    pen.box(part.x, part.y, part.width, _BOX, _BACKGROUND)  # what was here before
    if fill is not None:
        pen.box(part.x + 1, part.y, part.width - 2, _BOX, fill, radius=7)
    if cell.kind not in _FILLS:
        pen.text(part.x + _PAD, part.y, cell.text[part.start : part.end], ink)


def _draw_scale(pen: _Pen, y: float, ends: tuple[str, str], by: str) -> None:
    """Draw the colour scale between the words at its ends."""
    x = pen.text(_MARGIN, y, ends[0], _MUTED) + _GAP
    for place in range(_SCALE_PARTS):
        fill = colour(by, place / (_SCALE_PARTS - 1)).fill
        pen.box(x + place * _SCALE_PART, y + (_BOX - _SCALE_HEIGHT) / 2, _SCALE_PART, _SCALE_HEIGHT, fill)
    pen.text(x + _SCALE_PARTS * _SCALE_PART + _GAP, y, ends[1], _MUTED)


class _Pen:
    """Draws at the sizes of the final image on one that is `_OVERSAMPLING` times as large."""

    def __init__(self, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont):
        self.draw, self.font = draw, font

    def width(self, text: str) -> float:
        return self.font.getlength(text) / _OVERSAMPLING

    def text(self, x: float, y: float, text: str, ink: str) -> float:
        """Write a line of text, in the middle of its height; returns where it ends."""
        place = x * _OVERSAMPLING, (y + _BOX / 2) * _OVERSAMPLING
        self.draw.text(place, text, fill=ink, font=self.font, anchor="lm")
        return x + self.width(text)

    def box(self, x: float, y: float, width: float, height: float, fill: str, radius: float = 0) -> None:
        corners = [value * _OVERSAMPLING for value in (x, y, x + width, y + height)]
        corners[2:] = [value - 1 for value in corners[2:]]  # Pillow counts the last pixel in
        self.draw.rounded_rectangle(corners, radius * _OVERSAMPLING, fill=fill)
