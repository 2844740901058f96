"""Guards: each one triggered through the real training loop, with what happens to the parameters."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from launching import accelerate_launch, run
from methods import PROMPTS, method_named, text_reward
from tiny import MASK, tiny_model, tiny_tokenizer
from trainer_helpers import parameters_of, rollout_of
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.distribution import draw
from trl_diffusion.runtime.reward_guard import RewardError, RewardGuard, all_tied
from trl_diffusion.runtime.time_limit import TimeLimit
from trl_diffusion.trainers import AGRPOTrainer

pytestmark = pytest.mark.slow

AGRPO, SAPO = method_named("agrpo"), method_named("sapo")


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(trainer) -> torch.Tensor:
    """How far training moved the parameters."""
    before = parameters_of(trainer).clone()
    trainer.train()
    return parameters_of(trainer) - before


def failing(completions, **columns):
    raise KeyError("no such answer")


# ---------------------------------------------------------------- reward functions that raise


def test_a_reward_function_that_raises_stops_the_run_with_its_name(tmp_path):
    trainer = AGRPO.make(tmp_path, reward=failing)
    before = parameters_of(trainer).clone()
    with pytest.raises(RewardError, match=r"function failing failed on a batch of 16 completions.*KeyError") as error:
        trainer.train()
    assert isinstance(error.value.__cause__, KeyError)
    assert any(repr(prompt) in str(error.value) for prompt in PROMPTS) and "reward_error='none'" in str(error.value)
    assert torch.equal(parameters_of(trainer), before)


def test_without_its_rewards_the_run_goes_on(tmp_path, caplog):
    calls = []

    def flaky(completion_ids, **columns):
        calls.append(len(completion_ids))
        if len(calls) == 1:
            raise KeyError("no such answer")
        return [100.0 * len(ids) for ids in completion_ids]

    settings = dict(reward_error="none", max_steps=2, logging_steps=1)
    trainer = AGRPO.make(tmp_path, reward=[flaky, text_reward], **settings)
    change = trained(trainer)
    assert change.isfinite().all() and change.norm() > 1e-3
    assert calls == [16, 16] and logged(trainer, "guards/reward_errors") == [0.5, 0.0]  # of two calls per rollout
    first, second = logged(trainer, "rewards/flaky/mean")
    assert first is None and second >= 100
    told = [record.message for record in caplog.records if "flaky failed" in record.message]
    assert len(told) == 1 and "reward_error='none'" in told[0]

    # The first update was made by the other function alone.
    alone = AGRPO.make(tmp_path, reward=text_reward, **settings)
    alone.train()
    assert logged(trainer, "reward")[0] == pytest.approx(logged(alone, "reward")[0])
    assert logged(trainer, "grad_norm")[0] == pytest.approx(logged(alone, "grad_norm")[0])


def test_completions_without_any_reward_leave_the_parameters_alone(tmp_path):
    trainer = AGRPO.make(tmp_path, reward=failing, reward_error="none", logging_steps=1)
    assert not trained(trainer).any()
    assert logged(trainer, "guards/unscored_completions") == [1.0]
    silent = AGRPO.make(tmp_path, reward=lambda completions, **_: [None] * len(completions), logging_steps=1)
    assert not trained(silent).any()
    assert logged(silent, "guards/unscored_completions") == [1.0]


# ---------------------------------------------------------------- reward functions that hang


LONG = 600.0  # seconds that no test waits, nor a busy machine reaches
SHORT = 0.3  # for coroutines: what is ready at once is done before any limit is looked at


def time_is_up() -> None:
    """Let the alarm that was set for `LONG` go off now."""
    seconds, again = signal.getitimer(signal.ITIMER_REAL)
    assert LONG / 2 < seconds <= LONG
    signal.setitimer(signal.ITIMER_REAL, 0.01, again)


def sleeps(completions, **columns):
    time_is_up()
    time.sleep(60)


def loops(completions, **columns):
    time_is_up()
    while True:
        pass


def swallows(completions, **columns):
    time_is_up()
    while True:
        with suppress(Exception):
            time.sleep(0.01)


def catches_all(completions, **columns):
    time_is_up()
    try:
        time.sleep(60)
    except:  # noqa: E722
        return [1.0] * len(completions)


def always_catches_all(completions, **columns):
    time_is_up()
    for _ in range(3000):
        try:  # noqa: SIM105
            time.sleep(0.01)
        except:  # noqa: E722
            pass
    return [1.0] * len(completions)


def fails_when_interrupted(completions, **columns):
    time_is_up()
    try:
        time.sleep(60)
    except:  # noqa: E722
        raise KeyError("no connection") from None


async def awaits(completions, **columns):
    await asyncio.sleep(60)


async def awaits_and_catches_all(completions, **columns):
    with suppress(BaseException):
        await asyncio.sleep(60)
    return [1.0] * len(completions)


async def always_awaits_and_catches_all(completions, **columns):
    for _ in range(20):
        with suppress(BaseException):
            await asyncio.sleep(3)
    return [1.0] * len(completions)


async def ready_at_once(completion_ids, **columns):
    return text_reward(None, completion_ids)


HANGING = [sleeps, loops, swallows, catches_all, always_catches_all, fails_when_interrupted]
WAITING = [awaits, awaits_and_catches_all, always_awaits_and_catches_all]


@pytest.mark.parametrize("function", HANGING + WAITING, ids=lambda function: function.__name__)
@pytest.mark.parametrize("policy", ["raise", "none"])
def test_a_reward_function_that_hangs_is_stopped(function, policy, tmp_path):
    handler = signal.getsignal(signal.SIGALRM)
    limit, other = (LONG, text_reward) if function in HANGING else (SHORT, ready_at_once)
    settings = dict(reward_timeout=limit, reward_error=policy, logging_steps=1)
    trainer = AGRPO.make(tmp_path, reward=[function, other], **settings)
    if policy == "raise":
        message = rf"{function.__name__} failed.*longer than reward_timeout={limit}"
        with pytest.raises(RewardError, match=message) as error:
            trainer.train()
        assert isinstance(error.value.__cause__, TimeoutError)
    else:
        assert trained(trainer).norm() > 1e-3
        assert logged(trainer, "guards/reward_errors") == [0.5]
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_no_error_of_the_function_passes_the_time_limit():
    with pytest.raises(KeyboardInterrupt), TimeLimit(LONG):
        try:
            time_is_up()
            time.sleep(60)
        except BaseException:
            raise KeyboardInterrupt from None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_slow_function_within_its_limit_or_without_one_is_left_alone(tmp_path):
    def slow(completion_ids, **columns):
        time.sleep(0.4)
        return text_reward(None, completion_ids)

    change = trained(AGRPO.make(tmp_path))
    assert change.any()
    for limit in (LONG, None):
        assert torch.equal(trained(AGRPO.make(tmp_path, reward=slow, reward_timeout=limit)), change)


# ---------------------------------------------------------------- rewards that are no numbers


def spoilt(value):
    """`text_reward` with another value for the second completion of every batch."""

    def spoilt_reward(completion_ids, **columns):
        rewards = text_reward(None, completion_ids)
        return [value if row == 1 else reward for row, reward in enumerate(rewards)]

    return spoilt_reward


BAD_REWARDS = [float("nan"), float("inf"), float("-inf"), 1e39, torch.tensor(float("nan"))]


@pytest.mark.parametrize("value", BAD_REWARDS, ids=["nan", "inf", "-inf", "1e39", "tensor"])
def test_a_reward_that_is_not_finite_stops_the_run_or_counts_as_none(value, tmp_path):
    trainer = AGRPO.make(tmp_path, reward=spoilt(value))
    before = parameters_of(trainer).clone()
    with pytest.raises(RewardError, match=r"spoilt_reward returned .* for row 1 .* \(1 of 16 rewards"):
        trainer.train()
    assert torch.equal(parameters_of(trainer), before)

    change = trained(AGRPO.make(tmp_path, reward=spoilt(None)))
    lenient = AGRPO.make(tmp_path, reward=spoilt(value), reward_nonfinite="none", logging_steps=1)
    assert change.any() and torch.equal(trained(lenient), change)
    assert logged(lenient, "guards/reward_nonfinite") == [1 / 16]


def test_without_the_guard_an_infinite_reward_becomes_a_huge_advantage(tmp_path):
    trainer = AGRPO.make(tmp_path, reward=spoilt(float("inf")))
    trainer.reward_funcs = [spoilt(float("inf"))]
    assert rollout_of(trainer, "a b", "b a")["advantages"].abs().max() > 1e30


def test_something_that_is_no_number_is_an_error_of_the_function(tmp_path):
    trainer = AGRPO.make(tmp_path, reward=spoilt("right"))
    with pytest.raises(RewardError, match=r"spoilt_reward failed.*could not convert string to float"):
        trainer.train()
    forgot = AGRPO.make(tmp_path, reward=lambda completions, **columns: None)
    with pytest.raises(RewardError, match=r"failed.*TypeError"):
        forgot.train()


def test_reward_models_that_are_not_finite(tmp_path):
    settings = dict(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    judge = LlamaForSequenceClassification(LlamaConfig(**settings, num_labels=1, pad_token_id=0))
    judge.config._name_or_path = "judge"
    torch.nn.init.constant_(judge.score.weight, float("nan"))

    def make(policy):
        return AGRPOTrainer(
            tiny_model(seed=3),
            [judge, text_reward],
            AGRPO.make(tmp_path, reward_nonfinite=policy, logging_steps=1).args,
            Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tiny_tokenizer(),
            reward_processing_classes=[tiny_tokenizer(), None],
        )

    with pytest.raises(RewardError, match="reward model judge returned 16 of 16 rewards that are not finite"):
        make("raise").train()
    trainer = make("none")
    change = trained(trainer)
    assert change.isfinite().all() and change.any()
    assert logged(trainer, "guards/reward_nonfinite") == [0.5]  # of the values of both


# ---------------------------------------------------------------- what TRL sees


class Judge:
    """A reward function as an object, which TRL names after its class."""

    def __call__(self, completion_ids, **columns):
        return text_reward(None, completion_ids)


class AsyncJudge:
    async def __call__(self, completion_ids, **columns):
        return text_reward(None, completion_ids)


@pytest.mark.parametrize("function", [text_reward, ready_at_once, partial(text_reward), Judge(), AsyncJudge()])
def test_a_guarded_function_has_the_name_and_kind_of_the_function(function, tmp_path):
    guarded = RewardGuard(AGRPO.make(tmp_path).args, Accelerator(cpu=True)).wrap(function)
    assert get_callable_name(guarded) == get_callable_name(function)
    assert is_async_callable(guarded) == is_async_callable(function)
    batch = dict(prompts=["a", "b"], completions=["a", "b"], completion_ids=[[0], [0, 1]])
    rewards = guarded(**batch)
    rewards = asyncio.run(rewards) if is_async_callable(function) else rewards
    assert rewards == text_reward(None, batch["completion_ids"])


def test_a_plain_function_that_returns_an_awaitable_is_guarded_when_it_is_awaited(tmp_path):
    async def fails():
        raise KeyError("no such answer")

    guarded = RewardGuard(AGRPO.make(tmp_path).args, Accelerator(cpu=True)).wrap(lambda **columns: fails())
    waiting = guarded(prompts=["a"], completions=["b"])
    with pytest.raises(RewardError, match="<lambda> failed on a batch of 1 completions"):
        asyncio.run(waiting)


# ---------------------------------------------------------------- step-aware rewards


def step_aware(reward, success):
    return replace(SAPO, wrap=lambda _: StepAwareReward(reward, success=success, num_rollouts=2))


def half_succeed(completion_ids, **columns):
    return [len(ids) % 2 == 0 for ids in completion_ids]


def unknown_truth(completion_ids, **columns):
    return [float("nan")] * len(completion_ids)


def fails_on_continuations(calls: list):
    def success(completion_ids, **columns):
        calls.append(len(completion_ids))
        if len(calls) > 1:
            raise KeyError("no such answer")
        return [True] * len(completion_ids)

    return success


@pytest.mark.parametrize(
    ("reward", "success", "limit", "message"),
    [
        (failing, half_succeed, LONG, "failing failed"),
        (text_reward, failing, LONG, "failing failed"),
        (text_reward, sleeps, LONG, "sleeps failed.*reward_timeout"),
        (ready_at_once, awaits, SHORT, "awaits failed.*reward_timeout"),
        (text_reward, unknown_truth, LONG, "unknown_truth returned nan"),
    ],
    ids=["reward", "success", "hang", "async hang", "nan"],
)
def test_functions_inside_a_step_aware_reward_are_guarded(reward, success, limit, message, tmp_path):
    method = step_aware(reward, success)
    with pytest.raises(RewardError, match=message):
        method.make(tmp_path, reward_timeout=limit).train()
    lenient = dict(reward_timeout=limit, reward_error="none", reward_nonfinite="none", logging_steps=1)
    trainer = method.make(tmp_path, **lenient)
    assert trained(trainer).isfinite().all()
    assert logged(trainer, "guards/reward_errors")[0] + logged(trainer, "guards/reward_nonfinite")[0] > 0
    assert logged(trainer, "step_aware/continuations") == [0]


def test_failures_while_continuations_are_judged_are_counted(tmp_path):
    calls: list[int] = []
    method = step_aware(text_reward, fails_on_continuations(calls))
    trainer = method.make(tmp_path, reward_error="none", logging_steps=1)
    assert trained(trainer).any()
    assert len(calls) == 2 and logged(trainer, "step_aware/continuations")[0] > 0
    assert logged(trainer, "guards/reward_errors") == [1 / 4]  # reward and success, twice
    assert logged(trainer, "step_aware/probed_share") == [0.0]  # none whose success is known


# ---------------------------------------------------------------- rollouts that teach nothing


def test_empty_completions_are_counted_and_learn(tmp_path):
    lengths = []

    def short_is_bad(completion_ids, **columns):
        lengths.extend(map(len, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    trainer = AGRPO.make(tmp_path, reward=short_is_bad, logging_steps=1)
    rows = {}
    likelihood = trainer.choices.likelihood
    plan = likelihood.plan

    def keep(rollout):
        plans = plan(rollout)
        rows.update(plans, completion_ids=rollout.trajectory.completion_ids)
        return plans

    likelihood.plan = keep
    assert trained(trainer).any()
    share = sum(length == 1 for length in lengths) / len(lengths)
    assert 0 < share < 1 and logged(trainer, "completions/empty_share") == [share]
    empty = trainer.family.effective_length(rows["completion_ids"]) == 1
    assert empty.any() and rows["completion_mask"][empty].any(1).all()


def test_equal_rewards_are_told_after_some_rollouts(tmp_path, caplog):
    def constant(completions, **columns):
        return [0.1] * len(completions)

    settings = dict(max_steps=5, logging_steps=1, learning_rate=0.01, tied_rollouts_patience=2)
    trainer = AGRPO.make(tmp_path, reward=constant, **settings)
    assert trained(trainer).norm() < 1e-6
    assert logged(trainer, "guards/tied_rollouts") == [1.0] * 5 == logged(trainer, "frac_reward_zero_std")
    told = [record.message for record in caplog.records if "equal in every group" in record.message]
    assert [message.split()[3] for message in told] == ["2", "4"]
    caplog.clear()
    AGRPO.make(tmp_path, reward=constant, **settings | {"tied_rollouts_patience": 0}).train()
    useful = AGRPO.make(tmp_path, **settings)
    useful.train()
    assert logged(useful, "guards/tied_rollouts") == [0.0] * 5
    assert not [record for record in caplog.records if "equal in every group" in record.message]


@pytest.mark.parametrize(
    ("rewards", "weights", "tied"),
    [
        ([[0.1], [0.1], [0.7], [0.7]], [1.0], True),
        ([[0.1], [0.1], [0.7], [0.6]], [1.0], False),
        ([[0.1, 1.0], [1.1, 0.0], [2.0, 2.0], [2.0, 2.0]], [1.0, 1.0], True),  # to rounding
        ([[0.1, 1.0], [1.1, 0.0], [2.0, 2.0], [2.0, 2.0]], [1.0, 0.5], False),
        ([[float("nan")], [0.5], [float("nan")], [float("nan")]], [1.0], True),  # one is not better than nobody
        ([[float("nan"), 0.0], [0.5, 0.0], [1.0, 1.0], [1.0, 1.0]], [1.0, 1.0], False),
        ([[0.0], [0.0], [0.0], [0.0]], [1.0], True),
        ([[1e-9], [2e-9], [0.0], [0.0]], [1.0], False),
    ],
)
def test_all_tied(rewards, weights, tied):
    assert all_tied(torch.tensor(rewards), torch.tensor(weights), group=2) == tied


# ---------------------------------------------------------------- updates and rollouts that are not finite


class Steps(TrainerCallback):
    """Parameters at the start and after every update."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, [parameters_of(trainer).clone()]

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(parameters_of(self.trainer).clone())


def breaks(trainer, what: str, update: int) -> None:
    """Make the loss, or only one gradient, not finite in one update."""

    def now() -> bool:
        return trainer.state.global_step == update - 1

    def spoil(module, args, hidden):
        return hidden * torch.nan if now() and torch.is_grad_enabled() else None

    if what == "loss":
        trainer.model.model.norm.register_forward_hook(spoil)
    else:
        trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf if now() else None)


ADAM = dict(optim="adamw_torch", weight_decay=0.5, learning_rate=0.01, max_steps=3, logging_steps=1)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_stops_the_run_before_the_step(what, max_grad_norm, tmp_path):
    trainer = AGRPO.make(tmp_path, **ADAM, max_grad_norm=max_grad_norm)
    steps = Steps(trainer)
    trainer.add_callback(steps)
    breaks(trainer, what, update=2)
    name = "the loss and the gradient norm" if what == "loss" else "the gradient norm"
    with pytest.raises(FloatingPointError, match=rf"Update 2: not finite: {name}\. Lower learning_rate"):
        trainer.train()
    assert len(steps.seen) == 2 and torch.equal(parameters_of(trainer), steps.seen[1])
    assert not torch.equal(steps.seen[0], steps.seen[1])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_can_be_skipped(what, tmp_path, caplog):
    trainer = AGRPO.make(tmp_path, **ADAM, max_grad_norm=1.0, nonfinite_update="skip")
    steps = Steps(trainer)
    trainer.add_callback(steps)
    breaks(trainer, what, update=2)
    trainer.train()
    first, second, third, fourth = steps.seen
    assert torch.equal(second, third)  # neither the gradient, nor its moments, nor weight decay
    assert not torch.equal(first, second) and not torch.equal(third, fourth) and fourth.isfinite().all()
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    assert logged(trainer, "guards/skipped_updates") == [0.0, 1.0, 0.0]
    assert sum("Update 2: not finite" in record.message for record in caplog.records) == 1


def test_without_the_guard_one_bad_update_destroys_the_model(tmp_path, monkeypatch):
    trainer = AGRPO.make(tmp_path, **ADAM | {"max_steps": 1}, max_grad_norm=1.0)
    breaks(trainer, "gradient", update=1)
    monkeypatch.setattr(trainer, "_check_update", lambda model, grad_norm: None)
    trainer.train()
    assert parameters_of(trainer).isnan().any()


def test_a_broken_network_is_not_sampled_from(tmp_path):
    model = tiny_model(seed=3)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite for 16 of 16 rows in forward 1"):
        AGRPO.make(tmp_path, model=model).train()
    nothing = torch.full((1, MASK + 1), float("nan"))
    assert draw(nothing, torch.tensor([0.5], dtype=torch.float64)).numel() == 1  # without the guard: some id


# ---------------------------------------------------------------- settings and several processes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_error": "skip"}, "reward_error must be one of raise, none; got 'skip'"),
        ({"reward_nonfinite": "zero"}, "reward_nonfinite must be one of"),
        ({"nonfinite_update": "none"}, "nonfinite_update must be one of raise, skip"),
        ({"reward_timeout": 0.0}, "reward_timeout must be positive"),
        ({"tied_rollouts_patience": -1}, "tied_rollouts_patience must be at least 0"),
    ],
)
def test_unknown_policies_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AGRPO.make(tmp_path, **settings)


def launch(processes: str, policy: str, folder: Path) -> list[dict]:
    """What both processes of `guard_worker.py` wrote down."""
    returncode, output = run(accelerate_launch(processes, "tests/guard_worker.py", policy, str(folder)), folder)
    assert returncode == 0, output[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_all_processes_skip_what_one_of_them_cannot_use(tmp_path):
    """The reward function fails, and then the loss is not finite, on the second process alone."""
    zero, one = launch("cpu_ddp", "skip", tmp_path)
    for rank in (zero, one):
        assert rank["processes"] == 2
        assert rank["skipped"] == [0.0, 1.0, 0.0]
        assert rank["errors"] == [1 / 4] * 3  # one of two functions on one of two processes
        assert rank["moved"] == [True, False, True]
    assert zero["checksum"] == one["checksum"]


@pytest.mark.thorough
def test_deepspeed_stops_before_the_step_and_refuses_to_skip(tmp_path):
    for seen in launch("cpu_zero2", "raise", tmp_path):
        assert seen["processes"] == 2 and "DeepSpeed" in seen["refused"]
        assert "Update 2: not finite: the loss." in seen["error"]
        assert seen["moved"] == [True] and seen["unchanged_by_the_error"]


def test_warnings_reach_the_console_without_any_set_up():
    assert logging.getLogger("trl_diffusion.runtime.reward_guard").getEffectiveLevel() <= logging.WARNING
