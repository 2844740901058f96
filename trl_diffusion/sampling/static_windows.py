"""Keys and values whose memory stays where it is, for windows that are computed by a compiled network."""

from __future__ import annotations

from typing import Any

import torch

from trl_diffusion.sampling.window_cache import WindowCache

_COLUMNS = 64  # capacities are multiples of it, so that prompts of similar length have one shape


def check_compiles(model: Any, sharded: bool = False) -> None:
    """Check that the denoising steps of a model can be compiled.

    Args:
        model: a native model, possibly inside PEFT.
        sharded: whether its weights are divided among processes.

    Raises:
        ValueError: if they cannot.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention, reason = base.config._attn_implementation, None
    if sharded:
        reason = "weights are divided among processes (ZeRO-3 or FSDP), and gathered by hooks of the layers"
    elif base.hf_quantizer is not None:
        reason = "the weights are quantised, which was not tried"
    elif attention != "sdpa":
        reason = f"attention must be computed with attn_implementation='sdpa', got {attention!r}"
    elif is_compiled(model):
        reason = "the network is compiled in place, by DeepSpeed's `compile` for example, and rollouts undo that"
    if reason is not None:
        raise ValueError(
            f"rollout_compile=True cannot be done: {reason}. Leave it out; rollouts then run the network as it is."
        )


def is_compiled(model: torch.nn.Module) -> bool:
    """Return whether modules of a model were compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def padded_rows(rows: int) -> int:
    """Return the number of rows with which a batch is computed: the next power of two, at least 2."""
    return max(2, 1 << (rows - 1).bit_length())


class StaticWindowCache(WindowCache):
    """A `WindowCache` for passes whose tensors keep their shapes and addresses from step to step.

    CUDA graphs repeat what was recorded, with the shapes and addresses that were recorded. So a denoising step attends
    to the whole capacity under a mask, where it would otherwise attend to as much as is visible. It writes to columns
    that a tensor names. A batch has a power of two of rows, of which the last ones may mean nothing: rows that leave
    then change the shape seldom. The tensors of a layer are only replaced where that number changes.

    Args:
        capacity: columns of prompt and canvas.

    Attributes:
        columns: long [W], the columns of a denoising step; `None` for other passes, which run as with a `WindowCache`.
    """

    def __init__(self, capacity: int):
        super().__init__(-(-capacity // _COLUMNS) * _COLUMNS)
        self.columns: torch.Tensor | None = None

    def window(self, start: int, visible: int, step_end: int | None = None) -> StaticWindowCache:
        super().window(start, visible)
        # Where no prompt precedes the first block, its first step makes the tensors.
        self.columns = None
        if step_end is not None and self.keys:
            self.columns = torch.arange(start, step_end, device=self.keys[0].device)
        return self

    def keep(self, rows: torch.Tensor) -> None:
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                self._fill(store, layer, tensor[rows])

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat the last row of values [R, …] up to the number of rows that is computed."""
        rows = torch.arange(padded_rows(len(values)), device=values.device)
        return values[rows.clamp(max=len(values) - 1)]

    def seen(self, attention: torch.Tensor | None, rows: int, width: int) -> torch.Tensor:
        """Return what the queries of a denoising step see of the whole capacity.

        Args:
            attention: bool [R or 1, 1, W, visible], or a bias that is 0 where a key is seen, or `None` if all are.
            rows: R.
            width: W.

        Returns:
            Bool [padded R, 1, W, capacity].
        """
        made = self.keys[0].new_zeros((padded_rows(rows), 1, width, self.capacity), dtype=torch.bool)
        if attention is None:
            made[..., : self.visible] = True
        else:
            shown = attention if attention.dtype == torch.bool else attention == 0
            made[..., : self.visible] = shown if len(shown) == 1 else self.padded(shown)
        return made

    def _write(self, store: dict[int, torch.Tensor], layer: int, window: torch.Tensor) -> torch.Tensor:
        if self.columns is not None:
            return store[layer].index_copy_(2, self.columns, window)
        return self._fill(store, layer, window, self.start)[: len(window), :, : self.visible]

    def _fill(self, store: dict[int, torch.Tensor], layer: int, window: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Write [R, heads, columns, head size] from a column on; make the tensor first if its rows are others."""
        rows, heads, width, size = window.shape
        if layer not in store or len(store[layer]) != padded_rows(rows):
            # Zeros, because rows that mean nothing are computed too, and memory could hold anything.
            store[layer] = window.new_zeros((padded_rows(rows), heads, self.capacity, size))
            torch._dynamo.mark_static_address(store[layer])
            torch._dynamo.maybe_mark_dynamic(store[layer], [0, 2])
        store[layer][:rows, :, start : start + width] = window
        return store[layer]
