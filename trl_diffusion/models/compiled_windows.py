"""Denoising steps with a cache through `torch.compile`: on a GPU as one recorded graph, which the host starts at once.

A step with a cache computes few columns, so a GPU is done with its kernels before the host has launched them. The
compiled function is the network between embedding and LM head. Batch, window and capacity are symbols in it, so it is
compiled once for all of them, and on a GPU recorded once for each. Weights are its inputs: it computes with those that
a layer has when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from trl_diffusion.models.layers import CACHE_KEYWORD
from trl_diffusion.sampling.static_windows import StaticWindowCache


def window_states(
    network: nn.Module,
    embedded: torch.Tensor,
    columns: torch.Tensor,
    seen: torch.Tensor,
    keys_and_values: StaticWindowCache,
) -> torch.Tensor:
    """Compute the last hidden states of a window.

    Args:
        network: a stock network, without its LM head.
        embedded: [R, W, H], the embedded tokens.
        columns: long [1, W], their columns.
        seen: bool [R, 1, W, capacity].
        keys_and_values: of all columns; those of the window are replaced.

    Returns:
        [R, W, H].
    """
    return network(
        inputs_embeds=embedded,
        position_ids=columns,
        attention_mask=seen,
        use_cache=False,
        **{CACHE_KEYWORD: keys_and_values},
    ).last_hidden_state


@cache
def compiled(device_type: str) -> Callable[..., torch.Tensor]:
    """Compile `window_states` for a kind of device, once for all models."""
    mode = "reduce-overhead" if device_type == "cuda" else None
    # Without `fullgraph` a part that cannot be compiled, or a limit of torch, would make it run eagerly in silence.
    return torch.compile(window_states, fullgraph=True, mode=mode)


def compiled_window_states(
    model: Any, input_ids: torch.Tensor, attention: torch.Tensor | None, keys_and_values: StaticWindowCache
) -> torch.Tensor:
    """Compute the last hidden states of a denoising step by the compiled network.

    Args:
        model: a native model.
        input_ids: long [R, W].
        attention: what its queries see, as the stock network takes it.
        keys_and_values: of the prompt and canvas.

    Returns:
        [R, W, H], in memory that the next call may overwrite.
    """
    assert keys_and_values.columns is not None
    rows, width = input_ids.shape
    # The embedding stays outside: under gradient checkpointing it has a hook that turns gradients on, which cannot be
    # compiled.
    embedded = model.model.embed_tokens(keys_and_values.padded(input_ids)).detach()
    columns, seen = keys_and_values.columns.unsqueeze(0), keys_and_values.seen(attention, rows, width)
    # Only these sizes are symbols. With `dynamic=True` all are, and those of equal value share one: a window as wide
    # as the network has heads would then be compiled for this width alone.
    for tensor, sizes in ((embedded, [0, 1]), (columns, [1]), (seen, [0, 2, 3])):
        torch._dynamo.maybe_mark_dynamic(tensor, sizes)
    if embedded.is_cuda:
        torch.compiler.cudagraph_mark_step_begin()
    run = compiled(embedded.device.type)
    return run(model.model, embedded, columns, seen, keys_and_values)[:rows]
