"""DMPO (2510.08233): fitting the policy to the reference tilted by the reward, p_ref · exp(r / α).

rollout     block by block, low-confidence unmasking, temperature 0.2
credit      importance weights of the target over a prompt's completions, less a baseline
likelihood  for the weights: ELBO estimates under policy and reference, on the same views; to learn: pairs of a random
            mask of the whole canvas and its complement, fresh for every inner update
loss        −weight · mean log-probability of the masked tokens, summed over a prompt's completions; no ratio, no clip
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.credit.target_weights import BASELINES, TargetWeights
from trl_diffusion.likelihood import Bernoulli, Likelihood, MaskedViews, SubsetPairs
from trl_diffusion.losses import Contrast, Loss, WeightedLikelihood
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.masked import CompletionLossConfig, MaskRateConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer
from trl_diffusion.validation import one_of

CHOICES = {"objective": ("cross_entropy", "wddo"), "weight_baseline": BASELINES}


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


class DMPOTrainer(DiffusionGRPOTrainer):
    """DMPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = DMPOConfig
    args: DMPOConfig
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

    def credit(self) -> CreditChoice:
        args = self.args
        scale = 1 / args.alpha if args.weight_scale is None else args.weight_scale
        pairs = self._num_views() // 2
        views = MaskedViews(SubsetPairs(pairs), loss_mask="canvas")
        return TargetWeights(args.alpha, scale, args.weight_baseline, views, over_scored=args.objective == "wddo")

    def likelihood(self) -> Likelihood:
        args, views = self.args, self._num_views()
        if args.objective == "wddo":
            return MaskedViews(SubsetPairs(views // 2), loss_mask="canvas")
        return MaskedViews(Bernoulli(views, args.min_mask_rate, args.max_mask_rate, complements=True), "canvas")

    def loss(self) -> Loss:
        return Contrast() if self.args.objective == "wddo" else WeightedLikelihood("mean")

    def _num_views(self) -> int:
        """Return the views per update; WDDO takes twice as many, for its two independent estimates."""
        return self.args.num_mc_samples * (2 if self.args.objective == "wddo" else 1)
