"""Applies what a credit says about single views and tokens to a rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_diffusion.credit.group_credit import Credit
from trl_diffusion.credit.per_view import GroupViews, ViewCredit
from trl_diffusion.credit.success import awaited
from trl_diffusion.credit.token_weights import TokenCredit
from trl_diffusion.family import DiffusionFamily
from trl_diffusion.likelihood.base import Likelihood, Rows, describe
from trl_diffusion.likelihood.views import Views
from trl_diffusion.runtime.rollouts import RolloutEngine
from trl_diffusion.runtime.texts import arguments_of_rewards
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators
from trl_diffusion.sampling.rollout import Rollout
from trl_diffusion.streams import Purpose


@dataclass(frozen=True)
class ViewCreditAssignment:
    """Makes `view_advantages` and `token_weights` of a rollout batch, where the credit has them.

    Args:
        credit: of the method.
        likelihood: of the method.
        reward_functions: guarded, as the trainer calls them.
        reward_weights: float [reward functions].
        family: of the model.
        tokenizer: of the model.

    Raises:
        ValueError: if greedily filled views are needed, and the model cannot fill a canvas in one step or a reward is
            not a function.
    """

    credit: Credit
    likelihood: Likelihood
    reward_functions: list[Any]
    reward_weights: torch.Tensor
    family: DiffusionFamily
    tokenizer: Any

    def __post_init__(self) -> None:
        if not (isinstance(self.credit, ViewCredit) and self.credit.needs_fills):
            return
        if self.family.attention_block is not None:
            raise ValueError(
                f"{describe(self.credit)} lets the network fill the whole canvas in one step, and "
                f"{self.family.name} writes blocks of {self.family.attention_block} tokens. Take a model with full "
                "attention, or another credit."
            )
        if models := [
            type(reward).__name__ for reward in self.reward_functions if isinstance(reward, torch.nn.Module)
        ]:
            raise ValueError(
                f"{describe(self.credit)} judges more texts than the completions, with reward functions alone; got "
                f"the reward model {models[0]}. Wrap it in a function that returns one number per completion."
            )

    def assign(
        self, rollout: Rollout, rows: Rows, engine: RolloutEngine, trainer_state: Any
    ) -> tuple[Rows, dict[str, float], float]:
        """Weigh the views and tokens of a new rollout.

        Args:
            rollout: the completions.
            rows: their rollout batch, with `advantages` [B].
            engine: the policy.
            trainer_state: transformers' state of the run.

        Returns:
            `view_advantages` float32 [B, μ, V] and `token_weights` float32 [B, L], if the credit has them; metrics;
            and the forward units that it took on all processes.
        """
        if isinstance(self.credit, TokenCredit):
            return {"token_weights": self.credit.token_weights(rollout)}, {}, 0.0
        if not isinstance(self.credit, ViewCredit):
            return {}, {}, 0.0
        views = [
            self.likelihood.view(rows, update, view, self.family.mask_token_id)
            for update in range(len(rollout.updates))
            for view in range(self.likelihood.num_views)
        ]
        shape = (len(rollout.updates), self.likelihood.num_views)
        weights = self.reward_weights.to(rollout.device)
        totals = (
            (rollout.finished.rewards * weights)
            .nansum(1)
            .masked_fill(rollout.finished.rewards.isnan().all(1), torch.nan)
        )
        shown = torch.stack([(view.canvas != self.family.mask_token_id).float().mean(1) for view in views], 1)
        fills, units, metrics = None, 0.0, {}
        if self.credit.needs_fills:
            filled, units = self._fill(rollout, views, engine, trainer_state)
            units = float(rollout.gather(torch.tensor([units], device=rollout.device)).sum())
            fills = self._groups(rollout, filled.unflatten(1, shape))
            metrics = {"credit/fill_reward": fills.nanmean().item()}
        advantages = rows["advantages"].masked_fill(~rollout.scored, torch.nan)
        group = GroupViews(
            rollout.groups(advantages),
            self._groups(rollout, shown.unflatten(1, shape)),
            totals.view(-1, rollout.group_size),
            fills,
        )
        found = rollout.own(self.credit.of_views(group).flatten(0, 1))
        unscored = ~rollout.scored.view(-1, 1, 1)
        return {"view_advantages": found.float().masked_fill(unscored, 0.0)}, metrics, units

    def _groups(self, rollout: Rollout, values: torch.Tensor) -> torch.Tensor:
        """Values [B, μ, V] of every process as whole prompt groups [N, G, μ, V]."""
        return rollout.gather(values.contiguous()).unflatten(0, (-1, rollout.group_size))

    def _fill(
        self, rollout: Rollout, views: list[Views], engine: RolloutEngine, trainer_state: Any
    ) -> tuple[torch.Tensor, float]:
        """Rewards [B, μ·V] of the views' canvases, filled greedily in one step; NaN for an empty view."""
        rewards, units = [], 0.0
        with engine.policy() as model:
            for view in views:
                present = view.targets.any(1)
                # A finished canvas costs no forward.
                canvas = torch.where(present.unsqueeze(1), view.canvas, rollout.trajectory.completion_ids)
                filled, spent = self._write(rollout, canvas, engine, model)
                units += spent
                rewards.append(self._judge(rollout, present, filled, trainer_state))
        return torch.stack(rewards, 1), units

    def _write(
        self, rollout: Rollout, canvas: torch.Tensor, engine: RolloutEngine, model: Any
    ) -> tuple[torch.Tensor, float]:
        """Write the likeliest token at every masked position of canvases [B, L]; return them and the forward units."""
        length = canvas.size(1)
        at_once = SamplingConfig(length, 1, length, temperature=0.0, record_support=False)
        state = CanvasState(canvas, torch.full_like(canvas[:, 0], length))
        # Nothing is drawn at temperature 0, but every row has its stream.
        key = (Purpose.PROBE_ROLLOUT, rollout.number)
        streams = row_generators(rollout.seed, *key, rows=rollout.global_rows.tolist())
        written = engine.sample(model, rollout.prompt_ids, rollout.prompt_mask, at_once, streams, state)
        return written.completion_ids, float(written.row_units.sum())

    def _judge(
        self, rollout: Rollout, present: torch.Tensor, canvases: torch.Tensor, trainer_state: Any
    ) -> torch.Tensor:
        """Weighted rewards [B] of canvases, NaN where no view is or no function gave one."""
        found = torch.full((len(present), len(self.reward_functions)), torch.nan, device=rollout.device)
        rows = present.nonzero().flatten().tolist()
        if rows:
            arguments = arguments_of_rewards(
                rows, canvases[present], rollout.finished, self.family, self.tokenizer, trainer_state
            )
            for index, function in enumerate(self.reward_functions):
                values = [torch.nan if value is None else value for value in awaited(function(**arguments))]
                found[present, index] = torch.tensor(values, dtype=found.dtype, device=found.device)
        total = (found * self.reward_weights.to(found.device)).nansum(1)
        return total.masked_fill(found.isnan().all(1), torch.nan)
