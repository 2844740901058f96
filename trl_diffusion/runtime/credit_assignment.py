"""Applies a method's credit to a rollout: weights over prompt groups, also where a group spans processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from trl_diffusion.credit.group_credit import Credit, GroupValues
from trl_diffusion.likelihood.base import Likelihood, Rows
from trl_diffusion.sampling.rollout import Rollout

# (rows, likelihood, updates, of the reference model?) → log-probabilities [B, μ, V, L]
ScoreRows = Callable[[Rows, Likelihood, Sequence[int], bool], torch.Tensor]
_PLAN = "estimates/"  # before the names of what the estimates' views are made from, in a rollout batch


@dataclass(frozen=True)
class CreditAssignment:
    """Turns advantages into what the loss multiplies completions by.

    Args:
        credit: of the method.
        score: scores views without gradient.
        gather: concatenates rows over all processes.
    """

    credit: Credit
    score: ScoreRows
    gather: Callable[[torch.Tensor], torch.Tensor]

    def assign(self, rollout: Rollout, rows: Rows, advantages: torch.Tensor) -> tuple[Rows, dict[str, float]]:
        """Weigh a new rollout.

        Args:
            rollout: the completions.
            rows: their rollout batch, with `completion_mask`.
            advantages: [B], with a process reward; NaN for a completion without a reward.

        Returns:
            `advantages` [B], 0 for completions without a reward, and whatever `refresh` needs later; and metrics.
        """
        own = {"group_advantages": advantages, "group_lengths": rows["completion_mask"].sum(1)}
        if self.credit.estimates is not None:
            # On the views that would come after those of the last update, so that they share no noise with these; and
            # for all completions, because those that must not learn are weighed like the others.
            after = rollout.updates.stop
            apart = replace(rollout, updates=range(after, after + 1), trainable=torch.ones_like(rollout.trainable))
            plan = self.credit.estimates.plan(apart)
            own |= {"current": self._estimates(rows, plan), "estimated_tokens": plan["completion_mask"].sum(1)}
            if self.credit.needs_reference:
                own |= {"reference": self._estimates(rows, plan, reference=True)}
            own |= {f"{_PLAN}{name}": value for name, value in plan.items()}
        group = {name: rollout.groups(own[name]) for name in _GROUP_FIELDS if name in own}
        weights = self.credit.weigh(_values(group))
        found = {"advantages": rollout.own_of_groups(weights.values).masked_fill(advantages.isnan(), 0.0)}
        return found | (own if self.credit.refreshes else {}), weights.metrics

    def refresh(self, batches: Sequence[Rows], group_size: int) -> dict[str, float]:
        """Weigh the completions again, with estimates under the policy as it is now.

        Args:
            batches: the micro-batches of the rollout batch; their `advantages` are changed.
            group_size: G.

        Returns:
            Metrics.
        """
        names = [name for name in _GROUP_FIELDS if name in batches[0]]
        own = {name: torch.cat([rows[name] for rows in batches]) for name in names}
        plans = [{k.removeprefix(_PLAN): v for k, v in rows.items() if k.startswith(_PLAN)} for rows in batches]
        own["now"] = torch.cat([self._estimates(rows, plan) for rows, plan in zip(batches, plans, strict=True)])
        # TRL shuffled the rows within each process.
        order = self.gather(torch.cat([rows["global_row"] for rows in batches])).argsort()
        group = {name: self.gather(values)[order].view(-1, group_size) for name, values in own.items()}
        weighed = self.credit.weigh(_values(group))
        weights = weighed.values.flatten()
        for rows in batches:
            unscored = rows["group_advantages"].isnan()
            rows["advantages"] = weights[rows["global_row"]].masked_fill(unscored, 0.0)
        return weighed.metrics

    def _estimates(self, rows: Rows, plan: Rows, reference: bool = False) -> torch.Tensor:
        """Estimates [B] of log p(completion) on the views of a plan for one update."""
        likelihood = self.credit.estimates
        texts = {name: rows[name] for name in ("prompt_ids", "prompt_mask", "completion_ids")}
        logps = self.score(texts | plan, likelihood, [0], reference)[:, 0]
        targets = plan["targets"][:, 0]
        return likelihood.estimate(logps, likelihood.scored(plan, 0, range(likelihood.num_views), targets))


_GROUP_FIELDS = ("group_advantages", "group_lengths", "current", "reference", "estimated_tokens")


def _values(group: Rows) -> GroupValues:
    return GroupValues(
        group["group_advantages"],
        group["group_lengths"],
        group.get("current"),
        group.get("reference"),
        group.get("now"),
        group.get("estimated_tokens"),
    )
