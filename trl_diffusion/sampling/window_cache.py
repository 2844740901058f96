"""Keys and values of a sequence whose middle is rewritten at every denoising step."""

from __future__ import annotations

import torch


class WindowCache:
    """Keys and values of `capacity` columns, in every layer.

    A forward is given the tokens of a window of columns. It writes their keys and values and attends to all columns up
    to `visible`, whichever forward wrote them. This serves every cache: a window up to the last column that can be
    seen (prefix cache), one that ends with the active block (dual cache), or, with block-causal attention, one block
    with nothing visible after it.

    For forwards without gradient; the first window begins at column 0. The class implements the part of transformers'
    `Cache` that the models call.

    Args:
        capacity: columns of prompt and canvas.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.start = self.visible = 0
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def window(self, start: int, visible: int, step_end: int | None = None) -> WindowCache:
        """Let the next forward write from a column on, and attend to all before another; returns the cache.

        Args:
            start: the column of its first token.
            visible: columns 0..visible-1 are attended to.
            step_end: of a denoising step, the column after its last token; its windows mostly have the same shape.
        """
        self.start, self.visible = start, visible
        return self

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch (long [R], repeats allowed), in this order, and drop the others."""
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                store[layer] = tensor[rows]

    # ---------------------------------------------------------------- what transformers' models call

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        """Write the window of one layer, [R, heads, columns, head size]; return the visible keys and values."""
        return self._write(self.keys, layer, keys), self._write(self.values, layer, values)

    def _write(self, store: dict[int, torch.Tensor], layer: int, window: torch.Tensor) -> torch.Tensor:
        end = self.start + window.size(2)
        if window.size(2) == self.capacity:  # a full window needs no copy
            store[layer] = window
        else:
            if layer not in store:
                store[layer] = window.new_zeros((*window.shape[:2], self.capacity, window.size(3)))
            store[layer][:, :, self.start : end] = window
        return store[layer][:, :, : self.visible]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.start

    def get_query_offset(self, layer: int | None = None) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int, layer: int | None = None) -> tuple[int, int]:
        return self.visible, 0

    # transformers asks for the kind of each layer; none is special here.
    is_sliding: tuple[bool, ...] = ()
    is_linear: tuple[bool, ...] = ()
