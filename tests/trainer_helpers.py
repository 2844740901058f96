"""What the tests of trainers share: one rollout batch, and what the loss is given."""

from __future__ import annotations

import torch
from tiny import MASK
from trl import GRPOTrainer


def parameters_of(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def rollout_of(trainer, *prompts: str, copies: int = 4) -> dict[str, torch.Tensor]:
    """A rollout batch of completions of each prompt, in the order of their global rows."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts for _ in range(copies)])


def losses_seen(trainer, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What every evaluation of the training loss is given, in order: compared log-probabilities as TRL's loss gets
    them, those of the policy, and which tokens of prompt and canvas are hidden (from the right, so that rollouts with
    other prompts compare)."""
    seen = []
    score, loss = trainer._score, GRPOTrainer._compute_loss

    def record_loss(self, model, inputs):
        seen.append({"old": inputs["old_per_token_logps"], "reference": inputs.get("ref_per_token_logps")})
        return loss(self, model, inputs)

    def record_scores(model, rows, views):
        scores = score(model, rows, views)
        if model.training:
            prompt = rows["prompt_ids"] if views.prompt_ids is None else views.prompt_ids
            hidden = (torch.cat([prompt, views.canvas], dim=1) == MASK).flip(1)
            seen[-1] |= {
                "logps": scores.logps.detach(),
                "targets": views.targets,
                "hidden": torch.nn.functional.pad(hidden, (0, 64 - hidden.size(1))),
                "global_row": rows["global_row"],
            }
        return scores

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", record_loss)
    monkeypatch.setattr(trainer, "_score", record_scores)
    return seen


def largest_log_ratio(seen: list[dict[str, torch.Tensor]], to: str = "old") -> float:
    return max(float((x["logps"] - x[to])[x["targets"]].abs().max()) for x in seen if x["targets"].any())


def hidden_by_row(seen: list[dict[str, torch.Tensor]], updates: int, views: int) -> torch.Tensor:
    """Which tokens every view hides, bool [updates, M, rows, tokens], from two micro-batches per update."""
    hidden, rows = (torch.stack([x[name] for x in seen]) for name in ("hidden", "global_row"))
    hidden, rows = (x.unflatten(0, (updates, 2, views)).transpose(1, 2).flatten(2, 3) for x in (hidden, rows))
    return hidden.gather(2, rows.argsort(2).unsqueeze(-1).expand_as(hidden))
