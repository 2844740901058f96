"""The schedule that the field's repositories run, written plainly: the yardstick of the speed benchmarks.

Every denoising step runs the whole network over prompt and canvas. As LLaDA's and d1's code does it, the LM head, the
Gumbel noise (float64) and the softmax of the confidence cover every position and the whole vocabulary; the `lean` form
does the same in float32 and at the positions of the canvas alone. Nothing stops when a text ends. Log-probabilities
come from the log-softmax of full logits.

Ids that are never sampled are excluded from its draws too, so that the sampled distribution is the library's; scores
keep them, as published code does. Noise is made in place, so that the yardstick is no slower and no larger than the
code that it stands for.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trl_diffusion.models import family_of
from trl_diffusion.sampling import SamplingConfig


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    config: SamplingConfig,
    generator: torch.Generator,
    lean: bool = False,
    steps: int | None = None,
) -> torch.Tensor:
    """Draw completions.

    Args:
        model: a native diffusion language model without logit shift.
        input_ids: long [B, P], left-padded prompts.
        attention_mask: [B, P], 0 on padding.
        config: sizes, temperature, and `low_confidence` or `random` unmasking.
        generator: source of all noise, on the device of the prompts.
        lean: float32, and only what the canvas needs.
        steps: stop after so many denoising steps, to time a part; all of them if not given.

    Returns:
        The canvas, long [B, L].
    """
    if config.unmasking not in ("low_confidence", "random") or config.top_k:
        raise ValueError(
            "The published schedule is low_confidence or random unmasking over the full vocabulary; got "
            f"unmasking={config.unmasking!r}, top_k={config.top_k}."
        )
    mask_token = family_of(model).mask_token_id
    start = input_ids.size(1)
    ids = torch.nn.functional.pad(input_ids, (0, config.canvas_length), value=mask_token)
    visible = torch.nn.functional.pad(attention_mask, (0, config.canvas_length), value=1)
    place = torch.arange(ids.size(1), device=ids.device)
    first = start if lean else 0
    plan = [(block, count) for block in range(config.num_blocks) for count in config.commits()]
    for block, count in plan[:steps]:
        logits = _logits(model, ids, visible, start, first)
        tokens = _lean_draw(logits, config.temperature, generator) if lean else _draw(logits, config, generator)
        if config.unmasking == "random":
            confidence = torch.rand(tokens.shape, generator=generator, device=ids.device)
        elif lean:
            confidence = _at(logits, tokens) - logits.logsumexp(-1)
        else:
            confidence = _at(logits.softmax(-1), tokens)
        after = start + (block + 1) * config.block_length
        open_ = (ids == mask_token) & (place >= start) & (place < after)
        chosen = confidence.masked_fill(~open_[:, first:], -torch.inf).topk(count, dim=1).indices
        ids.scatter_(1, first + chosen, tokens.gather(1, chosen))
    return ids[:, start:]


def _logits(model: PreTrainedModel, ids: torch.Tensor, visible: torch.Tensor, start: int, first: int) -> torch.Tensor:
    """Logits [B, T − first, V] from position `first` on: the whole network, and the LM head at these positions."""
    kept = ids.size(1) - first
    logits = model(
        input_ids=ids, attention_mask=visible, canvas_start=start, use_cache=False, logits_to_keep=kept
    ).logits
    return family_of(model).exclude_never_sampled(logits.float() if first else logits)


def _draw(logits: torch.Tensor, config: SamplingConfig, generator: torch.Generator) -> torch.Tensor:
    """Gumbel-max in float64, one uniform for every entry of the vocabulary at every position."""
    if config.temperature == 0:
        return logits.argmax(-1)
    noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64, device=logits.device)
    return logits.double().div_(config.temperature).sub_(noise.log_().neg_().log_()).argmax(-1)


def _lean_draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """The same in float32: −log of an exponential is Gumbel noise that no rounding of a uniform to 0 or 1 spoils."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    return noise.neg_().add_(logits, alpha=1 / temperature).argmax(-1)


def _at(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def score(
    model: torch.nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    canvas: torch.Tensor,
    completion_ids: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities of the tokens of a noised completion: full logits, log-softmax over the canvas.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        prompt_ids: long [B, P], left-padded.
        prompt_mask: [B, P], 0 on padding.
        canvas: long [B, L], the completion with mask tokens where it is hidden.
        completion_ids: long [B, L], the tokens to score.

    Returns:
        Float32 [B, L], at every position; with gradient if grad mode is on.
    """
    ids = torch.cat([prompt_ids, canvas], dim=1)
    visible = torch.cat([prompt_mask, torch.ones_like(canvas)], dim=1)
    start = prompt_ids.size(1)
    logits = model(input_ids=ids, attention_mask=visible, canvas_start=start, use_cache=False).logits[:, start:]
    return _at(logits.float().log_softmax(-1), completion_ids)


def loss(
    logps: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    old: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    beta: float = 0.0,
) -> torch.Tensor:
    """Clipped token-ratio loss with the k3 KL, mean over the targets.

    Args:
        logps: float32 [B, L], with gradient.
        targets: bool [B, L], the tokens that count.
        advantages: [B].
        epsilon: clip range.
        old: float32 [B, L] before the first update; the policy's own, without gradient, if not given.
        reference: float32 [B, L] under the reference model; needed if `beta` is not 0.
        beta: coefficient of the KL.
    """
    ratio = (logps - (logps.detach() if old is None else old)).exp()
    advantages = advantages.unsqueeze(1)
    terms = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    if reference is not None:
        difference = reference - logps
        terms = terms + beta * (difference.exp() - difference - 1)
    return (terms * targets).sum() / targets.sum()
