"""The network's forwards during a rollout: which columns each computes, and which keys and values it reuses.

A column is a position of prompt and canvas together. Every class here answers the same four questions for the
sampler: which rows are written together (`batch_of`), which of them take part in this step (`active`), what must
happen before a block (`begin_block`), and what the logits are (`logits`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.window_cache import WindowCache


class Forwards(ABC):
    """Forwards over the prompts and canvases of B rows, and their count.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        family: its facts.
        config: how completions are drawn.
        input_ids: long [B, P], left-padded prompts.
        attention_mask: [B, P], 0 on padding.
        canvas: long [B, L]; the sampler writes into it between forwards.
        length: long [B], positions of the canvas that exist.

    Attributes:
        forwards: network evaluations so far.
        sync_forwards: those among them that no row here needed.
        row_units: float32 [B], the forwards of each row, each counted by the share of its columns that it computed.
    """

    def __init__(
        self, model, family: DiffusionFamily, config: SamplingConfig, input_ids, attention_mask, canvas, length
    ):
        self.model, self.family, self.config = model, family, config
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.canvas, self.length = canvas, length
        self.forwards = self.sync_forwards = 0
        self.row_units = torch.zeros(input_ids.size(0), device=input_ids.device)

    @abstractmethod
    def batch_of(self, alive: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Return the live rows (long [A]) that are written together now, given the active block [B] of every row."""

    @abstractmethod
    def active(self, is_masked: torch.Tensor, min_commits: torch.Tensor) -> torch.Tensor:
        """Return the rows that take part in this step, bool [R].

        Args:
            is_masked: bool [R, m], the masked positions of their blocks.
            min_commits: long [R], tokens that the step must commit.
        """

    @abstractmethod
    def begin_block(self, rows: torch.Tensor, first: torch.Tensor, any_rank: Callable[[bool], bool]) -> None:
        """Prepare for the next block of rows that are written together.

        Args:
            rows: long [R].
            first: long [R], the first position of each row's block.
            any_rank: all-reduced "any": true if some rank that shares the weights passes true. Ranks must run the
                same number of forwards, so a forward that one needs is a forward for all.
        """

    @abstractmethod
    def logits(self, rows: torch.Tensor, first: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Evaluate the network at positions of the active blocks.

        Args:
            rows: long [R].
            first: long [R], the first position of each row's block.
            offsets: long [R, n], positions within the block.

        Returns:
            Float32 [R, n, V], never-sampled ids at -inf.

        Raises:
            FloatingPointError: if they are not finite.
        """

    def sync_forward(self) -> None:
        """Run a dummy forward, so that every rank makes the same number of calls (sharded weights)."""
        self.forwards += 1
        self.sync_forwards += 1
        ids, mask = self.input_ids[:1], self.attention_mask[:1]
        if not ids.numel():  # this rank has no rows at all
            ids = mask = self.input_ids.new_ones(1, 1)
        self.model(input_ids=ids, attention_mask=mask, positions=ids.new_zeros(1, 1))

    def _columns(self, rows: torch.Tensor) -> int:
        """Columns of the prompts and whole canvases of these rows, the unit that `row_units` counts in."""
        return self.input_ids.size(1) + int(self.length[rows].max())

    def _evaluate(
        self, rows, start: int, end: int, visible: int, positions: torch.Tensor, cache: WindowCache | None = None
    ) -> torch.Tensor:
        """Compute the columns [start, end), which attend to [0, visible); return logits at canvas positions [R, n]."""
        self.forwards += 1
        prompt_length, length = self.input_ids.size(1), self.canvas.size(1)
        exists = torch.arange(length, device=rows.device) < self.length[rows].unsqueeze(1)
        logits = self.model(
            input_ids=torch.cat([self.input_ids[rows], self.canvas[rows]], dim=1)[:, start:end],
            attention_mask=torch.cat([self.attention_mask[rows], exists.to(self.attention_mask)], dim=1)[:, :visible],
            positions=prompt_length + positions - start,
            canvas_start=prompt_length,
            cache=None if cache is None else cache.window(start, visible),
        ).logits
        self.row_units[rows] += (end - start) / self._columns(rows)
        self._check_finite(logits)
        return logits

    def _check_finite(self, logits: torch.Tensor) -> None:
        # A draw from NaN raises nothing: some id would be drawn all the same. The largest logit of a distribution is
        # NaN if any logit is, and infinite if one is +inf; -inf is how ids that are never sampled are marked.
        finite = logits.amax(-1).isfinite().all(1)
        if not finite.all():
            raise FloatingPointError(
                f"The network's logits are not finite for {int((~finite).sum())} of {len(finite)} rows in forward "
                f"{self.forwards} of this rollout, so no token can be drawn. Its weights or activations have "
                "overflowed: go back to a checkpoint with a lower learning_rate, or use bfloat16 or float32 in place "
                "of float16."
            )


class NoCache(Forwards):
    """Every forward computes all columns that can be seen. Rows may be at different blocks."""

    def batch_of(self, alive, block):
        return alive

    def active(self, is_masked, min_commits):
        return min_commits > 0

    def begin_block(self, rows, first, any_rank):
        pass

    def logits(self, rows, first, offsets):
        width = int(self.length[rows].max())
        if self.family.attention_block is not None:  # nothing sees what comes after its block
            width = min(width, int(first.max()) + self.config.block_length)
        # Rows with fewer positions to write than others have padded offsets, which may lie past the end of the
        # canvas. Their logits are computed and never read.
        positions = (first.unsqueeze(1) + offsets).clamp(max=width - 1)
        end = self.input_ids.size(1) + width
        return self._evaluate(rows, 0, end, end, positions)


class _OneWindow(Forwards):
    """Forwards with a cache: all rows are at the same block, so that a forward computes the same columns of each."""

    # Rows that the cache holds, in ascending order: row i of the cache belongs to row _rows[i] of the batch.
    _rows: torch.Tensor
    _cache: WindowCache

    def batch_of(self, alive, block):
        return alive[block[alive] == block[alive].min()] if alive.numel() else alive

    def active(self, is_masked, min_commits):
        # Rows that wait for their turn stay in the batch: leaving and coming back would cost their cache.
        return is_masked.any(1)

    def _cache_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of the cache that belong to rows of the batch."""
        return torch.isin(self._rows, rows).nonzero().squeeze(1)


class ApproximateCache(_OneWindow):
    """Approximate caches of full attention (2505.22618): some columns keep the keys and values of an earlier forward.

    The first step of a block, and with `cache_refresh` every so many after it, computes all columns. The other steps
    compute the columns from the block to the end (`prefix`) or those of the block alone (`dual`), and attend to the
    stored keys and values of the rest.
    """

    def begin_block(self, rows, first, any_rank):
        self._rows, self._age = rows, 0
        if rows.numel():
            self._total = self._columns(rows)

    def logits(self, rows, first, offsets):
        prompt_length, begin = self.input_ids.size(1), int(first[0])
        columns = self._total
        positions = (begin + offsets).clamp(max=columns - prompt_length - 1)  # as in `NoCache.logits`
        refresh, age = self.config.cache_refresh, self._age
        self._age += 1
        if age == 0 or (refresh and age % refresh == 0):
            self._rows, self._cache = rows, WindowCache(columns)
            return self._evaluate(rows, 0, columns, columns, positions, self._cache)
        if len(rows) < len(self._rows):  # some rows have finished their block
            self._cache.keep(self._cache_rows(rows))
            self._rows = rows
        # With shifted logits (Dream) the column before a position predicts it, so the window begins one earlier.
        start = prompt_length + begin - self.family.logit_shift
        block_end = min(prompt_length + begin + self.config.block_length, columns)
        end = block_end if self.config.cache == "dual" else columns
        return self._evaluate(rows, start, end, columns, positions, self._cache)


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

    _rows = torch.empty(0, dtype=torch.long)
    _unwritten = 0

    def begin_block(self, rows, first, any_rank):
        in_cache = bool(torch.isin(rows, self._rows.to(rows.device)).all())
        # No short cut past `any_rank`: it is a collective call, which every rank must make.
        if any_rank(not in_cache):
            if in_cache:
                self.sync_forward()
            else:
                self._prefill(rows, int(first[0]))
        if in_cache and rows.numel():
            if len(rows) < len(self._rows):
                self._cache.keep(self._cache_rows(rows))
                self._rows = rows
            self._unwritten += self.config.block_length

    def _prefill(self, rows: torch.Tensor, begin: int) -> None:
        """Compute the columns before position `begin` of the canvas, once for all rows that are equal there."""
        prompt_length = self.input_ids.size(1)
        end = prompt_length + begin
        seen = torch.cat([self.attention_mask[rows], self.input_ids[rows], self.canvas[rows, :begin]], dim=1)
        distinct, same = torch.unique(seen, dim=0, return_inverse=True)
        example = rows.new_empty(len(distinct)).scatter_(0, same, rows)
        self._cache = WindowCache(prompt_length + self.canvas.size(1))
        self._evaluate(example, 0, end, end, rows.new_empty(len(example), 0), self._cache)
        self._cache.keep(same)
        # `_evaluate` has charged the forward to the examples; all rows share it in equal parts.
        self.row_units[example] -= end / self._columns(example)
        self.row_units[rows] += end / self._columns(rows) * len(example) / len(rows)
        self._rows, self._unwritten = rows, 0

    def logits(self, rows, first, offsets):
        # All rows of the cache are computed, also those that have finished the block: their finished block is to be
        # written as well.
        begin, cache_rows = int(first[0]), self._cache_rows(rows)
        all_offsets = offsets.new_zeros(len(self._rows), offsets.size(1))
        all_offsets[cache_rows] = offsets
        block_start = self.input_ids.size(1) + begin
        start = block_start - self.family.logit_shift - self._unwritten
        end = block_start + self.config.block_length
        self._unwritten = 0
        logits = self._evaluate(self._rows, start, end, end, begin + all_offsets, self._cache)
        return logits[cache_rows] if len(cache_rows) < len(all_offsets) else logits


CACHE_CLASSES: dict[str, type[Forwards]] = {
    "none": NoCache,
    "prefix": ApproximateCache,
    "dual": ApproximateCache,
    "block": BlockCache,
}
