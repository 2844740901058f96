"""The network's forwards during a rollout: which columns each computes, and which keys and values it reuses.

A column is a position of prompt and canvas together. Every class here answers the same four questions for the
sampler: which rows are written together (`batch_of`), which of them take part in this step (`active`), what must
happen before a block (`begin_block`), and what the logits are (`logits`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.active_blocks import ActiveBlocks, to_device
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.static_windows import StaticWindowCache
from trl_diffusion.sampling.window_cache import WindowCache


class Forwards(ABC):
    """Forwards over the prompts and canvases of B rows, and their count.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        family: its facts.
        config: how completions are drawn.
        tokens: long [B, P + L], left-padded prompts and canvases; the sampler writes into the latter between forwards.
        attention_mask: [B, P], 0 on padding.
        length: long [B], positions of the canvas that exist.

    Attributes:
        prompt_length: P.
        forwards: network evaluations so far.
        sync_forwards: those among them that no row here needed.
        row_units: float32 [B], the forwards of each row, each counted by the share of its columns that it computed.
    """

    def __init__(
        self,
        model,
        family: DiffusionFamily,
        config: SamplingConfig,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        length: np.ndarray,
    ):
        self.model, self.family, self.config = model, family, config
        self.tokens, self.length = tokens, length
        self.prompt_length = attention_mask.size(1)
        positions = np.arange(tokens.size(1) - self.prompt_length)
        exists = to_device(positions < length[:, None], tokens.device)
        self.visible = torch.cat([attention_mask, exists.to(attention_mask)], dim=1)
        self._is_padded = (attention_mask == 0).any(1).cpu().numpy()
        self.forwards = self.sync_forwards = 0
        self.row_units = np.zeros(len(tokens), dtype=np.float32)
        self._largest: dict[int, torch.Tensor] = {}

    @abstractmethod
    def batch_of(self, alive: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Return the live rows (long [A]) that are written together now, given the active block [B] of every row."""

    @abstractmethod
    def active(self, num_masked: np.ndarray, min_commits: np.ndarray) -> np.ndarray:
        """Return the rows that take part in this step, bool [R].

        Args:
            num_masked: long [R], the number of masked positions of their blocks.
            min_commits: long [R], tokens that the step must commit.
        """

    @abstractmethod
    def begin_block(self, rows: np.ndarray, first: np.ndarray, any_rank: Callable[[bool], bool]) -> None:
        """Prepare for the next block of rows that are written together.

        Args:
            rows: long [R].
            first: long [R], the first position of each row's block.
            any_rank: all-reduced "any": true if some rank that shares the weights passes true. Ranks must run the
                same number of forwards, so a forward that one needs is a forward for all.
        """

    @abstractmethod
    def logits(self, at: ActiveBlocks, offsets: torch.Tensor) -> torch.Tensor:
        """Evaluate the network at positions of the active blocks.

        Args:
            at: the rows and their blocks.
            offsets: long [R, n], positions within the block.

        Returns:
            Float32 [R, n, V], never-sampled ids at -inf. Whether they are finite is seen by `check_finite`.
        """

    def sync_forward(self) -> None:
        """Run a dummy forward, so that every rank makes the same number of calls (sharded weights)."""
        self.forwards += 1
        self.sync_forwards += 1
        ids = self.tokens[:1, : self.prompt_length]
        if not ids.numel():  # this rank has no rows at all
            ids = self.tokens.new_ones(1, 1)
        self.model(input_ids=ids, positions=ids.new_zeros(1, 1))

    def check_finite(self) -> None:
        """Check the logits since the last check, once for all steps of a block because the host waits for it.

        Raises:
            FloatingPointError: if they are not finite.
        """
        # A draw from NaN raises nothing: some id would be drawn all the same. The largest logit of a distribution is
        # NaN if any logit is, and infinite if one is +inf; -inf is how ids that are never sampled are marked.
        seen, self._largest = self._largest, {}
        if not seen or torch.cat([largest.flatten() for largest in seen.values()]).isfinite().all():
            return
        finite = {forward: largest.isfinite().all(1) for forward, largest in seen.items()}
        forward = next(forward for forward in finite if not finite[forward].all())
        raise FloatingPointError(
            f"The network's logits are not finite for {int((~finite[forward]).sum())} of {len(finite[forward])} rows "
            f"in forward {forward} of this rollout, so no token can be drawn. Its weights or activations have "
            "overflowed: go back to a checkpoint with a lower learning_rate, or use bfloat16 or float32 in place "
            "of float16."
        )

    def _columns(self, rows: np.ndarray) -> int:
        """Columns of the prompts and whole canvases of these rows, the unit that `row_units` counts in."""
        return self.prompt_length + int(self.length[rows].max())

    def _evaluate(
        self,
        rows: np.ndarray,
        index: torch.Tensor,
        window: tuple[int, int, int],
        columns: torch.Tensor,
        cache: WindowCache | None = None,
        is_step: bool = False,
    ) -> torch.Tensor:
        """Compute the columns of a window, and return the logits at some of them.

        Args:
            rows: long [R].
            index: long [R], the same on the device.
            window: (start, end, visible): the columns [start, end) are computed, and attend to [0, visible).
            columns: long [R, n], where logits are needed, in 0..P+L-1.
            cache: holds the keys and values of the other columns.
            is_step: with a cache, whether this is a denoising step that computes the active block alone.
        """
        start, end, visible = window
        self.forwards += 1
        # The network would have to read the mask to find out that it hides nothing, and the host to wait for it.
        padded = bool(self._is_padded[rows].any()) or self.prompt_length + int(self.length[rows].min()) < visible
        logits = self.model(
            input_ids=self.tokens[:, start:end][index],
            attention_mask=self.visible[:, :visible][index] if padded else None,
            padded=padded,
            positions=columns - start if start else columns,
            canvas_start=self.prompt_length,
            cache=None if cache is None else cache.window(start, visible, end if is_step else None),
        ).logits
        self.row_units[rows] += (end - start) / self._columns(rows)
        self._largest[self.forwards] = logits.amax(-1)
        return logits

    def _columns_at(self, at: ActiveBlocks, offsets: torch.Tensor, end: int) -> torch.Tensor:
        """Return the columns of offsets [R, n] within the active blocks, those past `end` moved to the last before it.

        Rows with fewer positions to write than others have padded offsets, which may lie past the end of the canvas.
        Their logits are computed and never read.
        """
        columns = offsets + (self.prompt_length + at.first)
        return columns.clamp(max=end - 1) if self.prompt_length + at.end > end else columns


class NoCache(Forwards):
    """Every forward computes all columns that can be seen. Rows may be at different blocks."""

    def batch_of(self, alive, block):
        return alive

    def active(self, num_masked, min_commits):
        return min_commits > 0

    def begin_block(self, rows, first, any_rank):
        pass

    def logits(self, at, offsets):
        end = self._columns(at.rows)
        if self.family.attention_block is not None:  # nothing sees what comes after its block
            end = min(end, self.prompt_length + at.end)
        return self._evaluate(at.rows, at.index, (0, end, end), self._columns_at(at, offsets, end))


class _OneWindow(Forwards):
    """Forwards with a cache: all rows are at the same block, so that a forward computes the same columns of each."""

    # Rows that the cache holds, in ascending order: row i of the cache belongs to row _rows[i] of the batch.
    _rows = np.empty(0, dtype=np.int64)
    _index: torch.Tensor  # the same on the device
    _cache: WindowCache
    _static: StaticWindowCache | None = None

    def batch_of(self, alive, block):
        return alive[block[alive] == block[alive].min()] if len(alive) else alive

    def active(self, num_masked, min_commits):
        # Rows that wait for their turn stay in the batch: leaving and coming back would cost their cache.
        return num_masked > 0

    def _empty_cache(self, capacity: int) -> WindowCache:
        """Return a cache whose columns are yet to be written."""
        if not self.config.rollout_compile:
            return WindowCache(capacity)
        if self._static is None:  # one for all blocks, because its tensors are to stay where they are
            self._static = StaticWindowCache(self.tokens.size(1))
        return self._static

    def _hold(self, rows: np.ndarray) -> None:
        """Note the rows that the cache holds."""
        self._rows, self._index = rows, to_device(rows, self.tokens.device)

    def _keep(self, rows: np.ndarray) -> None:
        """Drop other rows from the cache."""
        if len(rows) < len(self._rows):
            self._cache.keep(self._cache_rows(rows))
            self._hold(rows)

    def _cache_rows(self, rows: np.ndarray) -> torch.Tensor:
        """Return the rows of the cache that belong to rows of the batch."""
        return to_device(np.isin(self._rows, rows).nonzero()[0], self.tokens.device)


class ApproximateCache(_OneWindow):
    """Approximate caches of full attention (2505.22618): some columns keep the keys and values of an earlier forward.

    The first step of a block, and with `cache_refresh` every so many after it, computes all columns. The other steps
    compute the columns from the block to the end (`prefix`) or those of the block alone (`dual`), and attend to the
    stored keys and values of the rest.
    """

    def begin_block(self, rows, first, any_rank):
        self._age = 0
        if len(rows):
            self._total = self._columns(rows)

    def logits(self, at, offsets):
        total, refresh, age = self._total, self.config.cache_refresh, self._age
        columns = self._columns_at(at, offsets, total)
        self._age += 1
        if age == 0 or (refresh and age % refresh == 0):
            self._hold(at.rows)
            self._cache = self._empty_cache(total)
            return self._evaluate(at.rows, at.index, (0, total, total), columns, self._cache)
        self._keep(at.rows)  # some rows may have finished their block
        # With shifted logits (Dream) the column before a position predicts it, so the window begins one earlier.
        start = self.prompt_length + at.first - self.family.logit_shift
        end = min(self.prompt_length + at.end, total) if self.config.cache == "dual" else total
        return self._evaluate(at.rows, at.index, (start, end, total), columns, self._cache, is_step=True)


class BlockCache(_OneWindow):
    """The exact cache of block-causal attention: finished blocks never change, and nothing attends to later blocks.

    A row passes through three states:

    1. *Prefilled.* One forward has computed the columns before the active block. Rows with the same prompt share it.
       `_unwritten` is 0: the cache holds everything before the block.
    2. *Block open.* Every step computes the columns of the active block and attends to those before it. The window
       overwrites the block's own keys and values each time, because its tokens still change.
    3. *Block closed, but not yet in the cache.* The last step of a block was computed while its last tokens were still
       masked, so the block's keys and values in the cache are stale. `_unwritten` grows by the block's length, and the
       first forward of the next block starts that many columns earlier, which writes them. So closing a block costs
       columns, but no forward of its own. More than one block can be waiting: blocks of a continued canvas that hold
       no mask are closed without a forward.

    A row that the cache does not hold (at the start, or when it joins at a later block) brings a new prefill for the
    whole batch. Ranks that share weights must agree on that forward, see `begin_block`.
    """

    _unwritten = 0

    def begin_block(self, rows, first, any_rank):
        in_cache = bool(np.isin(rows, self._rows).all())
        # No short cut past `any_rank`: it is a collective call, which every rank must make.
        if any_rank(not in_cache):
            if in_cache:
                self.sync_forward()
            else:
                self._prefill(rows, self.prompt_length + int(first[0]))
        if in_cache and len(rows):
            self._keep(rows)
            self._unwritten += self.config.block_length

    def _prefill(self, rows: np.ndarray, end: int) -> None:
        """Compute the columns [0, end), once for all rows that are equal there."""
        self._cache = self._empty_cache(self.tokens.size(1))
        self._hold(rows)
        self._unwritten = 0
        if end == 0:  # every prompt is shorter than a block, and nothing lies before the first one
            self.sync_forward()
            return
        index = to_device(rows, self.tokens.device)
        seen = torch.cat([self.visible[:, :end], self.tokens[:, :end]], dim=1)[index]
        distinct, same = torch.unique(seen, dim=0, return_inverse=True)
        example = np.empty(len(distinct), dtype=np.int64)
        example[same.cpu().numpy()] = rows
        example_index = to_device(example, self.tokens.device)
        self._evaluate(example, example_index, (0, end, end), index.new_empty(len(example), 0), self._cache)
        self._cache.keep(same)
        # `_evaluate` has charged the forward to the examples; all rows share it in equal parts.
        self.row_units[example] -= end / self._columns(example)
        self.row_units[rows] += end / self._columns(rows) * len(example) / len(rows)

    def logits(self, at, offsets):
        # All rows of the cache are computed, also those that have finished the block: their finished block is to be
        # written as well.
        start = max(self.prompt_length + at.first - self.family.logit_shift - self._unwritten, 0)
        end = self.prompt_length + at.end
        self._unwritten = 0
        columns = offsets + (self.prompt_length + at.first)
        if len(at) == len(self._rows):
            return self._evaluate(at.rows, at.index, (start, end, end), columns, self._cache, is_step=True)
        cache_rows = self._cache_rows(at.rows)
        everywhere = columns.new_full((len(self._rows), columns.size(1)), self.prompt_length + at.first)
        everywhere[cache_rows] = columns
        window = (start, end, end)
        return self._evaluate(self._rows, self._index, window, everywhere, self._cache, is_step=True)[cache_rows]


CACHE_CLASSES: dict[str, type[Forwards]] = {
    "none": NoCache,
    "prefix": ApproximateCache,
    "dual": ApproximateCache,
    "block": BlockCache,
}
