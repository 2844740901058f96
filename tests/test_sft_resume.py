"""A fine-tuning run resumes like a reinforcement learning run: exactly, from a whole checkpoint, with its settings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from resume_worker import without_times
from tiny import tiny_model, tiny_tokenizer
from trainer_helpers import parameters_of
from trl import TrlParser

from trl_diffusion.runtime import manifest
from trl_diffusion.trainers.sft import SFTConfig, SFTTrainer

# Eight rows, two in a micro-batch and four in an update: an epoch has two updates.
ROWS = [
    {"prompt": "a b"[: 1 + 2 * (i % 2)], "completion": " ".join("ab"[i >> bit & 1] for bit in range(3))}
    for i in range(8)
]


def trainer(folder: Path, *, data=ROWS, peft_config=None, model_seed: int = 3, **settings) -> SFTTrainer:
    defaults = dict(
        output_dir=str(folder),
        max_completion_length=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=9,
        learning_rate=0.02,
        lr_scheduler_type="cosine",
        logging_steps=2,
        save_strategy="steps",
        save_steps=5,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    return SFTTrainer(
        tiny_model(seed=model_seed),
        SFTConfig(**defaults | settings),
        Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with `checkpoint-5` (one update after a log, in the third epoch) and `checkpoint-9`."""
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


@pytest.fixture
def run_dir(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole.args.output_dir, tmp_path / "run"))


def history(run) -> list[dict]:
    return [without_times(entry) for entry in run.state.log_history]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(whole, run_dir, tmp_path):
    again = trainer(tmp_path / "again", model_seed=9)  # the weights come from the checkpoint
    again.train(resume_from_checkpoint=str(run_dir / "checkpoint-5"))
    assert torch.equal(parameters_of(again), parameters_of(whole))
    assert history(again) == history(whole) and len(history(whole)) == 5


@pytest.mark.slow
def test_an_adapter_resumes_exactly(tmp_path):
    adapter = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    torch.manual_seed(0)
    first = trainer(tmp_path / "first", **adapter)
    first.train()
    again = trainer(tmp_path / "again", **adapter)
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-5"))
    assert torch.equal(parameters_of(again), parameters_of(first)) and history(again) == history(first)


def test_a_torn_checkpoint_is_skipped_for_an_older_whole_one(whole, run_dir, caplog):
    weights = run_dir / "checkpoint-9" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    again = trainer(run_dir)
    again.train(resume_from_checkpoint=True)
    assert f"Skipping {run_dir / 'checkpoint-9'}: it has a model.safetensors of" in caplog.text
    assert torch.equal(parameters_of(again), parameters_of(whole))
    # the run has written it again
    assert manifest.fault(run_dir / "checkpoint-9") is None and manifest.damage(run_dir / "checkpoint-9") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_noise_level": 0.1}, r"`min_noise_level` was 0\.001 and is 0\.1"),
        ({"max_completion_length": 16}, "`max_completion_length` was 8 and is 16"),
        ({"seed": 7}, "`seed` was 42 and is 7"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size` was 2 and is 4"),
        ({"optim": "sgd"}, "`optim` was .* and is sgd"),
        ({"data": ROWS[:6]}, "the data set's number of rows was 8 and is 6"),
        ({"data": ROWS[::-1]}, "the data set's checksum was"),
        ({"peft_config": LoraConfig(target_modules="all-linear")}, "the adapter was None and is LORA"),
    ],
    ids=["noise", "canvas", "seed", "batch", "optimizer", "rows", "order", "adapter"],
)
def test_what_must_stay_is_named(change, message, run_dir):
    with pytest.raises(ValueError, match=message):
        trainer(run_dir, **change).train(resume_from_checkpoint=True)


def test_a_changed_rate_takes_effect(run_dir, tmp_path):
    again = trainer(tmp_path / "again", learning_rate=0.1, lr_scheduler_type="linear")
    again.train(resume_from_checkpoint=str(run_dir / "checkpoint-5"))
    rates = {entry["step"]: entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry}
    assert rates[6] == pytest.approx(0.1 * 4 / 9) and rates[8] == pytest.approx(0.1 * 2 / 9)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], None),
        (["--resume_from_checkpoint"], "last"),
        (["--resume_from_checkpoint", "x/checkpoint-4"], "x/checkpoint-4"),
    ],
)
def test_the_flag_needs_no_value(arguments, value, run_dir):
    given = ["--output_dir", str(run_dir), "--use_cpu", "true", "--bf16", "false"]
    (config,) = TrlParser(SFTConfig).parse_args_and_config([*given, *arguments])
    assert config.resume_from_checkpoint == value
    if value == "last":
        assert trainer(run_dir)._checkpoint_to_resume(value) == run_dir / "checkpoint-9"
