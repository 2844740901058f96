"""A run that is killed and resumed is the run that nothing interrupted.

Runs are killed by SIGKILL in `resume_worker.py`. Here and there "equal" is bit for bit, of the weights and of every
entry of the log but for times, if not said otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from launching import accelerate_launch, run
from methods import PROMPTS, method_named, text_reward
from resume_worker import IN_A_CHECKPOINT, SETTINGS, accuracy_of, cases, without_times
from tiny import tiny_model
from trainer_helpers import parameters_of
from transformers import Trainer
from trl import TrlParser

from trl_diffusion.evaluation import AccuracyCallback, ConfusionZoneCallback
from trl_diffusion.runtime import manifest
from trl_diffusion.trainers import AGRPOConfig

pytestmark = pytest.mark.slow

AGRPO, ATPO = method_named("agrpo"), method_named("atpo")
CASES = cases()
ALONE = [name for name in CASES if "two processes" not in name]  # on one process


# ---------------------------------------------------------------- killed processes

ZERO_STAGES = [pytest.param(2, marks=pytest.mark.release), 3]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs a case on two processes with a ZeRO stage, or all cases of one process, when a test first asks for it."""

    @cache
    def launch(zero: int | None, case: str = "") -> tuple[Path, str]:
        out = tmp_path_factory.mktemp(f"zero{zero}")
        names = [case] if zero else ALONE
        arguments = ["tests/resume_worker.py", "--cases", *names, "--out", str(out)]
        if zero:
            arguments += ["--zero", str(zero)]
        command = accelerate_launch(f"cpu_zero{zero}", *arguments) if zero else [sys.executable, *arguments]
        return out, run(command, out)[1]

    return launch


def outcome(killed, case: str, zero: int | None = None) -> tuple[dict, dict, str]:
    """What the killed and the uninterrupted run left, and what all printed; checks that every kill happened."""
    out, output = killed(zero, case) if zero else killed(None)
    results = [out / case / f"{name}.pt" for name in ("killed", "whole")]
    if not all(result.is_file() for result in results):
        pytest.fail(f"The case {case!r} did not finish. End of the output:\n{output[-8000:]}")
    ends = (out / case / "kills.txt").read_text().splitlines()
    assert ends == [f"{kill.phase} {kill.step}" for kill in CASES[case].kills]
    first, second = (torch.load(result, weights_only=True) for result in results)
    return first, second, output


@pytest.mark.parametrize("case", ALONE)
def test_a_killed_run_ends_as_the_uninterrupted_one(case, killed):
    resumed, whole, output = outcome(killed, case)
    assert resumed["history"] == whole["history"] and len(whole["history"]) > 4
    assert resumed["accuracy"] == whole["accuracy"] and whole["accuracy"][0][0] == 0
    assert resumed["forward_units"] == whole["forward_units"] > 0
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    for kill in CASES[case].kills:
        if kill.phase in IN_A_CHECKPOINT and kill.phase != "rotation":  # which spoils an old one
            assert f"Skipping {killed(None)[0] / case}/killed/checkpoint-{kill.step}: it has no manifest" in output


@pytest.mark.thorough
@pytest.mark.release
@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_a_run_on_two_processes_whose_ranks_are_killed(zero, killed):
    resumed, whole, output = outcome(killed, "agrpo on two processes", zero)
    assert "checkpoint-6: it has no manifest" in output
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=0, atol=1e-6)
    assert len(resumed["history"]) == len(whole["history"])
    for mine, theirs in zip(map(json.loads, resumed["history"]), map(json.loads, whole["history"]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert resumed["accuracy"] == whole["accuracy"]


@pytest.mark.thorough
@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_other_rates_take_effect_under_deepspeed(zero, killed):
    resumed, whole, output = outcome(killed, "other rates on two processes", zero)
    assert "`learning_rate` was 0.02 and is 0.1; `lr_scheduler_type` was cosine and is linear" in output
    assert resumed["rates"] == {step: rates for step, rates in whole["rates"].items() if step >= 2}
    for step, (rate, decay) in resumed["rates"].items():
        assert rate == pytest.approx(0.1 * (1 - step / 6)) and decay == 0.3


# ---------------------------------------------------------------- what a checkpoint must hold

SYNCHRONISED = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2, "loss_type": "dr_grpo"}
# Five updates are one into a rollout batch, two after a log (every third) and within an epoch of eight.
SHORT = SETTINGS | {"max_steps": 9, "save_steps": 5, "save_total_limit": None}


def history(trainer) -> list[dict]:
    return [without_times(entry) for entry in trainer.state.log_history]


def same(first, second) -> bool:
    return torch.equal(parameters_of(first), parameters_of(second)) and history(first) == history(second)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with `checkpoint-5` and `checkpoint-9`; not to be changed."""
    trainer = AGRPO.make(tmp_path_factory.mktemp("whole"), **SHORT)
    trainer.train()
    return trainer


@pytest.fixture
def run_dir(whole, tmp_path) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(whole.args.output_dir, tmp_path / "run"))


def resumed(folder: Path, checkpoint="checkpoint-5", **settings):
    again = AGRPO.make(folder.parent / "again", model=tiny_model(seed=9), **SHORT | settings)
    again.train(resume_from_checkpoint=str(folder / checkpoint))
    return again


def reseal(folder: Path, facts: dict) -> None:
    manifest.seal(folder, **{name: value for name, value in facts.items() if name not in ("written", "files")})


NEUTRAL = {
    "step": 0,
    "rollouts": {"train": 0, "eval": 0},
    "buffer": None,
    "forward_units": 0.0,
    "metrics": {},
    "loss": torch.zeros(()),
    "total_loss": 0.0,
    "last_logged": 5,
}


@pytest.mark.parametrize("forgotten", [None, *NEUTRAL])
def test_everything_in_the_checkpoint_is_needed(forgotten, whole, run_dir):
    folder = run_dir / "checkpoint-5"
    state = torch.load(folder / "rollout_state_0.pt", weights_only=True)
    if forgotten is not None:
        state[forgotten] = NEUTRAL[forgotten]
        torch.save(state, folder / "rollout_state_0.pt")
        facts = manifest.read_manifest(folder)
        reseal(folder, facts)
    assert same(resumed(run_dir), whole) == (forgotten is None)


def test_a_rollout_batch_that_is_used_up_is_not_saved(tmp_path):
    trainer = AGRPO.make(tmp_path, **SHORT | {"max_steps": 4, "save_steps": 4})
    trainer.train()
    assert torch.load(tmp_path / "checkpoint-4" / "rollout_state_0.pt", weights_only=True)["buffer"] is None


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (ATPO, {"num_iterations": 2}),  # with confusion zones, of the rollout before the resume too
        (AGRPO, {"log_completions": True}),
        (AGRPO, {"eval_on_start": True, "per_device_eval_batch_size": 8}),
        (AGRPO, SYNCHRONISED),
        (AGRPO, {"step_draws": "uniform", "use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 0.5}),
    ],
    ids=["confusion zones", "completions", "evaluation", "synchronised reference", "adaptive entropy"],
)
def test_what_stands_around_the_run_resumes_with_it(method, settings, tmp_path):
    def make(folder):
        trainer = method.make(folder, **SHORT | {"max_steps": 8} | settings)
        if method is ATPO:
            trainer.add_callback(ConfusionZoneCallback(trainer, every=1, success=every_other))
        trainer.eval_dataset = Dataset.from_dict({"prompt": PROMPTS})
        return trainer

    whole, again = make(tmp_path / "whole"), make(tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(again, whole)
    if "log_completions" in settings:
        table = Path("completions", "completions_00006.parquet")
        first, second = (pd.read_parquet(tmp_path / name / table) for name in ("whole", "again"))
        assert first.equals(second) and len(first) == 16
    if "sync_ref_model" in settings:
        start, *both = (
            torch.cat([weight.flatten() for weight in model.parameters()])
            for model in (tiny_model(seed=3), whole.ref_model, again.ref_model)
        )
        assert torch.equal(*both) and not torch.equal(both[0], start)
    if method is ATPO:
        assert sum("confusion_zones/auc_entropy" in entry for entry in history(whole)) >= 2
        assert (tmp_path / "again" / "confusion_zones" / "update_000006.png").is_file()
        assert torch.equal(again.last_selection, whole.last_selection)


def every_other(completions, **kwargs) -> list[bool]:
    return [row % 2 == 0 for row in range(len(completions))]


def test_a_finished_run_takes_no_further_step(whole, run_dir):
    """As when it was killed between its last checkpoint and its end."""
    again = resumed(run_dir, "checkpoint-9")
    assert again.state.global_step == 9 and same(again, whole)


def test_accuracy_before_training_is_not_measured_again(whole, tmp_path):
    def make(folder):
        trainer = AGRPO.make(folder, **SHORT)
        callback = AccuracyCallback(trainer, Dataset.from_dict({"prompt": PROMPTS}), accuracy_of, every=4)
        trainer.add_callback(callback)
        return trainer, callback

    first, before = make(tmp_path / "whole")
    first.train()
    again, after = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    counts = [[(step, value.correct, value.total) for step, value in each.history] for each in (before, after)]
    assert counts[0] == counts[1] and [step for step, *_ in counts[0]] == [0, 4, 8, 9]
    # a callback that was not there before measures where it comes in
    last, late = make(tmp_path / "late")
    last.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-5"))
    assert [step for step, _ in late.history] == [5, 8, 9]


# ---------------------------------------------------------------- the order of prompts, the place in a rollout batch


def test_every_epoch_has_its_own_order_of_prompts_also_after_a_resume(tmp_path):
    def prompts_of_a_run(folder: str, checkpoint: Path | None = None) -> list[str]:
        seen: list[str] = []

        def reward(prompts, completion_ids, **kwargs):
            seen.extend(prompts[::4])  # every prompt has four completions
            return text_reward(prompts, completion_ids)

        trainer = AGRPO.make(tmp_path / folder, reward=reward, **SHORT | {"max_steps": 24, "save_steps": 9})
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return seen

    whole = prompts_of_a_run("whole")
    epochs = [whole[start : start + 8] for start in (0, 8, 16)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(PROMPTS)] * 3
    assert len(set(map(tuple, epochs))) == 3
    # update 9 is the first of the second epoch, whose first rollout batch of four prompts is in the checkpoint
    assert prompts_of_a_run("again", tmp_path / "whole" / "checkpoint-9") == whole[12:]


def test_an_inner_update_goes_once_through_the_rollout_batch(tmp_path):
    """A rollout batch has four micro-batches and an update two, so four micro-batches are one inner update."""
    trainer = AGRPO.make(tmp_path, **SHORT | {"max_steps": 6, "num_mc_samples": 1})
    likelihood = trainer.choices.likelihood
    view_of, updates = likelihood.view, []

    def record(rows, update, view, mask_token_id):
        updates.append(update)
        return view_of(rows, update, view, mask_token_id)

    likelihood.view = record
    trainer.train()
    assert updates == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]


# ---------------------------------------------------------------- which checkpoint


def zero_second_half(path: Path) -> None:
    """As a disk does that lost some blocks: the size stays."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGE = {
    "zeroed": zero_second_half,
    "removed": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rollout_state_0.pt", "rng_state.pth"]
)
def test_a_torn_checkpoint_is_named_and_skipped(name, damage, run_dir, caplog):
    DAMAGE[damage](run_dir / "checkpoint-9" / name)
    trainer = AGRPO.make(run_dir, **SHORT)
    assert trainer._checkpoint_to_resume(True) == run_dir / "checkpoint-5"
    assert f"Skipping {run_dir / 'checkpoint-9'}: it has " in caplog.text and name in caplog.text
    with pytest.raises(ValueError, match=f"checkpoint-9 has .*{name}.*another one, or resume_from_checkpoint=True"):
        trainer.train(resume_from_checkpoint=str(run_dir / "checkpoint-9"))


NO_MANIFESTS = [
    b"\xff\xfe\x00\x80",  # not UTF-8
    b"{}",
    b"[]",
    b"null",
    b'"written"',
    b"17",
    b'{"written": 1, "files": []}',
    b'{"written": "today", "files": {}}',
    b'{"written": 1, "files": {"model.safetensors": null}}',
    b'{"written": 1, "files": {"model.safetensors": {"size": 3}}}',
]


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_what_is_no_manifest_stops_neither_a_resumed_nor_a_fresh_run(content, run_dir, caplog):
    (run_dir / "checkpoint-9" / manifest.MANIFEST).write_bytes(content)
    trainer = AGRPO.make(run_dir, **SHORT | {"max_steps": 1, "save_steps": 1, "save_total_limit": 2})
    assert trainer._checkpoint_to_resume(True) == run_dir / "checkpoint-5"
    assert f"Skipping {run_dir / 'checkpoint-9'}: it has a manifest.json that cannot be read" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-9 has a manifest\.json that cannot be read"):
        trainer.train(resume_from_checkpoint=str(run_dir / "checkpoint-9"))
    trainer.train()
    assert sorted(path.name for path in run_dir.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_without_a_sound_manifest_is_torn(damage, run_dir, caplog):
    DAMAGE[damage](run_dir / "checkpoint-9" / manifest.MANIFEST)
    trainer = AGRPO.make(run_dir, **SHORT)
    assert trainer._checkpoint_to_resume("last") == run_dir / "checkpoint-5"
    assert manifest.MANIFEST in caplog.text


def test_a_whole_checkpoint_is_not_skipped(run_dir, caplog):
    assert AGRPO.make(run_dir, **SHORT)._checkpoint_to_resume(True) == run_dir / "checkpoint-9"
    assert "Skipping" not in caplog.text


def test_without_a_whole_checkpoint_training_starts_from_the_beginning(whole, tmp_path, caplog):
    (tmp_path / "checkpoint-3").mkdir()
    trainer = AGRPO.make(tmp_path, **SHORT)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-3: it has no manifest.json" in caplog.text
    assert f"No whole checkpoint in {tmp_path}: training starts from the beginning" in caplog.text
    assert same(trainer, whole)


def test_a_new_run_in_an_old_folder_says_so_and_is_the_one_resumed(run_dir, caplog):
    first = AGRPO.make(run_dir, **SHORT | {"max_steps": 2, "save_steps": 1})
    first.train()
    assert "holds checkpoints of an earlier run" in caplog.text
    assert first._checkpoint_to_resume(True) == run_dir / "checkpoint-2"  # not the old checkpoint-9


def test_what_cannot_be_resumed_is_refused(run_dir):
    trainer = AGRPO.make(run_dir, **SHORT)
    with pytest.raises(ValueError, match="'nowhere' is not a folder"):
        trainer.train(resume_from_checkpoint="nowhere")
    reseal(run_dir / "checkpoint-9", manifest.read_manifest(run_dir / "checkpoint-9") | {"processes": 4})
    with pytest.raises(ValueError, match="was written by 4 processes; this run has 1"):
        trainer.train(resume_from_checkpoint=True)
    synchronised = AGRPO.make(run_dir, **SHORT | SYNCHRONISED)
    synchronised.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="sync_ref_model changes and FSDP shards"):
        synchronised.train()


def test_old_checkpoints_are_deleted_when_the_new_one_is_whole(tmp_path, monkeypatch):
    trainer = AGRPO.make(tmp_path, **SHORT | {"max_steps": 3, "save_steps": 1, "save_total_limit": 1})
    seal, before = trainer._seal, []

    def record(folder):
        before.append([path.name for path in manifest.survey(tmp_path)[0]])
        seal(folder)

    monkeypatch.setattr(trainer, "_seal", record)
    trainer.train()
    assert before == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.args.save_total_limit == 1


@pytest.mark.parametrize(("word", "number"), [("true", 9), ("True", 9), ("last", 9), ("false", None), ("None", None)])
def test_words_of_a_command_line_ask_for_the_last_checkpoint_or_none(word, number, run_dir):
    trainer = AGRPO.make(run_dir, **SHORT)
    assert trainer._checkpoint_to_resume(word) == (None if number is None else run_dir / f"checkpoint-{number}")


def test_rotation_deletes_torn_checkpoints_first(tmp_path):
    for number in (8, 2, 4, 6):  # in the order of time
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "weights").write_text("weights")
        if number != 4:
            manifest.seal(folder)
    assert [path.name for path in manifest.survey(tmp_path)[0]] == ["checkpoint-6", "checkpoint-2", "checkpoint-8"]

    def left(limit: int, *keep: str) -> list[str]:
        manifest.rotate(tmp_path, limit, {tmp_path / name for name in keep})
        return sorted(path.name for path in tmp_path.iterdir())

    assert left(3) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    assert left(2, "checkpoint-8") == ["checkpoint-6", "checkpoint-8"]
    assert left(1, "checkpoint-6", "checkpoint-8") == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("push", [False, True])
def test_a_checkpoint_of_weights_only_is_not_for_resuming(push, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *_: None)
    trainer = AGRPO.make(tmp_path, **SHORT | {"max_steps": 1, "save_steps": 1, "save_only_model": True})
    trainer.args.push_to_hub = push
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert manifest.survey(tmp_path)[0] == []


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], None),
        (["--resume_from_checkpoint"], "last"),
        (["--resume_from_checkpoint", "--seed", "1"], "last"),
        (["--resume_from_checkpoint", "some/checkpoint-4"], "some/checkpoint-4"),
    ],
)
def test_the_flag_needs_no_value(arguments, value, tmp_path):
    given = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--num_generations", "4"]
    (config,) = TrlParser(AGRPOConfig).parse_args_and_config([*given, *arguments])
    assert config.resume_from_checkpoint == value


def test_the_flag_in_a_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nresume_from_checkpoint: true\n")
    (config,) = TrlParser(AGRPOConfig).parse_args_and_config(["--config", str(file)])
    assert AGRPO.make(tmp_path)._checkpoint_to_resume(config.resume_from_checkpoint) is None
