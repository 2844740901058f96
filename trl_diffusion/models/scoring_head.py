"""The LM head that scores tokens: log-probabilities and entropies of targets without keeping their [N, V] logits.

Full-canvas methods score every position of the canvas. With a vocabulary of 126,464, the float32 logits of a thousand
positions take 0.5 GB, and log-softmax, entropy and gradient each as much again. Here the rows go from hidden states to
scores one chunk at a time, and once more in the backward pass, so memory does not grow with the number of targets.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trl_diffusion.distribution import SMALLEST, at_columns, log_distribution, target_columns
from trl_diffusion.family import DiffusionFamily

# Logits in a chunk (4 bytes each). On a CPU they are few enough for its cache, yet enough rows for the matrix product
# to be efficient; on accelerators they are more, because every chunk reads the whole weight.
_CPU_CHUNK, _CHUNK = 2**22, 2**26


class ScoringHead(nn.Linear):
    """An LM head, `nn.Linear` without a bias, that can also score targets.

    The loop over chunks lies inside the module's forward pass. ZeRO-3 and FSDP2 gather its weights in hooks of this
    module, and the hooks must run equally often on every process, however many targets a process has.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
        temperature: float = 1.0,
        family: DiffusionFamily | None = None,
    ):
        """Compute logits or, with `family`, what `score_targets` computes from them.

        Args:
            hidden: [..., H]; with `family`, [N, H].
            targets: long [N]; the most likely ids if not given.
            support: int [N, C], ids each target was drawn from, -1 for none; every id if not given.
            temperature: divides the logits; > 0.
            family: says which ids are never sampled.

        Returns:
            Logits [..., V], or (log-probabilities [N], entropies [N] in nats), float32. The log-probability of a
            target that cannot be drawn is -inf and has no gradient.
        """
        if family is None:
            return super().forward(hidden)
        # Cast here as autocast would cast in `F.linear`: in the backward pass, which computes chunks again, it is off.
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return _score_in_chunks(hidden, self.weight, targets, support, temperature, family)


@torch.compiler.disable  # the number of chunks changes from call to call, and each would be compiled anew
def _score_in_chunks(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return _Score.apply(*arguments)


class _Score(torch.autograd.Function):
    """Computes `score_targets` of the head's logits, chunk by chunk.

    With one chunk its log-probabilities are saved for the backward pass; with several they are recomputed.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, support, temperature, family):
        ctx.temperature, ctx.family = temperature, family
        ctx.set_materialize_grads(
            False
        )  # most losses do not use the entropies, whose gradient costs a pass over [N, V]
        if targets is None:  # the most likely ids, found chunk by chunk
            column = torch.empty(len(hidden), 1, dtype=torch.long, device=hidden.device)
            there = torch.ones_like(column, dtype=torch.bool)
        else:
            column, there = target_columns(targets, support)
        log_probs, entropy = torch.empty(2, len(hidden), dtype=torch.float32, device=hidden.device)
        cast_weight, parts, chunk = weight.to(hidden.dtype), _parts(hidden, weight), None
        for part in parts:
            chunk = None  # free the last one first, so that there are never two
            chunk = _chunk(hidden[part], cast_weight, _rows(support, part), temperature, family)
            if targets is None:
                column[part] = chunk.argmax(-1, keepdim=True)
            log_probs[part] = at_columns(chunk, column[part], there[part])
            chunk.clamp_(min=SMALLEST)  # 0 · log 0 is 0 in the entropy, and −inf would make it NaN
            entropy[part] = -chunk.exp().mul_(chunk).sum(-1)
        kept = chunk if len(parts) == 1 else None
        ctx.save_for_backward(hidden, weight, support, column, log_probs, entropy, kept)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, weight, support, column, log_probs, entropy, kept = ctx.saved_tensors
        cast_weight = weight.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden)
        # at least float32: a bfloat16 sum over many chunks would lose what the later ones add
        sum_type = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=sum_type) if ctx.needs_input_grad[1] else None
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_probs)
        grad_log_probs = grad_log_probs.masked_fill(log_probs == -torch.inf, 0.0) / ctx.temperature
        if grad_entropy is not None:
            grad_entropy = grad_entropy / ctx.temperature
        for part in _parts(hidden, weight):
            ids = _rows(support, part)
            chunk = _chunk(hidden[part], cast_weight, ids, ctx.temperature, ctx.family) if kept is None else kept
            grad = _gradient(chunk, column[part], entropy[part], grad_log_probs[part], _rows(grad_entropy, part))
            if ids is not None:  # from the columns of the support to those of the vocabulary
                grad = grad.new_zeros(len(grad), len(weight)).scatter_add_(1, ids.clamp(min=0).long(), grad)
            grad = grad.to(hidden.dtype)
            torch.mm(grad, cast_weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[part])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _parts(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    """Return slices of the rows, one chunk each; one empty slice if there are no rows, so that shapes stay right."""
    rows = max((_CPU_CHUNK if hidden.device.type == "cpu" else _CHUNK) // len(weight), 1)
    return [slice(start, start + rows) for start in range(0, max(len(hidden), 1), rows)]


def _rows(values: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if values is None else values[part]


def _chunk(hidden, weight, support, temperature, family) -> torch.Tensor:
    logits = F.linear(hidden, weight).float()
    return log_distribution(family.exclude_never_sampled(logits), temperature, support)


def _gradient(log_probs, column, entropy, grad_log_probs, grad_entropy) -> torch.Tensor:
    """Return the gradient of the logits z at temperature 1.

    ∂ log p_t / ∂z_j = 1[j = t] − p_j and ∂H / ∂z_j = −p_j (log p_j + H).

    Args:
        log_probs: [n, V] or, on a support, [n, C].
        column: [n, 1], t.
        entropy: [n], H.
        grad_log_probs: [n].
        grad_entropy: [n] or `None`.

    Returns:
        [n, V] or [n, C].
    """
    factor = -grad_log_probs.unsqueeze(1)
    if grad_entropy is not None:
        factor = factor - grad_entropy.unsqueeze(1) * (log_probs.clamp(min=SMALLEST) + entropy.unsqueeze(1))
    return log_probs.exp().mul_(factor).scatter_add_(1, column, grad_log_probs.unsqueeze(1))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a matrix product to `total` in place, without a copy where the types allow."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right
