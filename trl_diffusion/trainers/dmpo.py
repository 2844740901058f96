"""DMPO (2510.08233): fitting the policy to the reference tilted by the reward, p_ref · exp(r / α).

rollout     block by block, low-confidence unmasking, temperature 0.2
credit      importance weights of the target over a prompt's completions, less a baseline
likelihood  for the weights: ELBO estimates under policy and reference, on the same views; to learn: pairs of a random
            mask of the whole canvas and its complement, fresh for every inner update
loss        −weight · mean log-probability of the masked tokens, summed over a prompt's completions; no ratio, no clip
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import logsigmoid

from trl_diffusion.credit import effective_sample_size, group_softmax, scored_in_group, target_log_weights
from trl_diffusion.likelihood import NoisePlan, elbo_of_pairs, mean_of_targets
from trl_diffusion.likelihood.plans import bernoulli, with_complements
from trl_diffusion.runtime.cost import updates_per_rollout
from trl_diffusion.runtime.run import CompletionCost
from trl_diffusion.trainers.base.completion_loss import CompletionLossConfig, CompletionLossTrainer
from trl_diffusion.trainers.base.masked import MaskRateConfig
from trl_diffusion.validation import one_of

CHOICES = {"objective": ("cross_entropy", "wddo"), "weight_baseline": ("group", "individual", "model", "none")}


@dataclass
class DMPOConfig(CompletionLossConfig, MaskRateConfig):
    """The defaults of DMPO (2510.08233).

    Args:
        alpha: α, temperature of the target. With 0 (and a `weight_scale`) no likelihoods are needed.
        weight_scale: η of the proximal form, log-weight = η α (ELBO_ref − ELBO) + η r; 1/α if not given.
        weight_baseline: what is subtracted from the weights: `group` 1/G, `individual` the weights for the negated
            reward (the paper's choice for Countdown; its optimum is not the target), `model` the policy's own change
            since the rollout, `none`.
        objective: `cross_entropy`, or `wddo`: classifying completions of the target against those of the policy; it
            needs `weight_baseline="none"` and twice the views, scored in one pass.

    Raises:
        ValueError: if α is negative, `num_mc_samples` is odd, or settings do not fit together.
    """

    alpha: float = field(default=0.04, metadata={"help": "Temperature of the target distribution."})
    weight_scale: float | None = field(
        default=None, metadata={"help": "η of the proximal form; 1/alpha if not given."}
    )
    weight_baseline: str = field(default="group", metadata={"help": "group, individual, model or none."})
    objective: str = field(default="cross_entropy", metadata={"help": "cross_entropy or wddo."})
    max_mask_rate: float = field(default=1.0, metadata={"help": "Largest share of the canvas that a view masks."})
    num_mc_samples: int = field(default=4, metadata={"help": "Noised views, in complementary pairs."})
    num_iterations: int = field(default=8, metadata={"help": "Inner updates per rollout batch, μ."})
    num_generations: int | None = field(default=16, metadata={"help": "Completions per prompt, G."})
    temperature: float = field(default=0.2, metadata={"help": "Sampling temperature."})

    def __post_init__(self):
        super().__post_init__()
        self.require_pairs()
        for name, values in CHOICES.items():
            one_of(name, getattr(self, name), values)
        if self.alpha < 0:
            raise ValueError(f"alpha is a temperature and must not be negative; got {self.alpha}.")
        if self.weight_scale is None and self.alpha == 0:
            raise ValueError("alpha=0 needs a weight_scale: the weights are the softmax of weight_scale · reward.")
        if self.weight_scale is not None and self.weight_scale <= 0:
            raise ValueError(f"weight_scale must be positive; got {self.weight_scale}.")
        if self.objective == "wddo" and self.weight_baseline != "none":
            raise ValueError(
                f"objective='wddo' has no weight baseline; set weight_baseline='none', got {self.weight_baseline!r}."
            )
        self.require_plain_rewards()


def weighted_cross_entropy(weights: torch.Tensor, logps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−W · mean over views of the mean log-probability of a view's targets; [B] from [B] and two [B, V, L]."""
    return -weights * mean_of_targets(logps, targets).mean(1)


def wddo_loss(weights: torch.Tensor, change: torch.Tensor, other_change: torch.Tensor) -> torch.Tensor:
    """−[G·w · log σ(D) + log σ(−D')], minimal where D is the log-ratio of target and old policy.

    Args:
        weights: [B], G·w, mean 1 over a prompt's G completions with a reward.
        change: [B], D = ELBO − ELBO_old.
        other_change: [B], the same from independent views.
    """
    return -(weights * logsigmoid(change) + logsigmoid(-other_change))


class DMPOTrainer(CompletionLossTrainer):
    """DMPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = DMPOConfig
    args: DMPOConfig
    whole_canvas = True
    _tag_names = ["trl", "trl_diffusion", "dmpo"]
    _name = "DMPO"
    _paper = {
        "title": "Enhancing Reasoning for Diffusion LLMs via Distribution Matching Policy Optimization",
        "id": "2510.08233",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhu2025dmpo,
                title        = {{Enhancing Reasoning for Diffusion LLMs via Distribution Matching Policy
                                 Optimization}},
                author       = {Yuchen Zhu and Wei Guo and Jaemoo Choi and Petr Molodyk and Bo Yuan and Molei Tao and
                                Yongxin Chen},
                year         = 2025,
                eprint       = {arXiv:2510.08233},
            }"""),
    }

    def __init__(self, model, reward_funcs=None, args=None, *others, **kwargs):
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        self.joint = self._compares_with_old = self.args.objective == "wddo"

    @staticmethod
    def _needs_reference(args) -> bool:
        return args.alpha != 0.0

    def _num_views(self) -> int:
        return self.args.num_mc_samples * (2 if self.joint else 1)

    def _planned_updates(self, mode: str) -> int:
        return self._inner_updates(mode) + 1  # the last ones are those that the weights are estimated on

    def _scored_share(self) -> float:
        return 0.5  # each pair scores the canvas once

    def completion_cost(self) -> CompletionCost:
        cost, views, args = super().completion_cost(), self._num_views(), self.args
        weights = views if args.alpha != 0.0 or args.weight_baseline == "model" else 0
        refreshed = views * (updates_per_rollout(args) - 1) if args.weight_baseline == "model" else 0
        return replace(cost, old=cost.old + weights + refreshed, reference=views if args.alpha != 0.0 else 0)

    def _noise(self, mode, update, trajectory, rows, scope) -> NoisePlan:
        pairs = self._num_views() // 2
        if self.joint or update == self._inner_updates(mode):
            return self._subset_pairs(mode, update, rows, pairs)
        streams = self._streams(mode, update, rows)
        rates, noise = self._uniforms(streams, pairs), self._uniforms(streams, pairs, scope.size(1))
        return with_complements(bernoulli(rates, noise, self.args.min_mask_rate, self.args.max_mask_rate))

    def _plan_views(self, mode, trajectory, rows, learns) -> dict[str, torch.Tensor]:
        plan = super()._plan_views(mode, trajectory, rows, learns & ~rows["advantages"].isnan())
        # what a group's weights are estimated on: completions that must not learn are weighed like the others
        plan["targets"][:, -1] = plan["hidden"][:, -1]
        return plan

    # ---------------------------------------------------------------- weights

    def _assign_credit(self, mode, rows) -> None:
        args, rewards = self.args, rows["advantages"]  # rewards less the prompt's mean, NaN for none
        unscored = rewards.isnan()
        scale = 1 / args.alpha if args.weight_scale is None else args.weight_scale
        reference = current = None
        if args.alpha != 0.0 or args.weight_baseline == "model":
            views = [self._inner_updates(mode)]
            current = self._elbo(rows, views, self._logps_of_views(mode, self.model, rows, views))
            # −inf for the change since the rollout: the baseline leaves out what has no reward
            rows["rollout_elbo"] = current.masked_fill(unscored, torch.inf)
        if args.alpha != 0.0:
            reference = self._elbo(rows, views, self._reference_logps(mode, rows, views))

        def softmax(log_weights: torch.Tensor) -> torch.Tensor:
            return self._over_groups(mode, log_weights.masked_fill(unscored, -torch.inf), group_softmax)

        def weights(rewards: torch.Tensor) -> torch.Tensor:
            return softmax(target_log_weights(reference, current, rewards, args.alpha, scale))

        scored = self._over_groups(mode, rewards, scored_in_group)
        equal = (1 / scored).masked_fill(unscored, 0.0)
        rows["weights"] = weights(rewards)
        rows["weight_baseline"] = {
            "none": lambda: torch.zeros_like(rewards),
            "group": lambda: equal,
            "individual": lambda: weights(-rewards),
            "model": lambda: equal,  # as long as the policy is that of the rollout
        }[args.weight_baseline]()
        self._log_weights(mode, rows["weights"])
        if self.joint:  # WDDO's sample of the policy are the n completions with a reward: n·w in place of G·w
            rows["weights"] = rows["weights"] * scored / self.group_size(mode)

    def _log_weights(self, mode: str, weights: torch.Tensor) -> None:
        groups = self.accelerator.gather(weights).view(-1, self.group_size(mode))
        groups = groups[groups.any(1)]  # a prompt without any reward has no weights
        if len(groups):
            self._metrics[mode]["dmpo/effective_sample_size"].append(effective_sample_size(groups).mean().item())
            self._metrics[mode]["dmpo/max_weight"].append(groups.max(1).values.mean().item())

    def _elbo(self, rows: dict[str, torch.Tensor], views: list[int], logps: torch.Tensor) -> torch.Tensor:
        """ELBO estimates [B] from log-probabilities [B, 1, V, L] on the views of one index."""
        return elbo_of_pairs(logps[:, 0], rows["hidden"][:, views[0]])

    def _prepare_inputs(self, generation_batch):
        rows = super()._prepare_inputs(generation_batch)
        if self.args.weight_baseline == "model" and self.model.training and self._view == 0:
            update, micro_batch = self._place_in_buffer()
            if micro_batch % self.current_gradient_accumulation_steps == 0 and (update, micro_batch) != (0, 0):
                self._refresh_model_baseline()
        return rows

    def _refresh_model_baseline(self) -> None:
        """softmax over a prompt's completions of ELBO_now − ELBO_rollout, before each update of a rollout batch."""
        assert self._buffered_inputs is not None
        slices: list[dict[str, torch.Tensor]] = self._buffered_inputs
        views = [self._inner_updates("train")]
        changes = [
            self._elbo(rows, views, self._logps_of_views("train", self.model, rows, views)) - rows["rollout_elbo"]
            for rows in slices
        ]
        own = torch.cat([rows["global_row"] for rows in slices])  # TRL shuffled them within each process
        order = self.accelerator.gather(own).argsort()
        change = self.accelerator.gather(torch.cat(changes))[order]
        baseline = group_softmax(change.view(-1, self.group_size("train"))).flatten()
        for rows in slices:
            rows["weight_baseline"] = baseline[rows["global_row"]]

    # ---------------------------------------------------------------- loss

    def _completion_losses(self, rows, update, targets, logps) -> torch.Tensor:
        size = self.group_size("train" if self.model.training else "eval")
        if not self.joint:
            return weighted_cross_entropy(size * (rows["weights"] - rows["weight_baseline"]), logps, targets)
        old, half = rows["old_per_token_logps"][:, update], self.args.num_mc_samples
        changes = [
            elbo_of_pairs(logps[:, part], targets[:, part]) - elbo_of_pairs(old[:, part], targets[:, part])
            for part in (slice(None, half), slice(half, None))
        ]
        return wddo_loss(size * rows["weights"], *changes)
