"""What the tests of trainers share: one rollout batch, and what the loss is given."""

from __future__ import annotations

import torch
from tiny import MASK


def parameters_of(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def rollout_of(trainer, *prompts: str, copies: int = 4) -> dict[str, torch.Tensor]:
    """A rollout batch of completions of each prompt, in the order of their global rows."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts for _ in range(copies)])


def losses_seen(trainer, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Every view that the training loss scores, in order: log-probabilities of the policy and those compared with, the
    targets, and which tokens of prompt and canvas are hidden (from the right, so that rollouts with other prompts
    compare)."""
    seen: list[dict[str, torch.Tensor]] = []
    score, loss, now = trainer._score, trainer._compute_loss, {}

    def record_loss(model, inputs):
        now.update(rows=inputs, update=trainer._place_in_buffer()[0])
        return loss(model, inputs)

    def compared(name: str, view: int, targets: torch.Tensor) -> torch.Tensor | None:
        values = now["rows"].get(name)
        if values is None:
            return None
        return (values if values.dim() == 2 else values[:, now["update"], view]) * targets

    def record_scores(model, rows, views):
        scores = score(model, rows, views)
        if model.training:
            count = len(now["rows"]["completion_ids"])  # views that are scored together come one after the other
            prompt = rows["prompt_ids"] if views.prompt_ids is None else views.prompt_ids
            hidden = (torch.cat([prompt, views.canvas], dim=1) == MASK).flip(1)
            hidden = torch.nn.functional.pad(hidden, (0, 64 - hidden.size(1)))
            for place, start in enumerate(range(0, len(hidden), count)):
                part = slice(start, start + count)
                view, targets = trainer._view + place, views.targets[part]
                seen.append(
                    {
                        "old": compared("old_per_token_logps", view, targets),
                        "reference": compared("ref_per_token_logps", view, targets),
                        "logps": scores.logps.detach()[part],
                        "targets": targets,
                        "hidden": hidden[part],
                        "global_row": now["rows"]["global_row"],
                    }
                )
        return scores

    monkeypatch.setattr(trainer, "_compute_loss", record_loss)
    monkeypatch.setattr(trainer, "_score", record_scores)
    return seen


def largest_log_ratio(seen: list[dict[str, torch.Tensor]], to: str = "old") -> float:
    return max(float((x["logps"] - x[to])[x["targets"]].abs().max()) for x in seen if x["targets"].any())


def hidden_by_row(seen: list[dict[str, torch.Tensor]], updates: int, views: int) -> torch.Tensor:
    """Which tokens every view hides, bool [updates, M, rows, tokens], from two micro-batches per update."""
    hidden, rows = (torch.stack([x[name] for x in seen]) for name in ("hidden", "global_row"))
    hidden, rows = (x.unflatten(0, (updates, 2, views)).transpose(1, 2).flatten(2, 3) for x in (hidden, rows))
    return hidden.gather(2, rows.argsort(2).unsqueeze(-1).expand_as(hidden))
