"""Confusion zones: curves and AUCs against values by hand and by brute force, the callback, the recipe."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
import torch
from launching import HANG
from matplotlib.colors import to_hex
from methods import METHODS, text_reward
from tiny import forwards_of, tiny_model

from trl_diffusion.cli import analyze
from trl_diffusion.evaluation import ConfusionZoneCallback
from trl_diffusion.evaluation.confusion_zones import (
    SIGNALS,
    confusion_zone_figure,
    failure_auc,
    failure_auc_by_step,
    missing_outcome,
    signal_curves,
    signal_frame,
)
from trl_diffusion.trainers import callbacks

ROOT = Path(__file__).parents[1]
NAN = float("nan")
ATPO = next(method for method in METHODS if method.name == "atpo")
DIFFU = next(method for method in METHODS if method.name == "diffu_grpo")

# Two blocks of two steps: a success, a failure that ends early, a failure, and a completion of unknown success. What
# stands behind an end must not count.
ENTROPY = torch.tensor([[1.0, 0.5, 0.75, 0.25], [1.25, 0.75, 7.0, 7.0], [1.5, 0.5, 1.25, 1.0], [9.0, 8.0, 9.0, 8.0]])
MARGIN = torch.tensor([[0.25, 0.5, 0.5, 0.75], [0.25, 0.25, 0.0, 0.0], [0.75, 0.5, 0.75, 0.5], [0.0, 0.0, 0.0, 0.0]])
STEPS = torch.tensor([4, 2, 4, 4])
SUCCESS = torch.tensor([1.0, 0.0, 0.0, NAN])


@pytest.fixture
def frame() -> pd.DataFrame:
    return signal_frame(ENTROPY, MARGIN, STEPS, SUCCESS, steps_per_block=2)


def frame_of_values(values: list[float], success: list[float]) -> pd.DataFrame:
    """One step per completion, so that the value is the completion's mean."""
    column = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    return signal_frame(column, column, torch.ones(len(values)), torch.tensor(success), steps_per_block=2)


def pairwise_auc(failed: list[float], right: list[float]) -> float:
    """Share of pairs (failure, success) in which the failure is larger, ties one half."""
    return sum((f > s) + 0.5 * (f == s) for f in failed for s in right) / (len(failed) * len(right))


# ---------------------------------------------------------------- signals and curves


def test_the_frame_holds_the_steps_that_were_taken(frame):
    assert list(frame.columns) == ["completion", "step", "entropy", "confidence_margin", "roec", "success"]
    assert list(zip(frame["completion"], frame["step"], strict=True)) == [
        *((0, s) for s in range(4)),
        *((1, s) for s in range(2)),
        *((2, s) for s in range(4)),
        *((3, s) for s in range(4)),
    ]
    assert frame["entropy"].tolist()[:6] == [1.0, 0.5, 0.75, 0.25, 1.25, 0.75]
    assert frame["confidence_margin"].tolist()[4:10] == [0.75, 0.75, 0.25, 0.5, 0.25, 0.5]
    roec = frame["roec"].tolist()
    assert [roec[i] for i in (1, 3, 5, 7, 9)] == [0.5, 0.5, 0.5, 1.0, 0.25]
    assert all(math.isnan(roec[i]) for i in (0, 2, 4, 6, 8))  # the first step of a block
    assert frame["success"].isna().tolist() == [False] * 10 + [True] * 4
    assert frame["success"][:10].tolist() == [True] * 4 + [False] * 6


def test_steps_that_parallel_unmasking_skipped_are_left_out():
    entropy, margin = torch.tensor([[1.0, 0.0, 0.5, 0.0]]), torch.tensor([[0.2, 0.0, 0.4, 1.0]])
    taken = torch.tensor([[True, False, True, True]])
    skipping = signal_frame(entropy, margin, torch.tensor([4]), torch.tensor([True]), 2, taken)
    assert skipping["step"].tolist() == [0, 2, 3]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 4\), \(4, 3\), \(4,\) and \(4,\)"):
        signal_frame(ENTROPY, MARGIN[:, :3], STEPS, SUCCESS, 2)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        signal_frame(ENTROPY, MARGIN, STEPS, SUCCESS[:3], 2)


@pytest.mark.parametrize(
    "signal, success, expected",
    [
        ("entropy", False, {0: (1.375, 0.125, 2), 1: (0.625, 0.125, 2), 2: (1.25, NAN, 1), 3: (1.0, NAN, 1)}),
        ("entropy", True, {0: (1.0, NAN, 1), 1: (0.5, NAN, 1), 2: (0.75, NAN, 1), 3: (0.25, NAN, 1)}),
        ("confidence_margin", False, {0: (0.5, 0.25, 2), 1: (0.625, 0.125, 2), 2: (0.25, NAN, 1), 3: (0.5, NAN, 1)}),
        ("roec", False, {0: (NAN, NAN, 0), 1: (0.75, 0.25, 2), 2: (NAN, NAN, 0), 3: (0.25, NAN, 1)}),
    ],
)
def test_curves_by_hand(frame, signal, success, expected):
    curve = signal_curves(frame).loc[(signal, success)]
    assert curve.index.tolist() == list(expected)
    for step, values in expected.items():
        assert tuple(curve.loc[step]) == pytest.approx(values, nan_ok=True)


# ---------------------------------------------------------------- AUC


def test_auc_by_hand_with_unequal_lengths(frame):
    auc = failure_auc(frame)
    # Means over a completion's own steps. Entropy: success 0.625; failures 1 and 1.0625. Confidence margin: 0.5;
    # 0.75 and 0.375. RoEC: 0.5; 0.5 (a tie) and 0.625.
    assert auc["auc"].to_dict() == {"entropy": 1.0, "confidence_margin": 0.5, "roec": 0.75}
    assert auc["standard_error"].isna().all()  # one success has no spread


def test_auc_by_step_by_hand(frame):
    by_step = failure_auc_by_step(frame)
    assert by_step["entropy"].tolist() == [1.0, 0.75, 1.0, 1.0]
    assert by_step["confidence_margin"].tolist() == [0.25, 0.75, 0.0, 1.0]
    assert by_step["roec"].tolist() == pytest.approx([NAN, 0.75, NAN, 0.0], nan_ok=True)
    assert by_step["completions"].tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([3.0, 4.0, 1.0, 2.0], 0.0),
        ([2.0, 2.0, 2.0, 2.0], 0.5),
        ([1.0, 3.0, 3.0, 4.0], 0.875),
    ],
    ids=["perfect", "reversed", "all tied", "one tie"],
)
def test_separations(values, expected):
    auc = failure_auc(frame_of_values(values, [1.0, 1.0, 0.0, 0.0]))
    assert auc.loc["entropy", "auc"] == expected
    assert auc.loc["confidence_margin", "auc"] == 1.0 - expected  # 1 − value turns the order round
    assert math.isnan(auc.loc["roec", "auc"])  # the only step is a block's first


def test_auc_and_its_error_against_pairs():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (40,), generator=generator).double()  # many ties
    success = (torch.rand(40, generator=generator) < 0.4).double()
    failed, right = values[success == 0].tolist(), values[success == 1].tolist()
    assert len(failed) > 10 and len(right) > 10
    auc = failure_auc(frame_of_values(values.tolist(), success.tolist())).loc["entropy"]
    assert auc["auc"] == pytest.approx(pairwise_auc(failed, right), abs=1e-12)

    # DeLong: variance of each failure's share of successes below, and of each success's share of failures above
    of_failures = pd.Series([pairwise_auc([f], right) for f in failed]).var() / len(failed)
    of_successes = pd.Series([pairwise_auc(failed, [s]) for s in right]).var() / len(right)
    assert auc["standard_error"] == pytest.approx(math.sqrt(of_failures + of_successes), abs=1e-12)


@pytest.mark.parametrize(
    "success, note",
    [
        ([1.0, 1.0, 1.0], "all 3 completions succeeded"),
        ([0.0, 0.0, NAN], "all 2 completions failed"),
        ([NAN, NAN, NAN], "no completion whose success is known"),
    ],
)
def test_one_outcome_has_no_auc_and_says_so(success, note):
    one_sided = frame_of_values([1.0, 2.0, 3.0], success)
    assert failure_auc(one_sided).isna().all(axis=None)
    assert note in (missing_outcome(one_sided) or "")
    assert note in confusion_zone_figure(one_sided, 2).get_suptitle()


# ---------------------------------------------------------------- figure


def lines(axes, color: str) -> dict[float, float]:
    """x -> alpha of the vertical lines of a colour."""
    vertical = [line for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
    return {line.get_xdata()[0]: line.get_alpha() for line in vertical if to_hex(line.get_color()) == to_hex(color)}


def test_the_figure_shows_curves_block_starts_and_selected_steps(frame, tmp_path):
    figure = confusion_zone_figure(frame, 2, selected=[1, 3], title="a title")
    assert [axes.get_title().split("   ") for axes in figure.axes] == [
        ["Entropy H (nats)", "AUC 1.00"],
        ["Confidence margin 1 − (p1 − p2)", "AUC 0.50"],
        ["RoEC |ΔH|", "AUC 0.75"],
    ]
    for axes in figure.axes:
        assert set(lines(axes, "tab:green")) == {1, 3}
        assert set(lines(axes, "0.85")) == {0, 2}
    curves = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "."}
    assert curves == {"succeeded": [1.0, 0.5, 0.75, 0.25], "failed": [1.375, 0.625, 1.25, 1.0]}
    band = figure.axes[0].collections[-1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.5, 1.5)
    assert figure.get_suptitle() == "a title   1 succeeded, 2 failed   green: selected steps"
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_steps_chosen_by_more_sets_are_stronger(frame):
    figure = confusion_zone_figure(frame, 2, selected=torch.tensor([[1, 3], [1, -1]]))
    alpha = lines(figure.axes[0], "tab:green")
    assert set(alpha) == {1, 3} and alpha[1] == pytest.approx(0.7) and alpha[3] == pytest.approx(0.45)
    drawn_twice = confusion_zone_figure(frame, 2, selected=torch.tensor([[1, 1, 1], [1, 3, 3]]))
    assert lines(drawn_twice.axes[0], "tab:green") == alpha


def test_nothing_selected_marks_nothing(frame):
    figure = confusion_zone_figure(frame, 2)
    assert not lines(figure.axes[0], "tab:green") and "green" not in figure.get_suptitle()


# ---------------------------------------------------------------- callback


def with_callback(method, folder, *, every=1, **settings):
    chosen = {key: settings.pop(key) for key in ("success", "success_threshold", "reward") if key in settings}
    trainer = method.make(folder, logging_steps=1, **settings)
    trainer.add_callback(ConfusionZoneCallback(trainer, every, **chosen or {"success_threshold": 2.0}))
    return trainer


def check_against_parquet(entry: dict, path: Path) -> None:
    """A log entry's AUCs, recomputed by pairs from the file."""
    table = pd.read_parquet(path)
    for signal in SIGNALS:
        means = table.groupby("completion")[signal].mean()
        success = table.groupby("completion")["success"].first().astype(bool)
        expected = pairwise_auc(means[~success].tolist(), means[success].tolist())
        assert entry[f"confusion_zones/auc_{signal}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_the_callback_writes_logs_and_costs_no_forward(tmp_path, monkeypatch):
    drawn, draw = [], confusion_zone_figure

    def spy(frame, steps_per_block, selected, title):
        drawn.append((trainer.last_rollout, selected.clone(), title))
        return draw(frame, steps_per_block, selected, title)

    monkeypatch.setattr(callbacks, "confusion_zone_figure", spy)
    trainer = with_callback(ATPO, tmp_path / "with", every=2, max_steps=4, learning_rate=0.0)
    with forwards_of(trainer.model) as calls:
        trainer.train()
    plain = ATPO.make(tmp_path / "without", logging_steps=1, max_steps=4, learning_rate=0.0)
    with forwards_of(plain.model) as plain_calls:
        plain.train()
    assert len(calls) == len(plain_calls) > 0
    assert trainer.forward_units == plain.forward_units

    folder = tmp_path / "with" / "confusion_zones"
    names = ["update_000002.parquet", "update_000002.png", "update_000004.parquet", "update_000004.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all((folder / name).stat().st_size > 10_000 for name in names if name.endswith("png"))

    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert ["confusion_zones/auc_entropy" in entry for entry in entries] == [False, True, False, True]
    for update in (2, 4):
        check_against_parquet(entries[update - 1], folder / f"update_{update:06d}.parquet")

    assert [title for *_, title in drawn] == ["update 2", "update 4"]
    (trajectory, finished), selected, _ = drawn[-1]
    assert torch.equal(selected, trainer.last_selection)
    table = pd.read_parquet(folder / "update_000004.parquet")
    assert table["success"].dtype == "boolean"
    rewards = text_reward(finished.completions, finished.completion_ids)
    for row, (reward, steps) in enumerate(zip(rewards, trajectory.steps_taken.tolist(), strict=True)):
        own = table[table["completion"] == row]
        assert own["step"].tolist() == list(range(steps))
        assert own["success"].tolist() == [reward >= 2.0] * steps
        assert own["entropy"].tolist() == pytest.approx(trajectory.step_entropy[row, :steps].tolist())
        assert own["confidence_margin"].tolist() == pytest.approx((1 - trajectory.step_margin[row, :steps]).tolist())


@pytest.mark.slow
def test_a_success_function_sees_the_data_set_and_may_not_know(tmp_path):
    seen = []

    def success(prompts, completions, completion_ids, **columns):
        seen.append((prompts, completions, completion_ids, columns))
        return [None if len(ids) == 1 else 2 in ids for ids in completion_ids]

    trainer = with_callback(DIFFU, tmp_path, success=success, record_signals=True)
    trainer.train_dataset = trainer.train_dataset.add_column("number", list(range(len(trainer.train_dataset))))
    trainer.train()
    prompts, completions, completion_ids, columns = seen[0]
    assert len(prompts) == len(completions) == 16 and len(columns["number"]) == 16
    table = pd.read_parquet(tmp_path / "confusion_zones" / "update_000001.parquet").groupby("completion").first()
    expected = [None if len(ids) == 1 else 2 in ids for ids in completion_ids]
    assert None in expected and True in expected and False in expected
    assert [None if value is pd.NA else value for value in table["success"]] == expected


def test_the_threshold_is_for_the_named_reward_and_survives_float32(tmp_path):
    trainer = DIFFU.make(tmp_path, record_signals=True)
    finished = SimpleNamespace(rewards=torch.tensor([[5.0, 0.9], [5.0, NAN], [0.0, 0.8]]))
    trainer.reward_funcs.append(text_reward)
    second = ConfusionZoneCallback(trainer, 1, success_threshold=0.9, reward=1)._successes(finished)
    assert second.tolist() == pytest.approx([1.0, NAN, 0.0], nan_ok=True)
    first = ConfusionZoneCallback(trainer, 1, success_threshold=0.9)._successes(finished)
    assert first.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.slow
def test_one_outcome_logs_no_auc(tmp_path):
    trainer = with_callback(ATPO, tmp_path, success_threshold=1e9)
    trainer.train()
    assert not any("confusion_zones/auc_entropy" in entry for entry in trainer.state.log_history)
    assert (tmp_path / "confusion_zones" / "update_000001.png").is_file()


def test_a_resumed_run_waits_for_its_next_rollout(tmp_path):
    trainer = with_callback(ATPO, tmp_path)
    trainer.state.global_step = 1
    trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
    assert not (tmp_path / "confusion_zones").exists()


def test_what_cannot_work_is_refused_at_start(tmp_path):
    silent = DIFFU.make(tmp_path)
    with pytest.raises(ValueError, match="record_signals=True"):
        ConfusionZoneCallback(silent, 1, success_threshold=1.0)
    trainer = DIFFU.make(tmp_path, record_signals=True)
    with pytest.raises(ValueError, match="either `success`"):
        ConfusionZoneCallback(trainer, 1)
    with pytest.raises(ValueError, match="either `success`"):
        ConfusionZoneCallback(trainer, 1, success_threshold=1.0, success=text_reward)
    with pytest.raises(ValueError, match="at least 1 update"):
        ConfusionZoneCallback(trainer, 0, success_threshold=1.0)
    with pytest.raises(ValueError, match="reward=1"):
        ConfusionZoneCallback(trainer, 1, success_threshold=1.0, reward=1)
    with pytest.raises(TypeError, match="DiffusionGRPOTrainer"):
        ConfusionZoneCallback(object(), 1, success_threshold=1.0)


def test_a_success_function_of_the_wrong_length_is_refused(tmp_path):
    trainer = with_callback(DIFFU, tmp_path, success=lambda completions, **_: [True], record_signals=True)
    with pytest.raises(ValueError, match="16 completions got 1 successes"):
        trainer.train()


@pytest.mark.slow
def test_the_image_goes_to_the_trackers_that_the_run_reports_to(tmp_path, monkeypatch):
    trainer = with_callback(ATPO, tmp_path)
    callback = trainer.callback_handler.callbacks[-1]
    logged = {"wandb": [], "trackio": []}

    def report_to(*trackers: str) -> None:
        trainer.args.report_to = list(trackers)
        callback.on_step_end(trainer.args, trainer.state, trainer.control)

    with monkeypatch.context() as patch:
        for tracker in logged:
            patch.setitem(sys.modules, tracker, None)  # importing it raises
        trainer.train()
        for tracker in logged:
            with pytest.raises(ImportError):
                report_to(tracker)
        image = str(tmp_path / "confusion_zones" / "update_000001.png")
        expected = [{"confusion_zones": ("image", image), "train/global_step": 1}]
        for tracker, calls in logged.items():
            fake = ModuleType(tracker)
            fake.log, fake.Image = calls.append, lambda path: ("image", path)
            patch.setitem(sys.modules, tracker, fake)
        sys.modules["wandb"].run = None  # as when wandb is switched off
        report_to("trackio", "wandb")
        assert logged == {"trackio": expected, "wandb": []}
        sys.modules["wandb"].run = object()
        report_to("wandb")
        assert logged == {"trackio": expected, "wandb": expected}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.release
def test_two_processes_draw_the_completions_of_both(tmp_path):
    checkpoint = tmp_path / "model"
    tiny_model(seed=3).save_pretrained(checkpoint)
    train_atpo(checkpoint, tmp_path / "one", micro_batches=2)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "trl_diffusion" / "accelerate_configs" / "cpu_ddp.yaml"), __file__]
    command += [str(checkpoint), str(tmp_path / "two")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stderr[-4000:]
    names = sorted(path.name for path in (tmp_path / "two" / "confusion_zones").iterdir())
    assert names == ["update_000001.parquet", "update_000001.png"]
    one, two = (pd.read_parquet(tmp_path / n / "confusion_zones" / "update_000001.parquet") for n in ("one", "two"))
    assert two["completion"].nunique() == 16
    pd.testing.assert_frame_equal(one, two, rtol=1e-4)


def train_atpo(checkpoint: Path, folder: Path, micro_batches: int):
    # A success function sees the completions of its own process only.
    trainer = ATPO.make(folder, model=str(checkpoint), gradient_accumulation_steps=micro_batches)
    trainer.add_callback(
        ConfusionZoneCallback(trainer, 1, success=lambda completion_ids, **_: [2 in i for i in completion_ids])
    )
    trainer.train()
    return trainer


# ---------------------------------------------------------------- recipe


@pytest.fixture
def recipe(monkeypatch):
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["analyze_trajectories.py", *arguments])
        analyze.main()

    return run


@pytest.mark.thorough
@pytest.mark.slow
def test_the_recipe_runs_without_a_model(tmp_path):
    command = [sys.executable, "recipes/analyze_trajectories.py", "--num_completions", "24", "--batch_size", "10"]
    command += ["--output_dir", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stderr[-4000:]
    for words in ("analysing embedded", "AUC for failure", "roec_cm selects with K = 4", ".parquet"):
        assert words in result.stdout
    assert "Sampling: 100%" in result.stderr
    assert (tmp_path / "confusion_zones.png").stat().st_size > 10_000

    summary = json.loads((tmp_path / "confusion_zones.json").read_text())
    table = pd.read_parquet(tmp_path / "confusion_zones.parquet")
    success = table.groupby("completion")["success"].first().astype(bool)
    assert summary["succeeded"] == success.sum() and summary["failed"] == (~success).sum() and len(success) == 24
    for signal in SIGNALS:
        means = table.groupby("completion")[signal].mean()
        expected = pairwise_auc(means[~success].tolist(), means[success].tolist())
        assert summary["auc"][signal]["auc"] == pytest.approx(expected, abs=1e-9)
    longest = table["step"].max() + 1
    assert len(summary["auc_by_step"]["entropy"]) == len(summary["completions_by_step"]) == longest
    assert len(set(summary["selected_steps"])) == 4 and max(summary["selected_steps"]) < longest


@pytest.mark.slow
def test_completions_do_not_depend_on_the_batch(recipe, tmp_path):
    quick = ("--task", "countdown", "--num_completions", "6", "--seed", "3", "--unmasking", "max_prob")
    recipe(*quick, "--batch_size", "6", "--output_dir", str(tmp_path / "whole"))
    recipe(*quick, "--batch_size", "4", "--output_dir", str(tmp_path / "parts"))
    whole, parts = (pd.read_parquet(tmp_path / name / "confusion_zones.parquet") for name in ("whole", "parts"))
    assert whole["completion"].nunique() == 6
    pd.testing.assert_frame_equal(whole, parts, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_one_completion_gives_a_note_instead_of_an_auc(recipe, tmp_path, capsys):
    recipe("--task", "sudoku", "--num_completions", "1", "--output_dir", str(tmp_path))
    summary = json.loads((tmp_path / "confusion_zones.json").read_text())  # NaN would not be JSON
    assert summary["auc"]["entropy"] == {"auc": None, "standard_error": None}
    assert summary["note"].startswith("No AUC: all 1 completions") and summary["note"] in capsys.readouterr().out


def test_a_wrong_setting_of_the_recipe_is_refused(recipe):
    with pytest.raises(ValueError, match="argument --task: invalid choice: 'chess'"):
        recipe("--task", "chess")
    with pytest.raises(ValueError, match="must divide the canvas"):
        recipe("--block_length", "7")
    with pytest.raises(ValueError, match="num_selected"):
        recipe("--num_selected", "0")


if __name__ == "__main__":
    trained = train_atpo(Path(sys.argv[1]), Path(sys.argv[2]), micro_batches=1)
    assert trained.accelerator.num_processes == 2


def test_the_recipe_draws_with_a_threshold_and_an_approximate_cache(recipe, tmp_path):
    quick = ("--num_completions", "4", "--unmasking", "max_prob", "--confidence_threshold", "0.6", "--use_cpu", "true")
    recipe(*quick, "--cache", "dual", "--denoising_steps", "32", "--output_dir", str(tmp_path))
    summary = json.loads((tmp_path / "confusion_zones.json").read_text())
    assert (summary["cache"], summary["confidence_threshold"]) == ("dual", 0.6)
    table = pd.read_parquet(tmp_path / "confusion_zones.parquet")
    steps = table.groupby("completion")["step"]
    assert (steps.count() <= steps.max()).any()  # some steps of a block were skipped
    assert (table["entropy"] > 0).all()
