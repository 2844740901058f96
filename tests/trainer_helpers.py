"""What the tests of trainers share: one rollout batch, and what the loss is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny import MASK

from trl_diffusion.likelihood import ScoredViews, Scores, Views
from trl_diffusion.losses import LossInputs
from trl_diffusion.runtime.scoring import ViewScorer
from trl_diffusion.sampling.rollout import Rollout


def parameters_of(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def rollout_of(trainer, *prompts: str, copies: int = 4) -> dict[str, torch.Tensor]:
    """A rollout batch of completions of each prompt, in the order of their global rows."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts for _ in range(copies)])


def plan_of(
    trainer, trajectory, rows: dict[str, torch.Tensor], likelihood=None, **facts: Any
) -> dict[str, torch.Tensor]:
    """Let a likelihood plan the views of given completions."""
    return (likelihood or trainer.choices.likelihood).plan(rollout_with(trainer, trajectory, rows, **facts))


def rollout_with(trainer, trajectory, rows: dict[str, torch.Tensor], **facts: Any) -> Rollout:
    """A first training rollout of given completions."""
    count = len(rows["completion_ids"])
    known: dict[str, Any] = dict(
        mode="train",
        number=0,
        seed=trainer.args.seed,
        updates=range(trainer.num_iterations),
        group_size=trainer.num_generations,
        num_rows=trainer.args.generation_batch_size,
        global_rows=rows.get("global_row", torch.arange(count)),
        own_rows=slice(None),
        family=trainer.family,
        sampling=trainer.args.sampling_config().on_grid(trainer.family),
        prompt_ids=rows.get("prompt_ids"),
        prompt_mask=rows.get("prompt_mask", torch.ones(count, 1)),
        trajectory=trajectory,
        finished=None,
        trainable=torch.ones(count, dtype=torch.bool),
        gather=lambda values: values,
    )
    return Rollout(**known | facts)


def estimate_views(trainer, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plan of the views on which the weights of a first rollout were estimated."""
    trains = trainer.model.training
    after = trainer.num_iterations if trains else 1
    facts: dict[str, Any] = dict(mode="train" if trains else "eval", updates=range(after, after + 1))
    if not trains:
        facts["num_rows"] = trainer.args.per_device_eval_batch_size
    trajectory = SimpleNamespace(completion_ids=rows["completion_ids"], given=None)
    return plan_of(trainer, trajectory, rows, trainer.choices.credit.estimates, **facts)


def num_views(trainer) -> int:
    return trainer.choices.likelihood.num_views


def view_of(trainer, rows: dict[str, torch.Tensor], update: int, view: int) -> Views:
    return trainer.choices.likelihood.view(rows, update, view, trainer.family.mask_token_id)


def score(trainer, model, rows: dict[str, torch.Tensor], views: Views) -> Scores:
    return trainer.scorer.score(model, rows, views, trainer.choices.likelihood)


def logps_of(trainer, model, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities [B, μ, V, L] of all planned views under a model."""
    updates = range((rows["masked"] if "masked" in rows else rows["view_steps"]).size(1))
    return trainer.scorer.logps(model, trainer.model, rows, trainer.choices.likelihood, updates)[0]


def loss_of_update(trainer, rows: dict[str, torch.Tensor], update: int = 0) -> torch.Tensor:
    """The loss of an inner update on these rows, over all views."""
    views = range(trainer.num_backwards())
    return sum(trainer._view_loss(trainer.model, rows, update, view) for view in views)


def loss_inputs(logps: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor, **others: Any) -> LossInputs:
    """Make the inputs of a loss from log-probabilities and targets [B, V, L] and advantages [B]."""
    lengths = others.pop("lengths", targets.any(1).sum(1))
    known: dict[str, Any] = dict(entropies=torch.zeros_like(logps), old=None, reference=None, estimate=None)
    facts = ScoredViews(targets, lengths, others.pop("weights", None), others.pop("rates", None))
    views = advantages.unsqueeze(1).expand(-1, logps.size(1))
    return LossInputs(logps=logps, advantages=views, views=facts, **known | others)


def losses_seen(trainer, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Every view that the training loss scores, in order: log-probabilities of the policy and those compared with, the
    targets, and which tokens of prompt and canvas are hidden (from the right, so that rollouts with other prompts
    compare)."""
    seen: list[dict[str, torch.Tensor]] = []
    score, loss, now = ViewScorer.score_together, trainer._compute_loss, {}

    def record_loss(model, inputs):
        now.update(rows=inputs, update=trainer._place_in_buffer()[0])
        return loss(model, inputs)

    def compared(name: str, view: int, targets: torch.Tensor) -> torch.Tensor | None:
        values = now["rows"].get(name)
        if values is None:
            return None
        return (values if values.dim() == 2 else values[:, now["update"], view]) * targets

    def record_scores(self, model, rows, views, likelihood):
        scores = score(self, model, rows, views, likelihood)
        if model.training:
            for place, shown in enumerate(views):
                prompt = rows["prompt_ids"] if shown.prompt_ids is None else shown.prompt_ids
                hidden = (torch.cat([prompt, shown.canvas], dim=1) == MASK).flip(1)
                view = trainer._view + place
                seen.append(
                    {
                        "old": compared("old_per_token_logps", view, shown.targets),
                        "reference": compared("ref_per_token_logps", view, shown.targets),
                        "logps": scores.logps.detach()[:, place],
                        "targets": shown.targets,
                        "hidden": torch.nn.functional.pad(hidden, (0, 64 - hidden.size(1))),
                        "global_row": now["rows"]["global_row"],
                    }
                )
        return scores

    monkeypatch.setattr(trainer, "_compute_loss", record_loss)
    monkeypatch.setattr(ViewScorer, "score_together", record_scores)
    return seen


def largest_log_ratio(seen: list[dict[str, torch.Tensor]], to: str = "old") -> float:
    return max(float((x["logps"] - x[to])[x["targets"]].abs().max()) for x in seen if x["targets"].any())


def hidden_by_row(seen: list[dict[str, torch.Tensor]], updates: int, views: int) -> torch.Tensor:
    """Which tokens every view hides, bool [updates, M, rows, tokens], from two micro-batches per update."""
    hidden, rows = (torch.stack([x[name] for x in seen]) for name in ("hidden", "global_row"))
    hidden, rows = (x.unflatten(0, (updates, 2, views)).transpose(1, 2).flatten(2, 3) for x in (hidden, rows))
    return hidden.gather(2, rows.argsort(2).unsqueeze(-1).expand_as(hidden))
