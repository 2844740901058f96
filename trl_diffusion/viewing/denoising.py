"""A completion that is being denoised: the canvas after each step, as cells to draw."""

from __future__ import annotations

import math
from enum import StrEnum
from functools import cache
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.observing import Commits
from trl_diffusion.sampling.trajectory import Trajectory
from trl_diffusion.viewing.pieces import pieces, visible

START = -1  # the step of the frame before the first step
MASK_SIGN, END_SIGN, UNUSED_SIGN = "░", "∎", "·"


class Kind(StrEnum):
    """Kinds of positions of a canvas."""

    MASKED = "masked"  # a mask in the block that is written now
    WAITING = "waiting"  # a mask in a later block
    WRITTEN = "written"  # a token of the text, or the end id that closes it
    GIVEN = "given"  # text that was put on the canvas beforehand
    AFTER_END = "after_end"  # a token after the end of the text, where the text is cut
    UNUSED = "unused"  # never written, because the text ended in an earlier block


class Cell(NamedTuple):
    """One position of the canvas in one frame.

    Args:
        kind: what it holds.
        text: what its token adds to the text, see `pieces` and `visible`; a sign for a mask, an end id and an unused
            position.
        step: the denoising step that wrote it, -1 for none.
        confidence: the probability with which its token was drawn (for greedy decoding, at temperature 1); 0 for none.
    """

    kind: Kind
    text: str
    step: int = START
    confidence: float = 0.0


class Frame(NamedTuple):
    """The canvas after one denoising step.

    Args:
        step: in 0..S-1, or -1 before the first one.
        cells: one for each position.
    """

    step: int
    cells: tuple[Cell, ...]


class Denoising:
    """A completion and the steps that wrote it.

    It begins as a canvas of masks. `write` is the observer that lets it grow while it is sampled, `read` takes all of
    it from a trajectory.

    Args:
        prompt: the prompt in words.
        family: facts of the model.
        tokenizer: the model's tokenizer.
        length: L, positions of the canvas.
        block_length: positions of a block.
        num_steps: S, steps that the canvas has.
        caption: the model and how it is decoded, in words.
        row: the row of the batch that is shown.
        prompt_tail: tokens of the prompt in the first block, see `DiffusionFamily.prompt_tail`.

    Attributes:
        token_ids: L ids, the mask id where nothing is written.
        unmask_step: the step that wrote each of them, -1 for none.
        confidence: the probability with which each of them was drawn, 0 for none.
        finished: true if nothing will be written any more.
    """

    def __init__(
        self,
        prompt: str,
        family: DiffusionFamily,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        block_length: int,
        num_steps: int,
        caption: str = "",
        row: int = 0,
        prompt_tail: int = 0,
    ):
        self.prompt, self.caption, self.family, self.row = prompt, caption, family, row
        self.block_length, self.num_steps, self.prompt_tail = block_length, num_steps, prompt_tail
        self.token_ids = [family.mask_token_id] * length
        self.unmask_step, self.confidence = [START] * length, [0.0] * length
        self.finished = False
        # The frames of a completion ask for the same few texts again and again.
        self._decode = cache(lambda ids: str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)))

    def write(self, commits: Commits) -> None:
        """Put the tokens of one denoising step on the canvas; an observer of `trl_diffusion.sampling.sample`."""
        mine = commits.rows == self.row
        columns = (column[mine].tolist() for column in commits[1:])
        for position, step, token, logp in zip(*columns, strict=True):
            self.token_ids[position] = token
            self.unmask_step[position], self.confidence[position] = step, math.exp(logp)

    def read(self, trajectory: Trajectory) -> Denoising:
        """Take the whole completion from a trajectory; returns itself, with colours over the steps that were taken."""
        steps = trajectory.unmask_step[self.row]
        written = steps >= 0
        known = written if trajectory.given is None else written | trajectory.given[self.row]
        self.token_ids = trajectory.completion_ids[self.row].masked_fill(~known, self.family.mask_token_id).tolist()
        self.unmask_step = steps.tolist()
        self.confidence = trajectory.logps[self.row].exp().masked_fill(~written, 0.0).tolist()
        self.num_steps, self.finished = int(trajectory.steps_taken[self.row]), True
        return self

    @property
    def steps(self) -> list[int]:
        """The steps that wrote a token, in order."""
        return sorted({*self.unmask_step} - {START})

    def canvas(self, step: int) -> list[int]:
        """Return the L ids after a step, the mask id where nothing is written; -1 for the canvas at the start."""
        written = zip(self.token_ids, self.unmask_step, strict=True)
        return [token if when <= step else self.family.mask_token_id for token, when in written]

    def frames(self) -> list[Frame]:
        """Return the canvas at the start and after each step that wrote a token."""
        return [self.frame(step) for step in (START, *self.steps)]

    def frame(self, step: int) -> Frame:
        """Return the canvas after a step as cells; -1 for the start.

        After the last step of a finished completion, what is still masked is unused.
        """
        canvas = self.canvas(step)
        masks = [token == self.family.mask_token_id for token in canvas]
        end = next((place for place, token in enumerate(canvas) if token in self.family.end_token_ids), len(canvas))
        block = self._block(masks.index(True)) if True in masks else 0
        over = self.finished and step >= max(self.unmask_step)
        cells = []
        for place, (text, mask) in enumerate(zip(self._texts(canvas), masks, strict=True)):
            if mask and over:
                cells.append(Cell(Kind.UNUSED, UNUSED_SIGN))
            elif mask:
                cells.append(Cell(Kind.MASKED if self._block(place) == block else Kind.WAITING, MASK_SIGN))
            else:
                written = Kind.GIVEN if self.unmask_step[place] == START else Kind.WRITTEN
                kind = Kind.AFTER_END if place > end else written
                cells.append(Cell(kind, text, self.unmask_step[place], self.confidence[place]))
        return Frame(step, tuple(cells))

    def _block(self, place: int) -> int:
        """Return the block of a position."""
        return (self.prompt_tail + place) // self.block_length

    def _texts(self, canvas: list[int]) -> list[str]:
        """Return the text of each token of a canvas; what masks or end ids separate is decoded apart."""
        signs = {token: END_SIGN for token in self.family.end_token_ids} | {self.family.mask_token_id: MASK_SIGN}
        texts: list[str] = []
        for apart, tokens in groupby(canvas, signs.__contains__):
            run = list(tokens)
            texts += [signs[token] for token in run] if apart else map(visible, pieces(run, self._decode))
        return texts
