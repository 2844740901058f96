"""The methods under test. A new method joins `test_properties.py` by one entry here.

`applies` names the properties that the method claims, by the numbers in the names of the tests there. (3, that the
estimate is what its formula says, is tested method by method.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from tiny import tiny_model, tiny_sdar, tiny_tokenizer

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.trainers import (
    AGRPOConfig,
    AGRPOTrainer,
    ATPOConfig,
    ATPOTrainer,
    CoupledGRPOConfig,
    CoupledGRPOTrainer,
    DACAConfig,
    DACATrainer,
    DiFFPOConfig,
    DiFFPOTrainer,
    DiffuGRPOConfig,
    DiffuGRPOTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiPOConfig,
    DiPOTrainer,
    DMPOConfig,
    DMPOTrainer,
    EGSPOConfig,
    EGSPOTrainer,
    ESPOConfig,
    ESPOTrainer,
    ForkGRPOConfig,
    ForkGRPOTrainer,
    GDPOConfig,
    GDPOTrainer,
    GDSDConfig,
    GDSDTrainer,
    JustGRPOConfig,
    JustGRPOTrainer,
    MAPGConfig,
    MAPGTrainer,
    SPGConfig,
    SPGTrainer,
    StableDRLConfig,
    StableDRLTrainer,
    StableESPOConfig,
    StableESPOTrainer,
    StepRSConfig,
    StepRSTrainer,
    TraceRLConfig,
    TraceRLTrainer,
    TrajectoryGRPOConfig,
    TrajectoryGRPOTrainer,
    UniGRPOConfig,
    UniGRPOTrainer,
    WD1Config,
    WD1Trainer,
)

ALL_PROPERTIES = frozenset(range(1, 9))
PROMPTS = ["a b", "b a a", "a", "b b a b", "a a", "b", "b a", "a b b"]


def full_attention(**fields):
    return tiny_model(seed=3, **fields)


def block_causal(**fields):
    return tiny_sdar(seed=21, **fields)


@dataclass(frozen=True)
class Method:
    """A trainer, the settings that make it small, and what it claims.

    Args:
        name: of the method.
        trainer: its trainer.
        config: its config.
        settings: fields of the config.
        network: makes the model, which ends half of its texts in the first block; takes fields of its config.
        wrap: turns the reward function into another one, as a `StepAwareReward` does.
        any_rollout: it prescribes no rollout, so that steps may commit as many tokens as are certain.
        views: what its views show, and so what they must cover: `drawn` denoising steps, `every` step of a kind once,
            steps `chosen` or `sampled` by a selector, the `masked` canvas, masks at a random `rate`, `parts` of the
            canvas, complementary `pairs`, `coupled` pairs besides the masked canvas, subsets of fixed `sizes`, random
            `blocks` or subsets of the `text`, `groups` of denoising steps, groups of those `within` every block, or a
            `split` of the tokens at a step.
        fresh_views: every inner update has views of its own.
        credit: what it makes of the rewards: the `outcome`, the outcome `by_length` of the text, the outcome and a
            `process_reward`, the `leave_one_out` advantage, the `z_score`, or weights, a `softmax` or an
            `opposed_softmax`.
        few_views: settings for the fewest views that it takes.
        many_views: settings for more of them.
        compares: settings with which it compares with a reference model, if it ever does.
        applies: the properties that it claims.
    """

    name: str
    trainer: type[DiffusionGRPOTrainer]
    config: type[DiffusionGRPOConfig]
    settings: dict[str, Any] = field(default_factory=dict)
    network: Callable[..., Any] = full_attention
    wrap: Callable[[Callable], Callable] = lambda reward: reward
    any_rollout: bool = True
    views: str = "drawn"
    fresh_views: bool = True
    credit: str = "outcome"
    few_views: dict[str, Any] = field(default_factory=lambda: {"num_mc_samples": 1})
    many_views: dict[str, Any] = field(default_factory=lambda: {"num_mc_samples": 8})
    compares: dict[str, Any] = field(default_factory=lambda: {"loss_type": "dr_grpo", "beta": 0.1})
    applies: frozenset[int] = ALL_PROPERTIES

    def make(
        self,
        output_dir,
        *,
        model=None,
        reward: Callable | None = None,
        peft_config=None,
        choices: dict[str, Any] | None = None,
        **settings,
    ) -> DiffusionGRPOTrainer:
        """A trainer on the four-word model: 4 prompts × 4 completions per update, plain SGD with rate 1."""
        defaults = dict(
            output_dir=str(output_dir),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=8,
            block_length=4,
            denoising_steps=4,
            num_mc_samples=3,
            temperature=0.9,
            top_k=0,
            top_p=1.0,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim="sgd",
            max_grad_norm=0.0,
            weight_decay=0.0,
            max_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        args = self.config(**defaults | self.settings | settings)
        prompts_of_a_rollout = args.generation_batch_size // args.num_generations
        return self.trainer(
            model if model is not None else self.network(),
            self.wrap(reward or text_reward),
            args,
            Dataset.from_dict({"prompt": PROMPTS * max(1, -(-prompts_of_a_rollout // len(PROMPTS)))}),
            None,
            tiny_tokenizer(),
            peft_config=peft_config,
            **choices or {},
        )


def text_reward(completions, completion_ids, **kwargs) -> list[float]:
    """Never ties within a group unless the completions are equal: counts words, with a term for every position."""
    return [sum((token == 2) + 0.01 * token * (i + 1) for i, token in enumerate(ids)) for ids in completion_ids]


def step_aware(reward: Callable) -> StepAwareReward:
    return StepAwareReward(reward, success_threshold=2.0, num_rollouts=2)


ONE_UPDATE = {"num_iterations": 1}
PAIR = {"num_mc_samples": 2, "num_iterations": 1}
PAIRS = {"num_mc_samples": 4, "num_iterations": 1}
DMPO = PAIRS | {"alpha": 1.0}  # the paper's 0.04 leaves one completion per prompt
REPLAY: dict[str, Any] = {"fresh_views": False, "credit": "z_score", "many_views": {"shrink": 1}}
IN_PAIRS: dict[str, Any] = {"few_views": {"num_mc_samples": 2}, "many_views": {"num_mc_samples": 8}}
WITHIN_BLOCKS = {"denoising_steps": 8, "num_mc_samples": 0, "num_iterations": 1}
LEFT_TO_RIGHT = {"block_length": 1, "denoising_steps": 8, "num_mc_samples": 0}
FORKS = {"denoising_steps": 8, "num_mc_samples": 8}
EVERY_STEP: dict[str, Any] = {"views": "every", "fresh_views": False}
POSITIONS = {"denoising_steps": 8, "num_mc_samples": 8, "num_iterations": 1}
FILLS = {"fill_weight": 0.5, "denoising_steps": 8, "num_mc_samples": 3}
LEFT_OUT: dict[str, Any] = {"credit": "leave_one_out", "compares": {"beta": 0.1}}
OWN_LOSS: dict[str, Any] = {"applies": ALL_PROPERTIES - {1}, "compares": {}}  # without ratios

METHODS = [
    Method("trajectory_grpo", TrajectoryGRPOTrainer, TrajectoryGRPOConfig),
    Method("agrpo", AGRPOTrainer, AGRPOConfig),
    Method("agrpo, truncated support", AGRPOTrainer, AGRPOConfig, {"top_k": 3, "top_p": 0.95}),
    Method("agrpo, max_prob", AGRPOTrainer, AGRPOConfig, {"unmasking": "max_prob", "step_scope": "exact"}),
    Method("atpo", ATPOTrainer, ATPOConfig, views="chosen", fresh_views=False),
    Method(
        "atpo, sampled by group",
        ATPOTrainer,
        ATPOConfig,
        {"step_selector": "sampled", "signal_average": "group"},
        views="sampled",
    ),
    Method("just_grpo", JustGRPOTrainer, JustGRPOConfig, LEFT_TO_RIGHT, any_rollout=False, **EVERY_STEP),
    Method(
        "just_grpo, top entropy",
        JustGRPOTrainer,
        JustGRPOConfig,
        LEFT_TO_RIGHT | {"step_draws": "top_entropy", "step_share": 0.5},
        any_rollout=False,
        **EVERY_STEP,
        applies=frozenset({2, 4}),  # the choice of steps; all else is as above
    ),
    Method("fork_grpo", ForkGRPOTrainer, ForkGRPOConfig, FORKS, any_rollout=False, **EVERY_STEP),
    Method("mapg", MAPGTrainer, MAPGConfig, POSITIONS, **EVERY_STEP, **LEFT_OUT),
    Method(
        "mapg, merged",
        MAPGTrainer,
        MAPGConfig,
        POSITIONS | {"merged_steps": 2, "num_mc_samples": 4, "unmasking": "low_confidence"},
        **EVERY_STEP,
        **LEFT_OUT,
        many_views={"num_mc_samples": 4},
    ),
    Method("egspo", EGSPOTrainer, EGSPOConfig, FILLS, **EVERY_STEP),
    Method("step_rs", StepRSTrainer, StepRSConfig),
    Method("daca", DACATrainer, DACAConfig, ONE_UPDATE, views="parts"),
    Method("diffpo", DiFFPOTrainer, DiFFPOConfig, PAIR, views="split", **IN_PAIRS),
    Method("diffu_grpo", DiffuGRPOTrainer, DiffuGRPOConfig, ONE_UPDATE, views="masked"),
    Method(
        "sapo", DiffuGRPOTrainer, DiffuGRPOConfig, ONE_UPDATE, wrap=step_aware, views="masked", credit="process_reward"
    ),
    Method("uni_grpo", UniGRPOTrainer, UniGRPOConfig, ONE_UPDATE, views="rate"),
    Method(
        "coupled_grpo",
        CoupledGRPOTrainer,
        CoupledGRPOConfig,
        PAIR,
        views="coupled",
        credit="leave_one_out",
        **IN_PAIRS,
    ),
    Method(
        "espo",
        ESPOTrainer,
        ESPOConfig,
        PAIRS,
        views="pairs",
        credit="leave_one_out",
        compares={"beta": 0.1},
        **IN_PAIRS,
    ),
    Method("gdpo", GDPOTrainer, GDPOConfig, ONE_UPDATE, views="sizes", compares={"beta": 0.1}),
    Method(
        "gdsd",
        GDSDTrainer,
        GDSDConfig,
        # the release's range of 4e-4 would leave a second update of a rollout nothing to learn at this learning rate
        PAIRS | {"psi": 1.0, "epsilon": 0.5},
        views="pairs",
        credit="leave_one_out",
        compares={"beta": 0.1},
        **IN_PAIRS,
    ),
    Method("wd1", WD1Trainer, WD1Config, ONE_UPDATE, views="masked", credit="opposed_softmax", **OWN_LOSS),
    Method("spg", SPGTrainer, SPGConfig, PAIR, views="blocks", credit="by_length", **OWN_LOSS),
    Method(
        "spg, random", SPGTrainer, SPGConfig, PAIR | {"noise": "random"}, views="text", credit="by_length", **OWN_LOSS
    ),
    Method(
        "spg, informed",
        SPGTrainer,
        SPGConfig,
        PAIR | {"mask_bias": "informed", "mask_window": 2, "denoising_steps": 8},
        views="blocks",
        credit="by_length",
        **OWN_LOSS,
    ),
    Method(
        "stable_drl",
        StableDRLTrainer,
        StableDRLConfig,
        # two updates a rollout, so that weights change where backends are compared over three updates
        {"num_mc_samples": 2, "num_iterations": 2},
        views="blocks",
        **OWN_LOSS,
    ),
    Method(
        "stable_espo",
        StableESPOTrainer,
        StableESPOConfig,
        PAIR | {"num_iterations": 2},
        views="pairs",
        credit="leave_one_out",
        applies=ALL_PROPERTIES - {1},
        compares={"beta": 0.1},
        **IN_PAIRS,
    ),
    Method(
        "tracerl",
        TraceRLTrainer,
        TraceRLConfig,
        {"shrink": 2, "denoising_steps": 8, "num_mc_samples": 0, "num_iterations": 1},
        views="groups",
        few_views={"shrink": 8},
        **REPLAY,
        compares={"beta": 0.1},
    ),
    Method(
        "tracerl, block",
        TraceRLTrainer,
        TraceRLConfig,
        WITHIN_BLOCKS | {"block_causal": True, "shrink": 2, "unmasking": "random"},
        network=block_causal,
        views="within",
        few_views={"shrink": 4},
        **REPLAY,
        compares={"beta": 0.1},
    ),
    Method(
        "dipo",
        DiPOTrainer,
        DiPOConfig,
        WITHIN_BLOCKS,
        network=block_causal,
        views="within",
        few_views={"shrink": 4},
        **REPLAY,
        compares={},
    ),
    Method("dmpo", DMPOTrainer, DMPOConfig, DMPO, views="rate", credit="softmax", **OWN_LOSS, **IN_PAIRS),
    Method(
        "dmpo, wddo",
        DMPOTrainer,
        DMPOConfig,
        DMPO | {"objective": "wddo", "weight_baseline": "none"},
        views="pairs",
        credit="softmax",
        compares={},
        **IN_PAIRS,
    ),
]


def method_named(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def with_property(number: int) -> list[Method]:
    """The methods that claim a property."""
    return [method for method in METHODS if number in method.applies]
