"""What a resumed run must have in common with the one that wrote the checkpoint, and what may change and then does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from datasets import Dataset, IterableDataset, concatenate_datasets
from methods import PROMPTS, Method, method_named, step_aware, text_reward
from peft import LoraConfig
from resume_worker import SETTINGS
from tiny import tiny_model, tiny_sdar
from torch.optim.lr_scheduler import LambdaLR, StepLR
from trainer_helpers import parameters_of
from transformers import TrainerCallback, get_scheduler

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.credit.step_selection import select_all
from trl_diffusion.runtime import manifest
from trl_diffusion.runtime.resumed_rates import Rates
from trl_diffusion.runtime.run_facts import data_facts
from trl_diffusion.trainers import AGRPOConfig

pytestmark = pytest.mark.slow

AGRPO, ATPO, WD1, UNI_GRPO = (method_named(name) for name in ("agrpo", "atpo", "wd1", "uni_grpo"))
# The checkpoint after five updates is one update into a rollout batch.
SHORT = SETTINGS | {"max_steps": 9, "save_steps": 5, "save_total_limit": None}
LORA = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """`checkpoint-5` of an AGRPO run; not to be changed."""
    return run_to(tmp_path_factory.mktemp("agrpo"), AGRPO)


def run_to(folder: Path, method: Method, **settings) -> Path:
    method.make(folder, **SHORT | {"max_steps": 5} | settings).train()
    return folder / "checkpoint-5"


def resume(checkpoint: Path, folder: Path, method: Method = AGRPO, *, data=None, **settings):
    trainer = method.make(folder, **SHORT | settings)
    if data is not None:
        trainer.train_dataset = data
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


# ---------------------------------------------------------------- what must stay


@pytest.mark.parametrize(
    ("setting", "was", "is_now"),
    [
        ("temperature", 0.9, 0.5),
        ("top_k", 0, 2),
        ("max_completion_length", 8, 16),
        ("denoising_steps", 4, 8),
        ("block_length", 4, 8),
        ("unmasking", "random", "max_prob"),
        ("step_draws", "entropy", "uniform"),
        ("num_mc_samples", 2, 3),
        ("num_iterations", 2, 1),
        ("steps_per_generation", 4, 8),
        ("gradient_accumulation_steps", 2, 4),
        ("num_generations", 4, 8),
        ("loss_type", "luspo", "dr_grpo"),
        ("epsilon", 0.2, 0.1),
        ("scale_rewards", "none", "group"),
        ("reward_weights", None, [2.0]),
        ("shuffle_dataset", True, False),
        ("seed", 42, 7),
        ("optim", "adamw_torch", "sgd"),
        ("adam_beta2", 0.99, 0.9),
    ],
)
def test_a_changed_setting_is_named_and_refused(setting, was, is_now, checkpoint, tmp_path):
    with pytest.raises(ValueError) as error:
        resume(checkpoint, tmp_path, **{setting: is_now})
    assert f"`{setting}` was {was} and is {is_now}" in str(error.value)
    assert "Set them back; or start a new run from the saved weights" in str(error.value)


def test_several_changes_are_all_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"`beta` was 0\.0 and is 0\.1; `loss_type` was luspo and is dr_grpo"):
        resume(checkpoint, tmp_path, beta=0.1, loss_type="dr_grpo")


def test_another_method_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="the trainer was AGRPOTrainer and is ATPOTrainer"):
        resume(checkpoint, tmp_path / "atpo", ATPO)
    weighted = run_to(tmp_path / "wd1", WD1)
    with pytest.raises(ValueError, match=r"the trainer was WD1Trainer and is UniGRPOTrainer\. What it holds"):
        resume(weighted, tmp_path / "uni_grpo", UNI_GRPO, beta=0.1)


@dataclass
class OwnConfig(AGRPOConfig):
    own_setting: float = 1.0


def test_a_new_method_s_settings_must_stay_without_being_listed(tmp_path):
    own = replace(AGRPO, config=OwnConfig)
    written = run_to(tmp_path / "first", own)
    with pytest.raises(ValueError, match=r"`own_setting` was 1\.0 and is 2\.0"):
        resume(written, tmp_path / "again", own, own_setting=2.0)


def test_other_rewards_are_refused(checkpoint, tmp_path):
    def other_reward(**kwargs):
        return text_reward(**kwargs)

    with pytest.raises(ValueError, match=r"reward functions was \['text_reward'\] and is \['other_reward'\]"):
        resume(checkpoint, tmp_path / "other", reward=other_reward)
    sapo = replace(AGRPO, wrap=step_aware)
    written = run_to(tmp_path / "sapo", sapo)
    with pytest.raises(ValueError, match=r"reward functions was \['text_reward \(step-aware\)'\] and is \['text_re"):
        resume(written, tmp_path / "plain")
    more = replace(AGRPO, wrap=partial(StepAwareReward, success_threshold=3.0, num_rollouts=2))
    with pytest.raises(ValueError, match=r"which the step-aware reward's success_threshold was 2\.0 and is 3\.0\. W"):
        resume(written, tmp_path / "more", more)


def first_steps(signals, count, noise):
    return select_all(signals, count, noise)


def last_steps(signals, count, noise):
    return select_all(signals, count, noise)


def test_another_function_that_selects_steps_is_refused(tmp_path):
    def selecting(function):
        own = {"step_selector": None, "num_mc_samples": 4}
        return replace(ATPO, trainer=partial(ATPO.trainer, step_selector=function), settings=own)

    written = run_to(tmp_path / "first", selecting(first_steps), num_mc_samples=4)
    with pytest.raises(ValueError, match="the function that selects steps was first_steps and is last_steps"):
        resume(written, tmp_path / "again", selecting(last_steps), num_mc_samples=4)


def test_another_network_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="the family was llada and is sdar; the network was LLaDAModelLM and is SDAR"):
        resume(checkpoint, tmp_path / "sdar", model=tiny_sdar(seed=3), cache="auto")
    with pytest.raises(ValueError, match="the model's `n_layers` was 2 and is 3"):
        resume(checkpoint, tmp_path / "layers", model=tiny_model(seed=3, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"the model's `dtype` was torch\.float32 and is torch\.bfloat16"):
        resume(checkpoint, tmp_path / "dtype", model=tiny_model(seed=3).bfloat16())


def test_another_adapter_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="the adapter was None and is LORA"):
        resume(checkpoint, tmp_path / "none", peft_config=LORA)
    written = run_to(tmp_path / "first", AGRPO, peft_config=LORA)
    with pytest.raises(ValueError, match="the adapter was LORA and is None"):
        resume(written, tmp_path / "full")
    same = {"r": 4, "target_modules": "all-linear"}
    for change, other in {
        "`r` was 4 and is 8": same | {"r": 8, "lora_alpha": 8},
        "`lora_alpha` was 8 and is 16": same | {"lora_alpha": 16},
        "`target_modules` was .* and is .'q_proj'.": same | {"target_modules": ["q_proj"]},
    }.items():
        with pytest.raises(ValueError, match=f"the adapter's {change}"):
            resume(written, tmp_path / "other", peft_config=LoraConfig(**other))


def test_weights_that_the_checkpoint_does_not_hold_must_be_the_same(tmp_path):
    """Those under an adapter, and those of a reference model that stays. Where the model lies does not matter."""
    for name, settings in {
        "adapter": {"peft_config": LORA},
        "reference": {"beta": 0.5, "loss_type": "dr_grpo"},
    }.items():
        tiny_model(seed=3).save_pretrained(tmp_path / name / "base")
        written = run_to(tmp_path / name / "first", AGRPO, model=str(tmp_path / name / "base"), **settings)
        (tmp_path / name / "base").rename(tmp_path / name / "moved")
        again = resume(written, tmp_path / name / "again", model=str(tmp_path / name / "moved"), **settings)
        assert again.state.global_step == 9
        tiny_model(seed=4).save_pretrained(tmp_path / name / "other")
        with pytest.raises(ValueError, match="the model's `name` was base and is other; the model's `checksum` was"):
            resume(written, tmp_path / name / "wrong", model=str(tmp_path / name / "other"), **settings)


def test_another_optimizer_that_is_handed_over_is_refused(tmp_path):
    def optimized(folder, optimizer_class, groups=1):
        trainer = AGRPO.make(folder, **SHORT | {"max_steps": 5})
        weights = list(trainer.model.parameters())
        trainer.optimizer = optimizer_class([{"params": weights[index::groups]} for index in range(groups)], lr=1e-3)
        return trainer

    optimized(tmp_path / "first", torch.optim.AdamW).train()
    for change in ("SGD of groups of .21.", "AdamW of groups of .11, 10."):
        other = optimized(tmp_path / "again", *((torch.optim.SGD, 1) if "SGD" in change else (torch.optim.AdamW, 2)))
        with pytest.raises(ValueError, match=f"the optimizer was AdamW of groups of .21. tensors and is {change}"):
            other.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-5"))


def test_another_data_set_is_refused(checkpoint, tmp_path):
    reworded = ["a b", "b a a", "a", "b b a b", "a a", "b", "b a", "b b a"]
    with pytest.raises(ValueError, match="was written by a run in which the data set's checksum was"):
        resume(checkpoint, tmp_path / "contents", data=Dataset.from_dict({"prompt": reworded}))
    with pytest.raises(ValueError, match="the data set's number of rows was 8 and is 7"):
        resume(checkpoint, tmp_path / "rows", data=Dataset.from_dict({"prompt": PROMPTS[:7]}))
    with pytest.raises(
        ValueError, match=r"the data set's list of columns was \['prompt'\] and is \['answer', 'prompt'\]"
    ):
        resume(checkpoint, tmp_path / "columns", data=Dataset.from_dict({"prompt": PROMPTS, "answer": PROMPTS}))


# ---------------------------------------------------------------- facts of the data


def rows(count: int = 100) -> list[dict]:
    return [{"prompt": [{"role": "user", "content": f"{i} + {i}"}], "answer": 2 * i} for i in range(count)]


def test_a_data_set_is_the_same_wherever_it_comes_from(tmp_path):
    data = Dataset.from_list(rows())
    data.to_json(tmp_path / "rows.jsonl")
    same = [
        Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache")),
        concatenate_datasets([data.select(range(30)), data.select(range(30, 100))]),
        Dataset.from_list(rows()[::-1]).select(range(99, -1, -1)),
        data.select_columns(["answer", "prompt"]),
        data.map(lambda row: {"answer": row["answer"] + 0}),
        data.with_format("torch"),
    ]
    assert len({data._fingerprint, *(other._fingerprint for other in same)}) > 1
    assert [data_facts(other, None) for other in same] == [data_facts(data, None)] * len(same)
    assert data_facts(data, None)["number of rows"] == 100
    assert json.loads(json.dumps(data_facts(data, None))) == data_facts(data, None)


def test_a_data_set_differs_where_a_value_an_order_or_a_template_does():
    facts = data_facts(Dataset.from_list(rows()), None)
    changed = rows()
    changed[57]["answer"] += 1
    assert data_facts(Dataset.from_list(changed), None)["checksum"] != facts["checksum"]
    assert data_facts(Dataset.from_list(rows()).shuffle(seed=1), None)["checksum"] != facts["checksum"]
    assert data_facts(Dataset.from_list(rows()), "{{ messages }}") != facts


def test_of_a_stream_only_the_columns_are_known():
    def read():
        raise AssertionError("nothing is read")
        yield {"prompt": ""}

    stream = IterableDataset.from_generator(read).select_columns(["prompt"])
    facts = data_facts(Dataset.from_list(rows()).to_iterable_dataset(), None)
    assert facts == {
        "chat template": None,
        "list of columns": ["answer", "prompt"],
        "number of rows": None,
        "checksum": None,
    }
    assert data_facts(stream, None)["checksum"] is None


# ---------------------------------------------------------------- checkpoints of earlier versions


def as_before(checkpoint: Path, folder: Path) -> Path:
    """A copy with the manifest of earlier versions: seven settings and the sizes of files."""
    copy = Path(shutil.copytree(checkpoint, folder / "earlier" / checkpoint.name))
    facts = manifest.read_manifest(copy)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    names += ("num_generations", "num_mc_samples", "seed")
    earlier = {name: facts[name] for name in ("written", "processes")}
    earlier["settings"] = {name: facts["settings"][name] for name in names}
    earlier["files"] = {name: file["size"] for name, file in facts["files"].items()}
    (copy / manifest.MANIFEST).write_text(json.dumps(earlier))
    return copy


def test_a_checkpoint_of_an_earlier_version_resumes_and_says_what_it_does_not_know(checkpoint, tmp_path, caplog):
    earlier = as_before(checkpoint, tmp_path)
    again, usual = resume(earlier, tmp_path / "again"), resume(checkpoint, tmp_path / "usual")
    assert torch.equal(parameters_of(again), parameters_of(usual))
    (said,) = [record.message for record in caplog.records if "earlier version" in record.message]
    assert str(earlier) in said
    for name in ("the trainer", "`temperature`", "`loss_type`", "the model", "the adapter", "the data set"):
        assert name in said.split("as they were: ")[1].rstrip(".").split(", ")
    assert "`seed`" not in said and "`learning_rate`" not in said
    with pytest.raises(ValueError, match="`seed` was 42 and is 7"):
        resume(earlier, tmp_path / "seed", seed=7)


# ---------------------------------------------------------------- what may change


class RatesAtWork(TrainerCallback):
    """The hyperparameters of the optimizer's groups at every one of its steps."""

    def __init__(self):
        self.groups: list[list[dict]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.groups.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])

    def of(self, name: str = "lr", group: int = 0) -> list[float]:
        return [groups[group][name] for groups in self.groups]


def rates_of_a_run(folder: Path, checkpoint: Path | None = None, *, optimizers=None, **settings):
    trainer = AGRPO.make(folder, **SHORT | settings)
    if optimizers is not None:
        trainer.optimizer, trainer.lr_scheduler = optimizers(trainer.model)
    rates = RatesAtWork()
    trainer.add_callback(rates)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return rates, trainer


CHANGES = [
    {"learning_rate": 0.1},
    {"lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "constant"},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    {"warmup_steps": 7},
    {"max_steps": 12},
    {"learning_rate": 0.05, "lr_scheduler_type": "linear", "warmup_steps": 3, "max_steps": 11},
]


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_a_resumed_run_has_the_rates_of_its_own_settings(changed, checkpoint, tmp_path, caplog):
    settings = SHORT | changed
    resumed, trainer = rates_of_a_run(tmp_path, checkpoint, **changed)
    start = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings["learning_rate"])
    schedule = get_scheduler(
        settings["lr_scheduler_type"],
        start,
        settings.get("warmup_steps", 0),
        settings["max_steps"],
        settings.get("lr_scheduler_kwargs"),
    )
    expected = []
    for _ in range(settings["max_steps"]):
        expected.append(start.param_groups[0]["lr"])
        start.step()
        schedule.step()
    assert resumed.of() == resumed.of(group=1) == expected[5:]
    assert resumed.of("initial_lr") == [settings["learning_rate"]] * len(expected[5:])
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[1:] == [expected[step - 1] for step in range(6, settings["max_steps"] + 1, 3)]
    for name, value in changed.items():
        assert f"`{name}` was {manifest.read_manifest(checkpoint)['settings'][name]} and is {value}" in caplog.text


def test_rates_by_hand(checkpoint, tmp_path):
    """0.02 · ½(1 + cos(πt/9)) before; afterwards 0.1 · (1 − t/9)."""
    resumed, _ = rates_of_a_run(tmp_path, checkpoint, learning_rate=0.1, lr_scheduler_type="linear")
    assert resumed.of() == pytest.approx([0.1 * 4 / 9, 0.1 * 3 / 9, 0.1 * 2 / 9, 0.1 * 1 / 9], rel=1e-12)


def test_a_changed_rate_moves_the_weights_as_far(tmp_path):
    """With SGD and no momentum the first step after the resume is ten times as long."""
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    written = run_to(tmp_path / "first", AGRPO, **plain)
    start = parameters_of(AGRPO.make(tmp_path, model=type(tiny_model()).from_pretrained(written), **SHORT))
    steps = [
        parameters_of(resume(written, tmp_path / str(rate), **plain | {"learning_rate": rate, "max_steps": 6})) - start
        for rate in (0.02, 0.2)
    ]
    assert steps[0].abs().max() > 1e-4
    torch.testing.assert_close(steps[1], 10 * steps[0], rtol=1e-3, atol=1e-6)


def test_weight_decay_and_epsilon_take_effect_too(checkpoint, tmp_path):
    resumed, _ = rates_of_a_run(tmp_path, checkpoint, weight_decay=0.3, adam_epsilon=1e-6)
    assert resumed.of("weight_decay", 0) == [0.3] * 4 and resumed.of("weight_decay", 1) == [0.0] * 4
    assert resumed.of("eps") == [1e-6] * 4 and resumed.of("betas") == [(0.9, 0.99)] * 4


def test_logging_and_saving_take_effect_too(checkpoint, tmp_path):
    _, trainer = rates_of_a_run(tmp_path, checkpoint, logging_steps=2, save_steps=3)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6, 8]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


def test_nothing_is_said_where_nothing_changed(checkpoint, tmp_path, caplog):
    rates_of_a_run(tmp_path, checkpoint, max_steps=5)
    assert "other settings" not in caplog.text and "earlier version" not in caplog.text


def two_groups(low: float, high: float, schedule):
    def optimizers(model):
        weights = list(model.parameters())
        groups = [{"params": weights[:10], "lr": low}, {"params": weights[10:], "lr": high}]
        optimizer = torch.optim.AdamW(groups)
        return optimizer, schedule(optimizer)

    return optimizers


def test_groups_that_are_handed_over_keep_rates_of_their_own(tmp_path):
    def halved(optimizer):
        return LambdaLR(optimizer, lambda step: 0.5**step)

    rates_of_a_run(tmp_path / "first", optimizers=two_groups(1e-3, 1e-2, halved), max_steps=5)
    written = tmp_path / "first" / "checkpoint-5"
    resumed, _ = rates_of_a_run(tmp_path / "again", written, optimizers=two_groups(2e-3, 4e-2, halved))
    assert resumed.of(group=0) == [2e-3 * 0.5**step for step in range(5, 9)]
    assert resumed.of(group=1) == [4e-2 * 0.5**step for step in range(5, 9)]


def test_another_kind_of_schedule_that_is_handed_over_resumes_as_it_was_or_not_at_all(tmp_path):
    def every_third(optimizer):
        return StepLR(optimizer, step_size=3, gamma=0.1)

    whole, _ = rates_of_a_run(tmp_path / "first", optimizers=two_groups(1e-3, 1e-2, every_third))
    written = tmp_path / "first" / "checkpoint-5"
    resumed, _ = rates_of_a_run(tmp_path / "again", written, optimizers=two_groups(1e-3, 1e-2, every_third))
    assert resumed.of() == whole.of()[5:] and resumed.of(group=1) == whole.of(group=1)[5:]
    with pytest.raises(ValueError, match=r"was 0\.01 and is 0\.04, but its StepLR resumes at the rates of the check"):
        rates_of_a_run(tmp_path / "wrong", written, optimizers=two_groups(1e-3, 4e-2, every_third))


@pytest.mark.thorough
def test_a_schedule_that_follows_the_evaluations_starts_again_where_the_rate_changed(tmp_path):
    plateau = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        # no evaluation after the first is ever better
        "lr_scheduler_kwargs": dict(factor=0.5, patience=0, mode="max", threshold=1e9, threshold_mode="abs"),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "reward",
        "per_device_eval_batch_size": 8,
    }

    evaluated = Dataset.from_dict({"prompt": PROMPTS[:2]})

    def with_evaluation(model, reward, args, data, none, *others, **kwargs):
        return AGRPO.trainer(model, reward, args, data, evaluated, *others, **kwargs)

    def run(folder, checkpoint=None, **settings):
        trainer = replace(AGRPO, trainer=with_evaluation).make(folder, **SHORT | settings)
        rates = RatesAtWork()
        trainer.add_callback(rates)
        trainer.train(resume_from_checkpoint=checkpoint)
        return rates.of()

    whole = run(tmp_path / "whole", **plateau)
    assert whole == [0.02] * 4 + [0.01] * 2 + [0.005] * 2 + [0.0025]
    written = str(tmp_path / "whole" / "checkpoint-5")
    assert run(tmp_path / "same", written, **plateau) == whole[5:]
    assert run(tmp_path / "changed", written, **plateau | {"learning_rate": 0.4})[0] == 0.4
    # from one kind of schedule to the other
    linear = pytest.approx([0.02 * (1 - t / 9) for t in range(5, 9)], rel=1e-12)
    assert run(tmp_path / "linear", written, lr_scheduler_type="linear") == linear
    cosine = str(run_to(tmp_path / "cosine", AGRPO))
    assert run(tmp_path / "plateau", cosine, **plateau)[0] == 0.02


def test_a_schedule_that_deepspeed_steps_and_loads_itself_has_the_rates_of_its_own_settings():
    """Its engine loads optimizer and schedule before the trainer comes to do so."""
    lr_schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")

    def warmup_and_decay(optimizer, rate):
        return lr_schedules.WarmupDecayLR(optimizer, 8, 0.0, rate, warmup_num_steps=2, warmup_type="linear")

    def halved(optimizer, rate):
        return LambdaLR(optimizer, lambda step: 0.5**step)

    def make(schedule, rate):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=rate)
        return optimizer, schedule(optimizer, rate)

    def next_rates(optimizer, schedule, count: int) -> list[float]:
        rates = []
        for _ in range(count):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return rates

    for kind in (warmup_and_decay, halved):
        interrupted, its_schedule = make(kind, 0.02)
        next_rates(interrupted, its_schedule, 3)
        resumed, schedule = make(kind, 0.1)
        rates = Rates(resumed, AcceleratedScheduler(schedule, [resumed]))
        resumed.load_state_dict(interrupted.state_dict())
        schedule.load_state_dict(its_schedule.state_dict())
        rates.resume(None, 3, anew=True)
        assert next_rates(resumed, schedule, 4) == next_rates(*make(kind, 0.1), 7)[3:]
