"""Network evaluations on growing canvases: which columns are computed, and which keys and values are reused."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.window_cache import WindowCache


class Passes:
    """Passes over the prompts and canvases of B rows, without a cache: all columns that can be seen are computed.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        family: its facts.
        config: how completions are drawn.
        input_ids: long [B, P], left-padded prompts.
        attention_mask: [B, P], 0 on padding.
        canvas: long [B, L]; the sampler writes into it.
        length: long [B], positions of the canvas that exist.
    """

    def __init__(
        self, model, family: DiffusionFamily, config: SamplingConfig, input_ids, attention_mask, canvas, length
    ):
        self.model, self.family, self.config = model, family, config
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.canvas, self.length = canvas, length
        self.forwards = self.sync_forwards = 0
        self.row_units = torch.zeros(input_ids.size(0), device=input_ids.device)

    def together(self, alive: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Those of the live rows (long [A]) that are written in the same passes, given the block [B] of each."""
        return alive

    def working(self, open_: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Which rows a pass takes: bool [R] from the open positions [R, m] and the tokens to commit, at least [R]."""
        return counts > 0

    def begin_block(self, rows: torch.Tensor, first: torch.Tensor, agree: Callable[[bool], bool]) -> None:
        """Prepare for the next block of rows that are written together.

        Args:
            rows: long [R].
            first: long [R], the first position of each row's block.
            agree: whether any process that shares the weights says yes; all must run as many passes.
        """

    def logits(self, rows: torch.Tensor, first: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Logits at positions of the active blocks.

        Args:
            rows: long [R].
            first: long [R], the first position of each row's block.
            offsets: long [R, n], positions within the block.

        Returns:
            Float32 [R, n, V], never-sampled ids at -inf.

        Raises:
            FloatingPointError: if they are not finite.
        """
        width = int(self.length[rows].max())
        if self.family.attention_block is not None:  # what lies behind the block is not seen
            width = min(width, int(first.max()) + self.config.block_length)
        # An offset that only fills up a row with less to write may lie behind the canvas; nothing of what the network
        # says there is read.
        positions = (first.unsqueeze(1) + offsets).clamp(max=width - 1)
        end = self.input_ids.size(1) + width
        return self._evaluate(rows, 0, end, end, positions)

    def keep_step(self) -> None:
        """A pass that nobody needs here, for the sake of processes that share the weights."""
        self.forwards += 1
        self.sync_forwards += 1
        ids, mask = self.input_ids[:1], self.attention_mask[:1]
        if not ids.numel():  # no rows at all
            ids = mask = self.input_ids.new_ones(1, 1)
        self.model(input_ids=ids, attention_mask=mask, positions=ids.new_zeros(1, 1))

    def _columns(self, rows: torch.Tensor) -> int:
        """Columns of a pass over the prompts and whole canvases of these rows."""
        return self.input_ids.size(1) + int(self.length[rows].max())

    def _evaluate(
        self, rows, start: int, end: int, visible: int, positions: torch.Tensor, cache: WindowCache | None = None
    ) -> torch.Tensor:
        """Logits at canvas positions [R, n] of a pass over the columns [start, end), which see [0, visible)."""
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
        finite = logits.amax(-1).isfinite().all(1)
        if not finite.all():  # some id would be drawn all the same
            raise FloatingPointError(
                f"The network's logits are not finite for {int((~finite).sum())} of {len(rows)} rows in forward "
                f"{self.forwards} of this rollout, so no token can be drawn. Its weights or activations have "
                "overflowed: go back to a checkpoint with a lower learning_rate, or use bfloat16 or float32 in place "
                "of float16."
            )
        return logits


class _CachedPasses(Passes):
    """Passes of rows that are all at the same block, so that their windows are the same columns."""

    _rows: torch.Tensor
    _cache: WindowCache

    def together(self, alive, block):
        return alive[block[alive] == block[alive].min()] if alive.numel() else alive

    def working(self, open_, counts):
        return open_.any(1)

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        """Where rows are in the cache."""
        return torch.isin(self._rows, rows).nonzero().squeeze(1)


class WindowPasses(_CachedPasses):
    """Approximate caches of full attention (2505.22618): some columns keep the keys and values of an earlier pass.

    The first pass of a block computes all columns. Later ones compute those from the block on (`prefix`) or those of
    the block (`dual`), and see the rest as it was.
    """

    def begin_block(self, rows, first, agree):
        self._rows, self._age = rows, 0
        if rows.numel():
            self._total = self._columns(rows)

    def logits(self, rows, first, offsets):
        prompt_length, begin = self.input_ids.size(1), int(first[0])
        columns = self._total
        positions = (begin + offsets).clamp(max=columns - prompt_length - 1)
        refresh, age = self.config.cache_refresh, self._age
        self._age += 1
        if age == 0 or (refresh and age % refresh == 0):
            self._rows, self._cache = rows, WindowCache(columns)
            return self._evaluate(rows, 0, columns, columns, positions, self._cache)
        if len(rows) < len(self._rows):  # some have finished their block
            self._cache.keep(self._places(rows))
            self._rows = rows
        # with shifted logits a position is predicted by the column before it
        start = prompt_length + begin - self.family.logit_shift
        end = (
            min(prompt_length + begin + self.config.block_length, columns) if self.config.cache == "dual" else columns
        )
        return self._evaluate(rows, start, end, columns, positions, self._cache)


class BlockPasses(_CachedPasses):
    """The exact cache of block-causal attention: finished blocks never change, and nothing sees the blocks behind.

    The keys and values of finished blocks are written in the next pass. Rows with the same prompt share the pass over
    it.
    """

    _rows = torch.empty(0, dtype=torch.long)
    _unwritten = 0

    def begin_block(self, rows, first, agree):
        known = bool(torch.isin(rows, self._rows.to(rows.device)).all())
        if agree(not known):
            self.keep_step() if known else self._prefill(rows, int(first[0]))
        if known and rows.numel():
            if len(rows) < len(self._rows):
                self._cache.keep(self._places(rows))
                self._rows = rows
            self._unwritten += self.config.block_length  # more than one block where a given one needed no pass

    def _prefill(self, rows: torch.Tensor, begin: int) -> None:
        """Compute what lies before the block, once for rows that have the same there."""
        prompt_length = self.input_ids.size(1)
        end = prompt_length + begin
        seen = torch.cat([self.attention_mask[rows], self.input_ids[rows], self.canvas[rows, :begin]], dim=1)
        distinct, same = torch.unique(seen, dim=0, return_inverse=True)
        example = rows.new_empty(len(distinct)).scatter_(0, same, rows)
        self._cache = WindowCache(prompt_length + self.canvas.size(1))
        self._evaluate(example, 0, end, end, rows.new_empty(len(example), 0), self._cache)
        self._cache.keep(same)
        # the pass is the rows' in equal parts
        self.row_units[example] -= end / self._columns(example)
        self.row_units[rows] += end / self._columns(rows) * len(example) / len(rows)
        self._rows, self._unwritten = rows, 0

    def logits(self, rows, first, offsets):
        begin, places = int(first[0]), self._places(rows)
        every = offsets.new_zeros(len(self._rows), offsets.size(1))
        every[places] = offsets
        start = self.input_ids.size(1) + begin
        end = start + self.config.block_length
        start -= self.family.logit_shift + self._unwritten
        self._unwritten = 0
        logits = self._evaluate(self._rows, start, end, end, begin + every, self._cache)
        return logits[places] if len(places) < len(every) else logits


PASSES: dict[str, type[Passes]] = {"none": Passes, "prefix": WindowPasses, "dual": WindowPasses, "block": BlockPasses}
