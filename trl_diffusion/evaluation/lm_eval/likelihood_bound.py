"""Monte-Carlo lower bound on log p(continuation | context)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from trl_diffusion.family import family_of
from trl_diffusion.likelihood import Views, score_views
from trl_diffusion.tokenization import left_pad


@torch.no_grad()
def log_likelihood_bound(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    generators: Sequence[np.random.Generator],
    views: int = 32,
    batch_size: int = 32,
) -> list[float]:
    """Estimate a lower bound on the log-likelihood of continuations.

    With l uniform in 1..L and a random set of l of the L positions masked,
    log p(x) ≥ E[L/l · Σ_masked log p(x_i | unmasked positions)], as LLaDA (2502.09992) measures likelihoods. A
    continuation of one token has one such view, and its value is exact. The l of the views are spread evenly over
    1..L, which keeps every single one uniform.

    Args:
        model: a diffusion language model, possibly inside PEFT, in evaluation mode.
        contexts: token ids, not empty.
        continuations: token ids; at least one each.
        generators: one random stream per continuation.
        views: noised copies of each continuation that are averaged.
        batch_size: noised copies scored together.

    Returns:
        One estimate in nats per continuation.

    Raises:
        ValueError: for a model with block-causal attention.
    """
    _require_full_attention(model)
    totals = [0.0] * len(contexts)
    drawn = [
        (index, masked, len(masked) / int(masked.sum()) / count)
        for index, (continuation, generator) in enumerate(zip(continuations, generators, strict=True))
        for count in [views if len(continuation) > 1 else 1]
        for masked in _masked_sets(len(continuation), count, generator)
    ]
    # Continuations of one length share a batch, so they need no padding; among them, contexts of similar length do.
    drawn.sort(key=lambda view: (len(view[1]), len(contexts[view[0]]), view[0]))
    for batch in _batches(drawn, batch_size):
        indices = [index for index, _, _ in batch]
        ids = torch.tensor([continuations[index] for index in indices], device=model.device)
        masked = torch.from_numpy(np.stack([positions for _, positions, _ in batch])).to(model.device)
        prompt_ids, prompt_mask = left_pad([contexts[index] for index in indices], family_of(model).tail_token_id)
        noised = Views(canvas=ids.masked_fill(masked, family_of(model).mask_token_id), targets=masked)
        scores = score_views(model, prompt_ids.to(model.device), prompt_mask.to(model.device), ids, noised)
        for (index, _, weight), value in zip(batch, scores.logps.sum(1).tolist(), strict=True):
            totals[index] += weight * value
    return totals


def _require_full_attention(model: PreTrainedModel) -> None:
    family = family_of(model)
    if family.attention_block is not None:
        raise ValueError(
            f"Likelihoods of continuations are estimated for full attention only: {family.name} writes blocks of "
            f"{family.attention_block} tokens one after the other, which is another distribution. Use tasks that are "
            "scored by generation."
        )


def _masked_sets(length: int, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Draw `count` random sets of positions, bool [length] each."""
    levels = (generator.random() + np.arange(count) / count) % 1
    sizes = (levels * length).astype(int) + 1
    return [generator.permutation(length) < size for size in sizes]


def _batches(drawn: list[tuple], batch_size: int) -> list[list[tuple]]:
    """Group neighbours with continuations of one length, at most `batch_size` each."""
    batches: list[list[tuple]] = []
    for view in drawn:
        if not batches or len(batches[-1]) == batch_size or len(batches[-1][0][1]) != len(view[1]):
            batches.append([])
        batches[-1].append(view)
    return batches


@torch.no_grad()
def is_greedy(model: PreTrainedModel, context: Sequence[int], continuation: Sequence[int]) -> bool:
    """Check whether greedy decoding writes a continuation, one token at a time where the network is most certain.

    Args:
        model: a diffusion language model, possibly inside PEFT, in evaluation mode.
        context: token ids, not empty.
        continuation: token ids.

    Returns:
        False as soon as one token differs.

    Raises:
        ValueError: for a model with block-causal attention.
    """
    _require_full_attention(model)
    canvas = torch.full((1, len(continuation)), family_of(model).mask_token_id, device=model.device)
    prompt = torch.tensor([list(context)], device=model.device)
    masked = list(range(len(continuation)))
    while masked:
        positions = torch.tensor([[len(context) + offset for offset in masked]], device=model.device)
        logits = model(
            input_ids=torch.cat([prompt, canvas], dim=1),
            attention_mask=torch.ones(1, len(context) + len(continuation), dtype=torch.long, device=model.device),
            positions=positions,
        ).logits[0]
        log_probs, tokens = logits.log_softmax(-1).max(-1)
        surest = int(log_probs.argmax())
        offset = masked.pop(surest)
        if tokens[surest] != continuation[offset]:
            return False
        canvas[0, offset] = continuation[offset]
    return True
