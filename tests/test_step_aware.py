"""Step-aware rewards (SAPO): hand-computed cases, states, and trainers against a reference written out here."""

from __future__ import annotations

import asyncio
import functools
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from methods import METHODS, PROMPTS, text_reward
from test_sampling import always
from tiny import END, MASK, TAIL, A, B, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

import trl_diffusion.runtime.rollouts as rollouts_module
from trl_diffusion.credit import StepAwareReward
from trl_diffusion.credit.step_aware import group_success_rate
from trl_diffusion.credit.step_aware_states import probe_points, probe_state, settled
from trl_diffusion.models import DiffusionFamily
from trl_diffusion.runtime.step_aware_probe import StepAwareProbe, _Continuations
from trl_diffusion.sampling import CanvasState, SamplingConfig, Trajectory, row_generators, sample
from trl_diffusion.streams import Purpose
from trl_diffusion.trainers import DiffuGRPOConfig, DiffuGRPOTrainer

FAMILY = DiffusionFamily("tiny", MASK, 5, (TAIL, END), TAIL)
NAN = float("nan")
BY_NAME = {method.name: method for method in METHODS}
DIFFU, TRAJECTORY = BY_NAME["diffu_grpo"], BY_NAME["trajectory_grpo"]


def ones(completions, **_) -> list[float]:
    return [1.0] * len(completions)


def step_aware(reward=ones, **settings) -> StepAwareReward:
    if "success" not in settings:
        settings = {"success_threshold": 1.0} | settings
    return StepAwareReward(reward, **settings)


def f64(*values) -> torch.Tensor:
    return torch.tensor([NAN if value is None else value for value in values], dtype=torch.float64)


# ---------------------------------------------------------------- the formulas, 2 prompts × 3 completions


def same(result: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(result.double(), f64(*expected), rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("success", "rate", "left_out"),
    [
        ([1, 0, 1, 0, 0, 1], [2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3], [0.5, 1, 0.5, 0.5, 0.5, 0]),
        ([1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
        # unknown ones leave the rate, their own included
        ([1, None, 0, None, None, 1], [0.5, 0.5, 0.5, 1, 1, 1], [0, 0.5, 1, 1, 1, None]),
        ([None, None, None, 1, 0, 0], [None, None, None, 1 / 3, 1 / 3, 1 / 3], [None, None, None, 0, 0.5, 0.5]),
    ],
    ids=["mixed", "all right and all wrong", "some unknown", "all unknown"],
)
def test_group_success_rate(success, rate, left_out):
    same(group_success_rate(f64(*success), 3), rate)
    same(group_success_rate(f64(*success), 3, leave_one_out=True), left_out)


@pytest.mark.parametrize(
    ("settings", "probed"),
    [
        ({}, [True, False, False, False, False, False]),
        # also the well-formatted wrong answer of a failing group, but no completion whose success is unknown
        ({"gate": "advantage"}, [True, False, False, True, False, False]),
        ({"form": "mean_normalised"}, [True, True, True, True, True, False]),
    ],
    ids=["success", "advantage", "mean_normalised"],
)
def test_which_completions_are_probed(settings, probed):
    advantages = torch.tensor([0.4, -0.4, 0.0, 0.2, -0.1, 0.3])
    success = f64(1, 0, 1, 0, 0, None)
    assert step_aware(**settings).probed(advantages, success).tolist() == probed


PROCESS_REWARDS = [0.5, None, -0.75, None, None, 1.0]


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({}, [0.5, 0, -0.75, 0, 0, 1.0]),
        ({"weight": 0.4}, [0.2, 0, -0.3, 0, 0, 0.4]),
        ({"weight": 0.0}, [0, 0, 0, 0, 0, 0]),
        ({"clamp": (0.0, 0.6)}, [0.5, 0, 0, 0, 0, 0.6]),
        ({"clamp": (-0.5, 0.25), "weight": 2.0}, [0.5, 0, -1.0, 0, 0, 0.5]),
        # the mean of a group is over those that have a process reward
        ({"form": "mean_normalised"}, [0.625, 0, -0.625, 0, 0, 0]),
        ({"form": "mean_normalised", "clamp": (-0.25, 1.0), "weight": 2.0}, [0.75, 0, -0.75, 0, 0, 0]),
    ],
    ids=["plain", "weight", "weight 0", "clamp", "clamp, then weight", "mean", "clamp, mean, weight"],
)
def test_advantages(settings, added):
    before = torch.tensor([0.25, -0.5, 0.25, 0.1, -0.2, 0.1])
    kept = before.clone()
    after = step_aware(**settings).advantages(before, f64(*PROCESS_REWARDS), 3)
    assert after.dtype == torch.float32 and torch.equal(before, kept)
    same(after - before, added)
    assert torch.equal(after[[1, 3, 4]], before[[1, 3, 4]])  # to the last bit where nothing was measured


def test_a_group_without_process_rewards_keeps_its_advantages():
    before = torch.tensor([0.25, -0.5, 0.25, 0.1, -0.2, 0.1])
    for form in ("additive", "mean_normalised"):
        assert torch.equal(step_aware(form=form).advantages(before, f64(*[None] * 6), 3), before)


# ---------------------------------------------------------------- which completions succeeded


def test_success_by_threshold():
    def reward(completions, **_):
        return [0.9, 0.89, None, 1.5, NAN]

    settings = step_aware(reward, success_threshold=0.9)
    same(settings.successes(["a"] * 5, ["b"] * 5), [1, 0, None, 1, None])
    same(settings.successes(["a"] * 5, ["b"] * 5, rewards=[0.0, 1.0, None, 0.9, 0.0]), [0, 1, None, 1, 0])
    # TRL keeps rewards in float32, where 0.9 is a little less
    of_trl = torch.tensor([0.9, 0.8999]).tolist()
    assert of_trl[0] < 0.9
    same(settings.successes(["a"] * 2, ["b"] * 2, rewards=of_trl), [1, 0])


def test_success_by_a_function_of_its_own():
    seen = []

    def right(prompts, completions, answer, **kwargs):
        seen.append((prompts, completions, answer, kwargs))
        return [text == a for text, a in zip(completions, answer, strict=True)]

    def reward(completions, **_):
        return [0.0, 5.0, None, 0.0]

    settings = step_aware(reward, success=right)
    success = settings.successes(
        ["p"] * 4, ["a", "b", "a", "b"], answer=["a", "a", "a", "b"], completion_ids=[[2]] * 4
    )
    same(success, [1, 0, None, 1])  # not by the reward, but a None reward is unknown whatever the function says
    assert seen == [(["p"] * 4, ["a", "b", "a", "b"], ["a", "a", "a", "b"], {"completion_ids": [[2]] * 4})]


def test_success_may_be_unknown():
    settings = step_aware(success=lambda completions, **_: [True, None, 0, 1])
    same(settings.successes(["p"] * 4, ["a"] * 4), [1, None, 0, 1])


def test_asynchronous_functions():
    async def reward(completions, factor, **_):
        await asyncio.sleep(0)
        return [factor * len(text) for text in completions]

    async def right(completions, **_):
        await asyncio.sleep(0)
        return [text == "ab" for text in completions]

    assert step_aware(reward)(prompts=["p", "p"], completions=["ab", "b"], factor=2) == [4, 2]
    settings = step_aware(reward, success=right)
    same(settings.successes(["p", "p"], ["ab", "b"], factor=2), [1, 0])

    async def inside_of_a_loop():
        return settings(prompts=["p"], completions=["aaa"], factor=1)

    assert asyncio.run(inside_of_a_loop()) == [3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"success_threshold": 1.0}, "3 completions got 2 rewards and 2 successes"),
        ({"success": lambda completions, **_: [True] * 3}, "3 completions got 2 rewards and 3 successes"),
        ({"success": lambda completions, **_: [True]}, "3 completions got 2 rewards and 1 successes"),
    ],
    ids=["reward", "reward beside success", "both"],
)
def test_one_value_per_completion_is_required(settings, message):
    with pytest.raises(ValueError, match=message):
        step_aware(lambda completions, **_: [1.0, 0.0], **settings).successes(["p"] * 3, ["a"] * 3)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either `success`, a function, or `success_threshold`, a number; got success=None"),
        ({"success": ones, "success_threshold": 1.0}, "give either `success`, a function, or `success_threshold`"),
        ({"state": "half"}, "state must be one of block, keep, prefix; got 'half'"),
        ({"state_shared_by": "batch"}, "state_shared_by must be one of group, completion; got 'batch'"),
        ({"baseline": "batch"}, "baseline must be one of group, earlier_state; got 'batch'"),
        ({"form": "normalised"}, "form must be one of additive, mean_normalised; got 'normalised'"),
        ({"gate": "reward"}, "gate must be one of success, advantage; got 'reward'"),
        ({"num_rollouts": 0}, r"num_rollouts \(0\) and num_mask_tokens \(64\) must be at least 1"),
        ({"num_mask_tokens": 0}, r"num_rollouts \(3\) and num_mask_tokens \(0\) must be at least 1"),
        ({"clamp": (1.0, 0.0)}, r"clamp must be \(low, high\) with low < high, got \(1.0, 0.0\)"),
        ({"clamp": (0.5, 0.5)}, "clamp must be"),
        ({"form": "mean_normalised", "gate": "advantage"}, "form='mean_normalised' probes every completion"),
        ({"state": "keep", "num_mask_tokens": 32}, "state='keep' continues the canvas as it was"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    if settings and "success" not in settings:
        settings = {"success_threshold": 1.0} | settings
    with pytest.raises(ValueError, match=message):
        StepAwareReward(ones, **settings)


def test_what_is_no_reward_function_is_refused():
    with pytest.raises(TypeError, match="wraps a reward function, got str"):
        step_aware("a/reward-model")
    config = LlamaConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(TypeError, match=r"got LlamaForSequenceClassification\. Wrap a reward model in a function"):
        step_aware(LlamaForSequenceClassification(config))


# ---------------------------------------------------------------- alone it is the wrapped reward


class Judge:
    """A callable object with an attribute that is named like a method of the wrapper."""

    probed = None

    def __init__(self):
        self.advantages = "mine"

    def __call__(self, completions, **_):
        return [2.0] * len(completions)


def scaled(completions, factor, **_):
    """Length times a factor."""
    return [factor * len(text) for text in completions]


def test_it_looks_like_the_wrapped_function():
    assert step_aware(scaled).__name__ == "scaled" and step_aware(scaled).__doc__ == scaled.__doc__
    partial = step_aware(functools.partial(scaled, factor=3))
    assert partial.__name__ == "scaled"
    assert partial(prompts=["p"], completions=["aa"]) == [6]
    judge = step_aware(Judge())
    assert judge.__name__ == "Judge" and judge(prompts=["p"], completions=["a"]) == [2.0]
    assert judge.advantages(torch.ones(1), f64(1), 1).tolist() == [2.0]


def autoregressive_run(tmp_path, reward) -> tuple[GRPOTrainer, torch.Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=5,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            pad_token_id=TAIL,
            eos_token_id=TAIL,
            bos_token_id=None,
        )
    )
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=6,
        learning_rate=0.1,
        max_steps=1,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=7,
    )
    data = Dataset.from_dict({"prompt": PROMPTS, "bonus": [float(row) for row in range(len(PROMPTS))]})
    trainer = GRPOTrainer(model, reward, args, data, None, tiny_tokenizer())
    trainer.train()
    return trainer, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def count_words(prompts, completions, completion_ids, bonus, trainer_state, log_metric, **_) -> list[float | None]:
    log_metric("step", float(trainer_state.global_step))
    return [None if len(ids) == 1 else sum(ids) + b for ids, b in zip(completion_ids, bonus, strict=True)]


async def count_words_later(completion_ids, bonus, **_) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if len(ids) == 1 else sum(ids) + b for ids, b in zip(completion_ids, bonus, strict=True)]


@pytest.mark.slow
def test_a_plain_grpo_trainer_sees_the_wrapped_reward(tmp_path):
    plain, expected = autoregressive_run(tmp_path / "a", count_words)
    wrapped, got = autoregressive_run(tmp_path / "b", step_aware(count_words))
    later, got_later = autoregressive_run(tmp_path / "c", step_aware(count_words_later))
    assert torch.equal(got, expected) and torch.equal(got_later, expected)
    log, wrapped_log = plain.state.log_history[0], wrapped.state.log_history[0]
    assert wrapped_log["rewards/count_words/mean"] == log["rewards/count_words/mean"] and "step" in wrapped_log
    assert "rewards/count_words_later/mean" in later.state.log_history[0]
    assert not any(name.startswith("step_aware") for name in wrapped_log)
    assert log["reward_std"] > 0  # so there was something to learn


# ---------------------------------------------------------------- states


TOKENS = {".": TAIL, "|": END, "a": A, "b": B, "?": MASK}


def tokens(text: str) -> list[int]:
    return [TOKENS[sign] for sign in text]


def trajectory_of(*rows: tuple[str, list[int]]) -> Trajectory:
    """From completions such as `ab|.` and the steps that wrote them."""
    ids = torch.tensor([tokens(text) for text, _ in rows])
    steps = torch.tensor([steps for _, steps in rows], dtype=torch.int32)
    nothing = torch.zeros(ids.shape)
    forwards = torch.zeros(len(ids), dtype=torch.long)
    return Trajectory(ids, steps, nothing, nothing, None, 1.0, None, None, forwards, forwards.float(), 0, 0)


NO_END = ("abbaabab", [1, 0, 0, 1, 2, 3, 3, 2])
ENDS_LATE = ("abba|bab", [1, 0, 0, 1, 2, 3, 3, 2])
ENDS_FIRST = ("a|ba....", [0, 0, 1, 1, -1, -1, -1, -1])
ONE_STEP = ("|ba.....", [0, 0, 0, 0, -1, -1, -1, -1])


@pytest.mark.parametrize(
    ("kind", "block", "row", "points"),  # points at the fractions 0, 0.1, 0.5, 0.8, 1
    [
        ("block", 2, NO_END, [1, 1, 2, 3, 3]),  # four blocks, so three boundaries: 0, 0.4, 2, 3.2 and 4 of them
        ("block", 4, NO_END, [1, 1, 1, 1, 1]),
        ("block", 2, ENDS_LATE, [1, 1, 1, 2, 2]),  # five tokens: 0, 0.25, 1.25, 2, 2.5
        ("block", 4, ENDS_LATE, [1, 1, 1, 1, 1]),
        ("block", 4, ENDS_FIRST, [0, 0, 0, 0, 0]),  # no boundary before the end
        ("block", 2, ENDS_FIRST, [0, 0, 0, 0, 0]),
        ("keep", 4, NO_END, [1, 1, 2, 3, 3]),  # four steps: 0, 0.4, 2, 3.2, 4
        ("prefix", 4, ENDS_LATE, [1, 1, 2, 3, 3]),
        ("keep", 4, ENDS_FIRST, [1, 1, 1, 1, 1]),  # two steps
        ("keep", 4, ONE_STEP, [0, 0, 0, 0, 0]),
        ("prefix", 4, ONE_STEP, [0, 0, 0, 0, 0]),
    ],
)
def test_points_lie_between_the_empty_canvas_and_the_end(kind, block, row, points):
    fractions = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0])
    result = probe_points(trajectory_of(*[row] * 5), FAMILY, kind, block, fractions)
    assert result.tolist() == points and result.dtype == torch.long


@pytest.mark.parametrize(
    ("kind", "row", "point", "masks", "canvas", "length", "is_settled"),
    [
        ("keep", NO_END, 1, 64, "?bb?????", 8, False),
        ("keep", NO_END, 2, 64, "abba????", 8, False),
        ("keep", ENDS_LATE, 3, 64, "abba|??b", 8, True),  # what is masked lies behind the end
        ("keep", ENDS_FIRST, 1, 64, "a|??????", 8, True),
        ("keep", ("ba|b....", [1, 1, 0, 0, -1, -1, -1, -1]), 1, 64, "??|b????", 8, False),
        ("block", NO_END, 1, 64, "abba????", 8, False),
        ("block", NO_END, 1, 4, "abba????", 8, False),
        ("block", NO_END, 1, 3, "abba????", 7, False),
        ("block", ENDS_LATE, 1, 1, "abba????", 5, False),
        ("prefix", NO_END, 1, 3, "????????", 3, False),  # nothing is written without a gap
        ("prefix", NO_END, 3, 2, "abbaa???", 7, False),  # the last position was written, but behind a gap
        ("prefix", ENDS_LATE, 3, 2, "abba|???", 7, True),
        ("prefix", NO_END, 3, 64, "abbaa???", 8, False),
    ],
)
def test_states(kind, row, point, masks, canvas, length, is_settled):
    # beside another row, so that nothing is taken from the wrong one
    trajectory, points = trajectory_of(NO_END, row), torch.tensor([1, point])
    before = trajectory.completion_ids.clone()
    state = probe_state(trajectory, FAMILY, kind, 4, points, masks)
    assert state.canvas[1].tolist() == tokens(canvas)
    assert state.length[1] == length and state.length.shape == (2,)
    assert settled(state, FAMILY).tolist() == [False, is_settled]
    assert torch.equal(trajectory.completion_ids, before)


@pytest.mark.parametrize(
    ("canvas", "length", "is_settled"),
    [
        ("abab????", 4, True),  # no position is left
        ("abab????", 5, False),
        ("abababab", 8, True),
        ("ab?|????", 8, False),
        ("ab.?????", 8, True),
        ("????????", 8, False),
        ("|???????", 8, True),
    ],
)
def test_settled_states(canvas, length, is_settled):
    state = CanvasState(torch.tensor([tokens(canvas)]), torch.tensor([length]))
    assert settled(state, FAMILY).tolist() == [is_settled]


# ---------------------------------------------------------------- trainers: hand-computed cases


def scripted(*rewards):
    """A reward function that gives the six finished texts written-out rewards."""

    def reward(completions, **_):
        assert len(completions) == len(rewards)
        return list(rewards)

    return reward


SMALL_BATCH = [{"prompt": prompt} for prompt in ("a b", "b") for _ in range(3)]


def small_trainer(tmp_path, method, reward, words=(A, B), **settings):
    """Of 2 prompts × 3 completions of these words, which never end, on a canvas of two blocks of two steps."""
    small = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "num_generations": 3}
    defaults = small | {"scale_rewards": "none"}
    trainer = method.make(tmp_path, model=always(*words), reward=reward, **defaults | settings)
    trainer.model.train()
    return trainer


@dataclass
class Outcome:
    """What a rollout batch of two prompts led to."""

    advantages: list[float]
    probed: list[int]  # rows, each as often as it was continued
    metrics: dict[str, list[float]]
    column: list[float | None]
    rows: dict[str, torch.Tensor]


def outcome(tmp_path, monkeypatch, rewards, continuations, method=DIFFU, **settings) -> Outcome:
    """2 prompts × 3 completions with written-out rewards; `continuations` are the successes of each probed row."""
    asked = []

    def judged(self, rows, canvases):
        asked.extend(rows.tolist())
        counter = dict.fromkeys(rows.tolist(), 0)
        values = []
        for row in rows.tolist():
            values.append(continuations[row][counter[row]])
            counter[row] += 1
        return f64(*values)

    monkeypatch.setattr(_Continuations, "_judge", judged)
    trainer = small_trainer(tmp_path, method, step_aware(scripted(*rewards), **settings))
    rows = trainer._generate_and_score_completions(SMALL_BATCH)
    return Outcome(
        rows["advantages"].tolist(),
        asked,
        dict(trainer._metrics["train"]),
        list(trainer._logs["extra"]["process_reward"]),
        rows,
    )


CASES = {
    # rewards, successes of the continuations by row, advantages, other settings
    "one group": (
        [1, 0, 1, 0, 0, 0],
        # row 0: 3/3 − 2/3, row 2: 1/3 − 2/3
        {0: [1, 1, 1], 2: [0, 0, 1]},
        [1 / 3 + 1 / 3, -2 / 3, 1 / 3 - 1 / 3, 0, 0, 0],
        {},
    ),
    "all right and all wrong: nothing changes": ([1, 1, 1, 0, 0, 0], {}, [0] * 6, {}),
    "well-formatted wrong answer in a failing group": (
        [0.2, 0, 0, 1, 0.2, 0],
        {3: [1, 0, 1]},  # 2/3 − 1/3
        [0.4 / 3, -0.2 / 3, -0.2 / 3, 0.6 + 1 / 3, -0.2, -0.4],
        {},
    ),
    "None is not probed and leaves the rate": (
        [1, None, 0, None, 1, 1],
        {0: [1, 1, 0]},  # 2/3 − 1/2; the second group ties
        [0.5 + 1 / 6, 0, -0.5, 0, 0, 0],
        {},
    ),
    "an unknown continuation is left out": (
        [1, 0, 1, 0, 0, 0],
        {0: [1, None, 0], 2: [None, None, None]},  # 1/2 − 2/3; nothing is known of row 2
        [1 / 3 - 1 / 6, -2 / 3, 1 / 3, 0, 0, 0],
        {},
    ),
    "leave one out": (
        [1, 0, 1, 1, 0, 0],
        {0: [1, 1, 1], 2: [0, 0, 1], 3: [1, 1, 0]},  # 1 − 1/2, 1/3 − 1/2, 2/3 − 0
        [1 / 3 + 1 / 2, -2 / 3, 1 / 3 - 1 / 6, 2 / 3 + 2 / 3, -1 / 3, -1 / 3],
        {"leave_one_out": True},
    ),
    "weight and clamp": (
        [1, 0, 1, 1, 0, 0],
        {0: [1, 1, 1], 2: [0, 0, 0], 3: [1, 1, 0]},  # 1/3, −2/3 → −0.5, 1/3
        [1 / 3 + 2 * 0.25, -2 / 3, 1 / 3 - 2 * 0.5, 2 / 3 + 2 * 0.25, -1 / 3, -1 / 3],
        {"weight": 2.0, "clamp": (-0.5, 0.25)},
    ),
    "gate: advantage alone": (
        [0.2, 0, 0, 1, 0.2, 0],
        {0: [0, 1, 0], 3: [1, 0, 1]},  # 1/3 − 0, 2/3 − 1/3
        [0.4 / 3 + 1 / 3, -0.2 / 3, -0.2 / 3, 0.6 + 1 / 3, -0.2, -0.4],
        {"gate": "advantage"},
    ),
    "no state before the only boundary: the group rate stands in": (
        [1, 0, 1, 0, 0, 0],
        {0: [1, 1, 1], 2: [0, 0, 1]},
        [1 / 3 + 1 / 3, -2 / 3, 1 / 3 - 1 / 3, 0, 0, 0],
        {"baseline": "earlier_state"},
    ),
    "mean-normalised probes all": (
        [1, 0, 1, 0, 0, 0],
        # rates 1, 1/3, 2/3 and 0, 0, 1/3; what they are compared with cancels
        {0: [1, 1, 1], 1: [0, 0, 1], 2: [1, 0, 1], 3: [0, 0, 0], 4: [0, 0, 0], 5: [0, 1, 0]},
        [1 / 3 + 1 / 3, -2 / 3 - 1 / 3, 1 / 3, -1 / 9, -1 / 9, 2 / 9],
        {"form": "mean_normalised"},
    ),
    "mean-normalised without the unknown": (
        [1, None, 0, 0, 0, 0],
        {0: [1, 1, 1], 2: [0, 1, 0], 3: [0, 0, 0], 4: [0, 0, 0], 5: [0, 0, 0]},
        [0.5 + 1 / 3, 0, -0.5 - 1 / 3, 0, 0, 0],
        {"form": "mean_normalised"},
    ),
    "success by a function": (
        [1, 0, 1, 5, 0, 0],
        {2: [1, 1, 0]},  # only rows 1 and 2 succeed, and row 1 has no positive advantage: 2/3 − 2/3
        [1 / 3, -2 / 3, 1 / 3, 10 / 3, -5 / 3, -5 / 3],
        {"success": lambda completions, **_: [False, True, True, False, False, False]},
    ),
}


@pytest.mark.parametrize("method", [DIFFU, TRAJECTORY], ids=lambda method: method.name)
@pytest.mark.parametrize("case", CASES)
def test_written_out_cases(case, method, tmp_path, monkeypatch):
    rewards, continuations, expected, settings = CASES[case]
    result = outcome(tmp_path, monkeypatch, rewards, continuations, method, **settings)
    assert result.probed == [row for row in continuations for _ in range(3)]
    assert result.advantages == pytest.approx(expected, abs=1e-6)
    assert result.metrics["step_aware/continuations"] == [3 * len(continuations)]


# Rewards (1, 0, 1), process rewards 1/3 and −1/3 of the first and the third, and rewards (0, 0, 0).
JOINED: dict[str, list[float]] = {
    # 1 − 1/2, 0 − 1, 1 − 1/2
    "espo": [1 / 2 + 1 / 3, -1, 1 / 2 - 1 / 3, 0, 0, 0],
    "coupled_grpo": [1 / 2 + 1 / 3, -1, 1 / 2 - 1 / 3, 0, 0, 0],
    # deviations of ⅓ and −⅔ from a standard deviation of √2 / 3
    "tracerl": [0.707107 + 1 / 3, -1.414214, 0.707107 - 1 / 3, 0, 0, 0],
    # times n over its mean
    "spg": [1 / 3 + 1 / 3, -2 / 3, 1 / 3 - 1 / 3, 0, 0, 0],
    # A = (⅔, −⅔, 0): softmax (0.562742, 0.148337, 0.288921) less that of (−⅔, ⅔, 0), times 3
    "wd1": [1.243215, -1.243215, 0, 0, 0, 0],
    # less 1/3, times 3
    "dmpo": [0.688226, -0.554989, -0.133237, 0, 0, 0],
}


@pytest.mark.parametrize("name", JOINED)
def test_the_process_reward_joins_the_methods_own_advantage_and_precedes_its_weights(name, tmp_path, monkeypatch):
    result = outcome(tmp_path, monkeypatch, [1, 0, 1, 0, 0, 0], {0: [1, 1, 1], 2: [0, 0, 1]}, BY_NAME[name])
    assert result.rows["advantages"].tolist() == pytest.approx(JOINED[name], abs=1e-5)


def test_an_earlier_state_as_the_baseline(tmp_path, monkeypatch):
    """Rows 0 and 2 succeed; their states are those before steps 2 and 1."""
    asked = []
    successes = {True: [1, 1, 1, 0, 1, 1], False: [0, 1, 0, 1, 1, 1]}  # continued from a later or an earlier state

    def judged(self, rows, canvases):
        asked.append(rows.tolist())
        return f64(*successes[len(asked) == 1])

    monkeypatch.setattr(_Continuations, "_judge", judged)
    monkeypatch.setattr(_Continuations, "_fractions", lambda self: torch.tensor([[0.8, 0.5]] * 6))  # 0.74 · 4; 0.5 · 2
    reward = step_aware(scripted(1, 0, 1, 0, 0, 0), state="keep", baseline="earlier_state")
    trainer = small_trainer(tmp_path, DIFFU, reward)
    calls = recorded_continuations(monkeypatch)
    rows = trainer._generate_and_score_completions(SMALL_BATCH)
    assert asked == [[0, 0, 0, 2, 2, 2]] * 2
    # row 0: 3/3 − 1/3, row 2: 2/3 − 3/3
    assert rows["advantages"].tolist() == pytest.approx([1 / 3 + 2 / 3, -2 / 3, 1 / 3 - 1 / 3, 0, 0, 0], abs=1e-6)
    masked = [(call["state"].canvas == MASK).sum(1).tolist() for call in calls]
    assert masked == [[4] * 6, [6] * 6]  # before step 2, and before step 1: two tokens each


def test_texts_that_no_continuation_changes_have_their_own_success_for_nothing(tmp_path, monkeypatch):
    """Every text is its first token, an end; a state that has it keeps it, and other states are continued."""
    monkeypatch.setattr(_Continuations, "_judge", lambda self, rows, canvases: f64(*[0] * len(rows)))
    success = [1, 0, 1, 0, 1, 0]
    reward = step_aware(scripted(*success), state="keep", form="mean_normalised")
    trainer = small_trainer(tmp_path, DIFFU, reward, words=(END,), unmasking="random")
    calls = recorded_continuations(monkeypatch)
    trainer._generate_and_score_completions(SMALL_BATCH)
    written_first = (trainer.last_rollout[0].unmask_step[:, 0] == 0).tolist()
    assert 0 < sum(written_first) < 6
    rate = [2 / 3] * 3 + [1 / 3] * 3
    expected = [(s if known else 0) - r for s, known, r in zip(success, written_first, rate, strict=True)]
    assert list(trainer._logs["extra"]["process_reward"]) == pytest.approx(expected)
    assert {s for s, known in zip(success, written_first, strict=True) if known} == {0, 1}
    assert sum(len(call["prompts"]) for call in calls) == 3 * (6 - sum(written_first))
    # one step of the block is left, on the whole canvas
    assert trainer._metrics["train"]["step_aware/forward_units"] == [3 * (6 - sum(written_first))]


@pytest.mark.parametrize("group", [[0.9] * 3, [None, 0.9, 0.9, 0.9]], ids=["three", "three of four"])
@pytest.mark.parametrize("scale_rewards", ["none", "group"])
def test_equal_rewards_whose_mean_is_off_in_the_last_bit_change_nothing(scale_rewards, group, tmp_path, monkeypatch):
    equal = torch.full((3,), 0.9)
    assert (equal - equal.mean() > 0).all()  # in float32 the mean of three times 0.9 is less than 0.9
    reward, size = step_aware(scripted(*group * 2), success_threshold=0.9), len(group)
    sizes = {"num_generations": size, "per_device_train_batch_size": 2 * size}
    trainer = small_trainer(tmp_path, DIFFU, reward, scale_rewards=scale_rewards, **sizes)
    calls = recorded_continuations(monkeypatch)
    rows = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in ("a b", "b") for _ in group])
    assert trainer._metrics["train"]["step_aware/success_rate"] == [1.0]  # 0.9 reaches a threshold of 0.9
    assert rows["advantages"].abs().max() < 1e-2 and calls == []


def test_the_weighted_sum_of_all_rewards_decides_what_is_an_advantage(tmp_path, monkeypatch):
    """Row 0 succeeds, but the other reward function puts it below its group's mean; success is the wrapped one's."""
    asked = []

    def judged(self, rows, canvases):
        asked.extend(rows.tolist())
        return torch.ones(len(rows), dtype=torch.float64)

    monkeypatch.setattr(_Continuations, "_judge", judged)
    rewards = [scripted(-2, 0, 0, 1, 0, 0), step_aware(scripted(1, 0, 1, 1, 0, 0), num_rollouts=2)]
    trainer = small_trainer(tmp_path, DIFFU, rewards, reward_weights=[0.5, 1.0])
    rows = trainer._generate_and_score_completions(SMALL_BATCH)
    assert asked == [2, 2, 3, 3]
    # weighted rewards 0, 0, 1 and 1.5, 0, 0
    expected = [-1 / 3, -1 / 3, 2 / 3 + 1 / 3, 1 + 2 / 3, -0.5, -0.5]
    assert rows["advantages"].tolist() == pytest.approx(expected, abs=1e-6)


def test_metrics_and_the_column_of_the_completions_table(tmp_path, monkeypatch):
    rewards, continuations, _, settings = CASES["mean-normalised probes all"]
    result = outcome(tmp_path, monkeypatch, rewards, continuations, **settings)
    # R = rate − group rate: 1 − 2/3, 1/3 − 2/3, 2/3 − 2/3, 0, 0, 1/3
    process_rewards = [1 / 3, -1 / 3, 0, 0, 0, 1 / 3]
    assert result.column == pytest.approx(process_rewards)
    metrics = {name: values for name, values in result.metrics.items() if name.startswith("step_aware/")}
    mean = sum(process_rewards) / 6
    variance = sum((value - mean) ** 2 for value in process_rewards) / 6
    successes = [1, 0, 1, 0, 0, 0]
    covariance = sum((value - mean) * (s - 1 / 3) for value, s in zip(process_rewards, successes, strict=True)) / 6
    assert metrics.pop("step_aware/seconds")[0] > 0
    assert metrics == {
        "step_aware/probed_share": [1.0],
        "step_aware/success_rate": pytest.approx([1 / 3]),
        "step_aware/continuations": [18],
        "step_aware/sync_forwards": [0],
        # every continuation writes the second block, in two steps, on the whole canvas
        "step_aware/forward_units": [36],
        "step_aware/process_reward_mean": pytest.approx([mean]),
        "step_aware/process_reward_std": pytest.approx([variance**0.5]),
        "step_aware/success_correlation": pytest.approx([covariance / (variance * 2 / 9) ** 0.5]),
    }


def test_metrics_where_only_successes_are_probed(tmp_path, monkeypatch):
    rewards, continuations, _, settings = CASES["None is not probed and leaves the rate"]
    result = outcome(tmp_path, monkeypatch, rewards, continuations, **settings)
    assert result.column[1:] == [None] * 5 and result.column[0] == pytest.approx(1 / 6)
    metrics = result.metrics
    assert metrics["step_aware/probed_share"] == pytest.approx([1 / 6])
    assert metrics["step_aware/success_rate"] == pytest.approx([3 / 4])
    assert "step_aware/success_correlation" not in metrics  # success does not vary among the probed
    nothing = outcome(tmp_path, monkeypatch, [0] * 6, {})
    assert nothing.metrics["step_aware/probed_share"] == [0] and nothing.metrics["step_aware/forward_units"] == [0]
    assert "step_aware/process_reward_mean" not in nothing.metrics


# ---------------------------------------------------------------- trainers: against a reference


def recorded_continuations(monkeypatch) -> list[dict]:
    """The arguments and result of every batch of continuations."""
    calls = []

    def spy(model, input_ids, attention_mask, config, generators, any_process=None, state=None, bounds=None):
        drawn = sample(model, input_ids, attention_mask, config, generators, any_process, state, bounds=bounds)
        if state is not None:  # a rollout starts from all masks
            calls.append({"prompts": input_ids, "config": config, "state": state, "drawn": drawn})
        return drawn

    monkeypatch.setattr(rollouts_module, "sample", spy)
    return calls


def words_wanted(prompts, completions, completion_ids, wanted=None, **_) -> list[float]:
    """How many more `a` than wanted, with small terms for everything that a reward function is told."""
    return [
        text.split().count("a") - number + 0.01 * len(ids) + 0.001 * len(prompt)
        for prompt, text, ids, number in zip(prompts, completions, completion_ids, wanted, strict=True)
    ]


BATCH = [{"prompt": prompt, "wanted": wanted} for prompt, wanted in zip(PROMPTS, [2, 1, 3, 2] * 2, strict=True)]


def batch(groups: slice = slice(4)) -> list[dict]:
    return [example for example in BATCH[groups] for _ in range(4)]


def before_end(ids: list[int]) -> list[int]:
    """Up to and including the first token that ends a text."""
    end = min((i for i, token in enumerate(ids) if token in (TAIL, END)), default=len(ids) - 1)
    return ids[: end + 1]


@dataclass
class Reference:
    """Process rewards of a rollout batch, each continuation drawn alone, without any padding."""

    trainer: object
    settings: StepAwareReward
    batch: list[dict]
    rollout: int = 0
    units: float = 0.0
    continuations: int = 0
    compared_with_earlier: int = 0
    process_rewards: list[float] = field(default_factory=list)

    def __post_init__(self):
        trajectory, _ = self.trainer.last_rollout
        self.ids, self.steps = trajectory.completion_ids.tolist(), trajectory.unmask_step.tolist()
        self.rewards = [self.reward(row, ids) for row, ids in enumerate(self.ids)]
        self.plain = []
        for start in range(0, len(self.rewards), 4):
            group = torch.tensor(self.rewards[start : start + 4])
            scale = group.std() + 1e-4 if self.trainer.args.scale_rewards == "group" else 1.0
            self.plain += ((group - group.mean()) / scale).tolist()
        self.success = [reward >= self.settings.success_threshold for reward in self.rewards]
        self.process_rewards = [self.process_reward(row) for row in range(len(self.ids))]

    def reward(self, row: int, canvas: list[int]) -> float:
        ids = before_end(canvas)
        text = " ".join("ab"[token - A] for token in ids if token in (A, B))
        return words_wanted([self.batch[row]["prompt"]], [text], [ids], [self.batch[row]["wanted"]])[0]

    def probed(self, row: int) -> bool:
        if self.settings.form == "mean_normalised":
            return True
        return self.plain[row] > 0 and (self.success[row] or self.settings.gate == "advantage")

    def process_reward(self, row: int) -> float | None:
        if not self.probed(row):
            return None
        shared = row // 4 if self.settings.state_shared_by == "group" else row
        (stream,) = row_generators(self.trainer.args.seed, Purpose.PROBE_STATE, self.rollout, rows=[shared])
        first, second = stream.random(2)
        point = self.point(row, 0.1 + 0.8 * first)
        if point == 0:
            return None
        others = [s for other, s in enumerate(self.success) if other // 4 == row // 4]
        if self.settings.leave_one_out:
            others.remove(self.success[row])
        baseline = sum(others) / len(others)
        reached = self.rate(row, point, which=0)
        earlier = math.floor(second * point)
        if self.settings.baseline == "earlier_state" and earlier > 0:
            baseline = self.rate(row, earlier, which=1)
            self.compared_with_earlier += 1
        return reached - baseline

    def point(self, row: int, fraction: float) -> int:
        if self.settings.state == "block":
            length, block = len(before_end(self.ids[row])), self.trainer.args.block_length
            nearest, most = round(fraction * length / block), math.ceil(length / block) - 1
        else:
            steps = max(self.steps[row]) + 1
            nearest, most = math.floor(fraction * steps), steps - 1
        return min(max(nearest, 1), most)

    def state(self, row: int, point: int) -> tuple[list[int], int]:
        ids, length = self.ids[row], self.trainer.args.max_completion_length
        written = [0 <= step < point for step in self.steps[row]]
        if self.settings.state == "keep":
            return [token if w else MASK for token, w in zip(ids, written, strict=True)], length
        known = point * self.trainer.args.block_length if self.settings.state == "block" else [*written, 0].index(0)
        return ids[:known] + [MASK] * (length - known), min(known + self.settings.num_mask_tokens, length)

    def rate(self, row: int, point: int, which: int) -> float:
        canvas, length = self.state(row, point)
        if MASK not in before_end(canvas[:length]):
            return float(self.success[row])
        args, successes = self.trainer.args, 0
        prompt = tokens(self.batch[row]["prompt"].replace(" ", ""))
        config = SamplingConfig(
            args.max_completion_length,
            args.denoising_steps,
            args.block_length,
            args.temperature,
            args.top_k,
            args.top_p,
            args.unmasking,
        )
        for repeat in range(self.settings.num_rollouts):
            stream = row_generators(
                args.seed, Purpose.PROBE_ROLLOUT, self.rollout, which, rows=[row * self.settings.num_rollouts + repeat]
            )
            state = CanvasState(torch.tensor([canvas]), torch.tensor([length]))
            drawn = sample(self.trainer.model, torch.tensor([prompt]), None, config, stream, state=state)
            successes += self.reward(row, drawn.completion_ids[0].tolist()) >= self.settings.success_threshold
            share = (len(prompt) + length) / (len(prompt) + args.max_completion_length)
            self.units += drawn.row_forwards.item() * share
            self.continuations += 1
        return successes / self.settings.num_rollouts

    def advantages(self) -> list[float]:
        rewards = [NAN if reward is None else reward for reward in self.process_rewards]
        if self.settings.clamp is not None:
            low, high = self.settings.clamp
            rewards = [min(max(reward, low), high) for reward in rewards]
        if self.settings.form == "mean_normalised":
            for start in range(0, len(rewards), 4):
                known = [reward for reward in rewards[start : start + 4] if reward == reward]
                mean = sum(known) / max(len(known), 1)
                rewards[start : start + 4] = [reward - mean for reward in rewards[start : start + 4]]
        added = [0.0 if reward != reward else self.settings.weight * reward for reward in rewards]
        return [plain + more for plain, more in zip(self.plain, added, strict=True)]


LONGER = {"max_completion_length": 16, "denoising_steps": 8}


def probing_trainer(tmp_path, method=DIFFU, reward=words_wanted, model=None, **settings):
    """Canvases of four blocks of two steps; a network half of whose blocks hold the end of a text."""
    settings = {"success_threshold": 0.0} | settings
    trainer = method.make(tmp_path, model=model, reward=StepAwareReward(reward, **settings), **LONGER)
    trainer.model.train()
    return trainer


REFERENCE_CASES = {
    "block": (DIFFU, {}),
    "block, fewer masks": (DIFFU, {"num_mask_tokens": 4, "gate": "advantage"}),
    "block, cut off": (DIFFU, {"num_mask_tokens": 3, "form": "mean_normalised"}),
    "keep": (DIFFU, {"state": "keep"}),
    "prefix": (DIFFU, {"state": "prefix", "num_mask_tokens": 5}),
    "trajectory": (TRAJECTORY, {"num_mask_tokens": 4}),
    "trajectory, keep, by completion": (TRAJECTORY, {"state": "keep", "state_shared_by": "completion"}),
    "earlier state": (DIFFU, {"state": "keep", "baseline": "earlier_state", "state_shared_by": "completion"}),
    "earlier state, block": (
        TRAJECTORY,
        {"baseline": "earlier_state", "success_threshold": 13.0, "form": "mean_normalised", "num_mask_tokens": 6},
    ),
    "many settings": (
        DIFFU,
        {"leave_one_out": True, "clamp": (-0.4, 0.6), "weight": 0.5, "num_rollouts": 5, "gate": "advantage"},
    ),
}


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_advantages_equal_those_of_continuations_drawn_alone(case, tmp_path, monkeypatch):
    method, settings = REFERENCE_CASES[case]
    model = always(A, B) if case == "earlier state, block" else None  # others seldom write a third block
    trainer = probing_trainer(tmp_path, method, model=model, **settings)
    calls = recorded_continuations(monkeypatch)
    trainer._rollouts["train"] = 5
    rows = trainer._generate_and_score_completions(batch())
    reference = Reference(trainer, trainer._probe.settings, batch(), rollout=5)
    column = list(trainer._logs["extra"]["process_reward"])
    assert [value is None for value in column] == [value is None for value in reference.process_rewards]
    known = [value for value in reference.process_rewards if value is not None]
    assert [value for value in column if value is not None] == pytest.approx(known)
    assert rows["advantages"].tolist() == pytest.approx(reference.advantages(), abs=2e-5)
    assert len({round(value, 4) for value in known}) > 1  # it was worth computing
    assert max(abs(x - y) for x, y in zip(reference.advantages(), reference.plain, strict=True)) > 0.05
    # and it cost what the continuations cost alone
    metrics = trainer._metrics["train"]
    assert sum(len(call["prompts"]) for call in calls) == reference.continuations
    assert metrics["step_aware/continuations"] == [reference.continuations]
    assert metrics["step_aware/forward_units"] == pytest.approx([reference.units])
    whole = sum(call["drawn"].row_forwards.sum().item() for call in calls)
    short = any((call["state"].length < 16).any() for call in calls)
    assert short == (trainer._probe.settings.num_mask_tokens < 8)
    assert reference.units < whole if short else reference.units == whole
    assert (reference.compared_with_earlier > 0) == ("earlier" in case)
    assert not any(call["config"].record_signals for call in calls)


def test_the_state_is_shared_by_the_group_or_not(tmp_path, monkeypatch):
    """Where texts never end, the boundary shows the fraction: eight blocks, one continuation of each completion."""

    def boundaries(shared_by: str) -> list[list[int]]:
        calls = recorded_continuations(monkeypatch)
        trainer = DIFFU.make(
            tmp_path,
            model=always(A, B),
            reward=step_aware(form="mean_normalised", num_rollouts=1, state_shared_by=shared_by),
            max_completion_length=32,
            denoising_steps=8,
        )
        trainer.model.train()
        trainer._generate_and_score_completions(batch())
        written = torch.cat([call["state"].canvas for call in calls]).ne(MASK).sum(1)
        assert (written % 4 == 0).all()
        return (written // 4).view(4, 4).tolist()

    by_group, by_completion = boundaries("group"), boundaries("completion")
    assert all(len(set(group)) == 1 for group in by_group) and len({group[0] for group in by_group}) > 1
    assert any(len(set(group)) > 1 for group in by_completion)
    assert all(1 <= point <= 7 for group in by_group + by_completion for point in group)


def test_forward_units_are_those_of_the_rollout_and_the_continuations(tmp_path):
    trainer = probing_trainer(tmp_path, TRAJECTORY, num_mask_tokens=4)
    trainer._generate_and_score_completions(batch())
    reference = Reference(trainer, trainer._probe.settings, batch())
    rollout = trainer.last_rollout[0].row_forwards.sum().item()
    assert reference.units > 5
    assert trainer.forward_units == pytest.approx(rollout + reference.units)
    assert trainer._metrics["train"]["forward_units"] == pytest.approx([trainer.forward_units])


def test_a_process_with_half_of_the_prompts_gets_half_of_the_advantages(tmp_path, monkeypatch):
    settings = {"num_mask_tokens": 4, "state_shared_by": "completion"}
    trainer = probing_trainer(tmp_path, **settings)
    whole = trainer._generate_and_score_completions(batch())["advantages"]
    parts = []
    for first in (0, 2):
        part = probing_trainer(tmp_path, **settings)
        monkeypatch.setattr(part, "_global_rows", lambda count, first=first: torch.arange(count) + 4 * first)
        parts.append(part._generate_and_score_completions(batch(slice(first, first + 2)))["advantages"])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    # negative control: the second half with the noise of the first
    other = probing_trainer(tmp_path, **settings)._generate_and_score_completions(batch(slice(2, 4)))["advantages"]
    assert (other - whole[8:]).abs().max() > 0.05


# ---------------------------------------------------------------- trainers: what stays as it was


@pytest.mark.slow
def test_nothing_changes_where_no_completion_succeeds(tmp_path, monkeypatch):
    def parameters(reward) -> tuple[torch.Tensor, object]:
        trainer = TRAJECTORY.make(tmp_path, reward=reward, logging_steps=1)
        trainer.train()
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]), trainer

    calls = recorded_continuations(monkeypatch)
    expected, plain = parameters(text_reward)
    got, never = parameters(step_aware(text_reward, success_threshold=1e9, state="keep"))
    assert calls == [] and torch.equal(got, expected)
    assert never.forward_units == plain.forward_units
    assert never.state.log_history[0]["step_aware/continuations"] == 0
    # negative control
    other, sometimes = parameters(step_aware(text_reward, success_threshold=2.0, state="keep"))
    assert len(calls) > 0 and not torch.equal(other, expected)
    assert sometimes.forward_units > plain.forward_units
    log = sometimes.state.log_history[0]
    assert sometimes.forward_units == pytest.approx(plain.forward_units + log["step_aware/forward_units"])
    assert "rewards/text_reward/mean" in log


def test_evaluation_continues_nothing(tmp_path, monkeypatch):
    calls = recorded_continuations(monkeypatch)
    trainer = DIFFU.make(
        tmp_path, reward=step_aware(text_reward, success_threshold=2.0, state="keep"), per_device_eval_batch_size=8
    )
    trainer.eval_dataset = Dataset.from_dict({"prompt": PROMPTS[:4]})
    plain = DIFFU.make(tmp_path, reward=text_reward, per_device_eval_batch_size=8)
    plain.eval_dataset = trainer.eval_dataset
    result, expected = trainer.evaluate(), plain.evaluate()
    assert calls == [] and trainer.forward_units == 0
    assert result["eval_reward"] == expected["eval_reward"] and result["eval_loss"] == expected["eval_loss"]
    assert not any("step_aware" in name for name in result)


@pytest.mark.slow
def test_the_completions_table_has_the_process_rewards(tmp_path, monkeypatch):
    trainer = DIFFU.make(
        tmp_path,
        reward=step_aware(text_reward, success_threshold=2.0, state="keep"),
        per_device_eval_batch_size=8,
        max_steps=2,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=0,
    )
    trainer.eval_dataset = Dataset.from_dict({"prompt": PROMPTS[:2]})
    seen, measure = [], StepAwareProbe.measure

    def spy(self, rollout, advantages, *others):
        probed = measure(self, rollout, advantages, *others)
        seen.append((probed.advantages - advantages).tolist())
        return probed

    monkeypatch.setattr(StepAwareProbe, "measure", spy)
    trainer.train()
    for step in (1, 2):
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert table["process_reward"].fillna(0).tolist() == pytest.approx(seen[step - 1], abs=1e-6)
        assert 0 < table["process_reward"].notna().sum() < 16
        succeeded = (table["text_reward"] >= 2) & (table["advantage"] > 0)
        assert succeeded[table["process_reward"].notna()].all()
    # Completions of an evaluation push those of training out of the table, row by row.
    trainer.evaluate()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert len(table) == 16 and table["process_reward"].iloc[8:].isna().all()
    assert table["process_reward"].iloc[:8].fillna(0).tolist() == pytest.approx(seen[1][8:], abs=1e-6)


def test_what_a_reward_function_logs_is_about_the_finished_texts(tmp_path):
    called = []

    def logging_reward(completions, completion_ids, log_extra, log_metric, trainer_state, **_):
        assert trainer_state.global_step == 0
        called.append(len(completions))
        log_extra("length", [len(ids) for ids in completion_ids])
        log_metric("longest", max(map(len, completion_ids)))
        return text_reward(completions, completion_ids)

    trainer = probing_trainer(tmp_path, reward=logging_reward, success_threshold=2.0)
    trainer._generate_and_score_completions(batch())
    assert called[0] == 16 and len(called) > 1
    lengths = [len(ids) for ids in trainer.last_rollout[1].completion_ids]
    assert list(trainer._logs["extra"]["length"]) == lengths
    assert trainer._metrics["train"]["longest"] == [max(lengths)]
    # and nothing waits to be logged with the next rollout
    assert not any(trainer._pending_extra_logs.values()) and not any(trainer._pending_metrics.values())


def test_conversations(tmp_path, monkeypatch):
    """The same texts as messages: rewards and continuations see messages, and the advantages are the same."""
    roles = set()

    def of_messages(prompts, completions, wanted, **kwargs):
        roles.update(
            (prompt[-1]["role"], completion[0]["role"])
            for prompt, completion in zip(prompts, completions, strict=True)
        )
        texts = [completion[0]["content"] for completion in completions]
        return words_wanted([prompt[-1]["content"] for prompt in prompts], texts, wanted=wanted, **kwargs)

    plain = probing_trainer(tmp_path)
    expected = plain._generate_and_score_completions(batch())
    trainer = probing_trainer(tmp_path, reward=lambda wanted=None, **kwargs: of_messages(wanted=wanted, **kwargs))
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in batch()]
    rows = trainer._generate_and_score_completions(chats)
    assert torch.equal(rows["completion_ids"], expected["completion_ids"])
    assert trainer._metrics["train"]["step_aware/continuations"][0] > 0
    torch.testing.assert_close(rows["advantages"], expected["advantages"])
    assert roles == {("user", "assistant")}


def test_asynchronous_rewards_in_training(tmp_path):
    async def later(**kwargs):
        await asyncio.sleep(0)
        return words_wanted(**kwargs)

    async def right(**kwargs):
        await asyncio.sleep(0)
        return [reward >= 0 for reward in words_wanted(**kwargs)]

    plain = probing_trainer(tmp_path)
    expected = plain._generate_and_score_completions(batch())["advantages"]
    trainer = probing_trainer(tmp_path, reward=later, success=right, success_threshold=None)
    assert torch.equal(trainer._generate_and_score_completions(batch())["advantages"], expected)
    assert trainer._metrics["train"]["step_aware/continuations"][0] > 0


# ---------------------------------------------------------------- sharded weights


def test_where_weights_are_sharded_a_process_keeps_step(tmp_path, monkeypatch):
    """This process, told that another one continues more completions, and for more blocks."""
    plain = probing_trainer(tmp_path, num_mask_tokens=4, num_rollouts=2)
    expected = plain._generate_and_score_completions(batch())["advantages"]
    own = plain._metrics["train"]["step_aware/continuations"][0]
    assert 0 < own < 32

    trainer = probing_trainer(tmp_path, num_mask_tokens=4, num_rollouts=2)
    calls = recorded_continuations(monkeypatch)
    gather = trainer.accelerator.gather

    blocks = Counter()

    def any_process(self, here: bool) -> bool:
        sampling = trainer.last_rollout is None, len(calls)
        blocks[sampling] += 1
        return here or blocks[sampling] <= 3

    def gather_with_another(values):
        if isinstance(values, torch.Tensor) and values.shape == (1,) and values.dtype == torch.long:
            return torch.cat([values, torch.tensor([40])])
        return gather(values)

    engine = trainer._engine
    monkeypatch.setattr(trainer, "_engine", lambda: replace(engine(), sharded=True))
    monkeypatch.setattr(rollouts_module.RolloutEngine, "_any_process", any_process)
    monkeypatch.setattr(trainer.accelerator, "gather", gather_with_another)
    rows = trainer._generate_and_score_completions(batch())
    assert torch.equal(rows["advantages"], expected)
    # 40 continuations are three batches of 16, of which this process fills two at most
    assert len(calls) == 3 and len(calls[2]["prompts"]) == 1
    forwards = [call["drawn"].forwards for call in calls]
    assert forwards == [6, 6, 6]
    assert calls[2]["drawn"].sync_forwards == 6 and calls[2]["drawn"].row_forwards.tolist() == [0]
    metrics, before = trainer._metrics["train"], plain._metrics["train"]
    assert metrics["step_aware/sync_forwards"] == [sum(call["drawn"].sync_forwards for call in calls)]
    assert before["step_aware/sync_forwards"] == [0]
    for name in ("step_aware/forward_units", "step_aware/continuations", "step_aware/process_reward_mean"):
        assert metrics[name] == before[name]


# ---------------------------------------------------------------- refusals of the trainer


def test_two_step_aware_rewards_are_refused(tmp_path):
    message = "2 of the reward functions are StepAwareReward.*Wrap one function and pass the others as they are"
    with pytest.raises(ValueError, match=message):
        DIFFU.make(tmp_path, reward=[step_aware(text_reward), ones, step_aware(ones)])
    trainer = DIFFU.make(tmp_path, reward=[ones, step_aware(text_reward)])
    assert isinstance(trainer._probe, StepAwareProbe) and trainer._probe.index == 1
    assert DIFFU.make(tmp_path, reward=[ones, text_reward])._probe is None


def test_a_tokenizer_that_parses_completions_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.response_schema = {"type": "object"}
    with pytest.raises(ValueError, match=r"judges continuations as plain text\. Remove the tokenizer's response"):
        StepAwareProbe.of([step_aware(text_reward)], tokenizer)


def test_columns_of_the_wrapped_and_of_the_success_function_are_needed(tmp_path):
    def needs_answer(completions, answer, **_):
        return [0.0] * len(completions)

    def make(columns, reward):
        args = DiffuGRPOConfig(
            str(tmp_path), max_completion_length=8, denoising_steps=4, block_length=4, use_cpu=True, bf16=False,
            report_to=[], num_generations=4,
        )  # fmt: skip
        data = Dataset.from_dict({name: ["a", "b"] for name in columns})
        return DiffuGRPOTrainer(tiny_model(), reward, args, data, None, tiny_tokenizer())

    with pytest.raises(ValueError, match="no column 'answer', which the reward function needs_answer needs"):
        make(["prompt"], step_aware(needs_answer))
    with pytest.raises(ValueError, match="no column 'answer', which the reward function needs_answer needs"):
        make(["prompt"], [ones, step_aware(ones, success=needs_answer)])
    make(["prompt", "answer"], step_aware(needs_answer))
    make(["prompt", "answer"], step_aware(ones, success=needs_answer))
