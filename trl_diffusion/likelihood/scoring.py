"""Score the targets of noised views in a forward pass of the model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from trl_diffusion.likelihood.views import Views


class Scores(NamedTuple):
    """Log-probabilities and entropies of tokens (nats), float32 [R, L]; 0 where a position is no target.

    If the views have a `choice`, a log-probability is that of position and token together.
    """

    logps: torch.Tensor
    entropies: torch.Tensor


def score_views(
    model: torch.nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    views: Views,
    temperature: float = 1.0,
    support: torch.Tensor | None = None,
    prompt_columns: torch.Tensor | None = None,
) -> Scores:
    """Score each view's targets in one forward pass of the (wrapped) model.

    The last layer and the LM head compute only the targets and, if their positions were drawn, the positions that
    could have been drawn in their place.

    Args:
        model: a native diffusion language model, possibly wrapped (DDP, DeepSpeed, FSDP2, PEFT).
        prompt_ids: long [R, P], left-padded; replaced by the noised prompt if the views have one.
        prompt_mask: [R, P], 0 on padding.
        completion_ids: long [R, L], the tokens to score.
        views: the noised canvas of each row, and which of its positions to score.
        temperature: the temperature at which the tokens were drawn; > 0.
        support: int [R, L, C], ids each token was drawn from, -1 for none; the full vocabulary if `None`.
        prompt_columns: long [R], columns of the prompts in the forward passes whose log-probabilities these are
            compared with, see `Trajectory.prompt_columns`. Padding that no row needs is dropped, and position ids are
            counted as in those passes, because bfloat16 rounds differently at other positions.

    Returns:
        The scores, with gradient if grad mode is on.
    """
    # Rows have different numbers of positions to read: `slots` holds each row's first, padded with others to the
    # longest row, and `positions` is -1 for the padding.
    read = views.targets if views.choice is None else views.targets | views.choice.open
    most = int(read.sum(1).max())
    slots = read.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    prompt = prompt_ids if views.prompt_ids is None else views.prompt_ids
    if prompt_columns is not None:
        # a prompt can have had more columns where its last tokens were moved onto the canvas, see `BlockGrid`
        first = max(prompt.size(1) - int(prompt_columns.max()), 0)
        prompt, prompt_mask = prompt[:, first:], prompt_mask[:, first:]
    shown = views.canvas if views.context is None else torch.cat([views.context, views.canvas], dim=1)
    noisy_copy = shown.size(1) - views.canvas.size(1)
    positions = (prompt.size(1) + noisy_copy + slots).masked_fill(~read.gather(1, slots), -1)
    targets = completion_ids.gather(1, slots)
    if support is not None:
        support = support.gather(1, slots.unsqueeze(-1).expand(-1, -1, support.size(-1)))
    optional: dict[str, Any] = {}
    if views.choice is not None:
        targets, optional["largest"] = targets.masked_fill(~views.targets.gather(1, slots), -1), True
    if prompt_columns is not None and not noisy_copy:  # the model places a noisy copy itself
        columns = torch.arange(prompt.size(1) + shown.size(1), device=shown.device)
        optional["position_ids"] = (columns - (prompt.size(1) - prompt_columns).unsqueeze(1)).clamp(min=0)
    output = model(
        input_ids=torch.cat([prompt, shown], dim=1),
        attention_mask=torch.cat([prompt_mask, torch.ones_like(shown)], dim=1),
        positions=positions,
        targets=targets,
        support=support,
        temperature=temperature,
        canvas_start=prompt.size(1),
        noisy_copy=noisy_copy,
        **optional,
    )

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(completion_ids.shape).scatter(1, slots, values)

    logps = spread(output.log_probs)
    if views.choice is not None:
        logps = logps + views.choice.log_probs(spread(output.largest), views.targets)
    return Scores(logps, spread(output.entropy))
