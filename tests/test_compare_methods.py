"""The comparison of methods: its statistics, and a run that is stopped and goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from launching import HANG

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

from comparison import figures  # noqa: E402
from comparison.arms import ARMS  # noqa: E402
from comparison.core import (  # noqa: E402
    CORE,
    FEWER_STEPS,
    ON_CHAINS,
    RATE_OF,
    best_learning_rate,
    next_learning_rate,
)
from comparison.core_summary import (  # noqa: E402
    Runs,
    area,
    compact,
    core_tables,
    fewer_steps_table,
    undecided,
)
from comparison.run import Budget, Job, Length, make_trainer, train_and_evaluate  # noqa: E402
from comparison.settings import setting_of  # noqa: E402
from comparison.summary import markdown, summarise  # noqa: E402
from statistics_of_runs import holm, sign_flip_p_value, standard_error  # noqa: E402

from trl_diffusion.trainers import METHODS  # noqa: E402

TUNED = ("diffu_grpo_tuned", "agrpo_tuned")  # baselines of the family that compares all methods


def test_standard_error_by_hand():
    assert standard_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx(math.sqrt(14 / 3 / 4))
    assert math.isnan(standard_error([5.0]))


def test_sign_flips_by_hand():
    # of the 8 sign patterns only +++ and −−− have a sum as far from 0 as 6
    assert sign_flip_p_value([1.0, 2.0, 3.0]) == 2 / 8
    # sums ±6, ±4, ±2, 0, 0: four of eight are at least 4
    assert sign_flip_p_value([-1.0, 2.0, 3.0]) == 4 / 8
    assert sign_flip_p_value([1.0] * 5) == 2 / 32
    assert sign_flip_p_value([0.0, 0.0]) == 1.0


def test_sign_flips_of_many_pairs_are_drawn():
    differences = np.random.default_rng(1).normal(0.5, 1.0, 14)
    exact = sign_flip_p_value(differences)
    # a fifteenth pair of 0 changes no sum, so the p-value is the same; 100,000 draws have an error of 0.0016 at most
    assert sign_flip_p_value([*differences, 0.0]) == pytest.approx(exact, abs=0.007)
    assert sign_flip_p_value([1.0] * 30) == pytest.approx(1 / 100_001)
    assert sign_flip_p_value([0.0] * 30) == 1.0


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1, and no smaller than those before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def core_run(arm: str, seed: int, sampled: float, task: str = "chained_sums") -> dict:
    curve = [{"forward_units": 100.0, "reward": 0.2}, {"forward_units": 400.0, "reward": 0.4}]
    greedy = {"27": sampled, "9": 0.0} if arm != "base" else {"36": 0.1, "27": sampled, "18": 0.05, "9": 0.0}
    run = {"task": task, "arm": arm, "seed": seed, "accuracy": greedy, "sampled_accuracy": sampled, "curve": curve}
    return run | ({"curve": []} if arm == "base" else {})


def test_verdicts_follow_the_interval():
    runs = [core_run("base", 0, 0.2)]
    for seed in range(6):
        noise = 0.01 * (-1) ** seed
        runs += [
            core_run("agrpo", seed, 0.5 + 0.05 * seed),
            core_run("diffu_grpo", seed, 0.3 + 0.05 * seed + noise),  # less
            core_run("agrpo_sum", seed, 0.501 + 0.05 * seed + noise),  # within ± 1.5 points
            core_run("agrpo_paper", seed, 0.505 + 0.05 * seed),  # more, and within ± 1.5 points
            core_run("agrpo_sapo_1", seed, 0.501 + 0.05 * seed + 5 * noise),  # open
        ]
    found = Runs(runs)
    verdicts = {each.arm: each for each in found.differences("chained_sums")}
    assert {arm: each.verdict for arm, each in verdicts.items()} == {
        "diffu_grpo": "less",
        "agrpo_sum": "equal",
        "agrpo_paper": "equal",
        "agrpo_sapo_1": "open",
    }
    less = verdicts["diffu_grpo"]
    # ± 1 around −20: std 1.0954, standard error 0.4472, t(5) 2.5706
    assert (less.mean, less.half_width) == (pytest.approx(-20.0), pytest.approx(2.5706 * 0.4472, abs=1e-3))
    assert [(each.arm, each.baseline) for each in undecided(found, 60)] == [("agrpo_sapo_1", "agrpo")]
    assert undecided(found, 6) == []
    assert area(runs[1]) == pytest.approx(100 * (0.2 * 100 + 0.4 * 300) / 400)
    assert area(compact(runs[1])) == area(runs[1]) and math.isnan(area(runs[0]))
    (_, head, accuracies), (_, _, differences) = core_tables(found)
    assert accuracies[1][:4] == ["agrpo", "62.5 ± 3.8", "50.0", "0"] and len(head) <= 7
    assert {line[0]: line[-1] for line in differences} == {arm: each.verdict for arm, each in verdicts.items()}
    assert fewer_steps_table(found)[2] == []
    runs[0]["parallel"] = {"accuracy": 0.125, "steps": 17.0}
    for seed, (reached, taken) in enumerate([(0.5, 16.0), (0.75, 18.0)]):
        at_steps = {"36": 0.5, "18": 0.25, "9": 0.125}
        parallel = {"accuracy": reached, "steps": taken}
        runs += [core_run("agrpo_fewer_steps", seed, 0.5) | {"accuracy": at_steps, "parallel": parallel}]
    assert fewer_steps_table(Runs(runs))[2] == [
        ["chained_sums", "base", "10.0", "5.0", "0.0", "12.5", "17.0"],
        ["chained_sums", "agrpo_fewer_steps", "50.0 ± 0.0", "25.0 ± 0.0", "12.5 ± 0.0", "62.5 ± 12.5", "17.0 ± 1.0"],
    ]


def test_core_arms_are_compared_with_arms_of_the_table():
    settings = {name: METHODS[arm.method].config_class.__dataclass_fields__ for name, arm in CORE.items()}
    for name, arm in CORE.items():
        assert set(arm.baselines) <= CORE.keys() - {name}
        assert arm.settings.keys() <= settings[name].keys() and "learning_rate" not in arm.settings
    assert {*FEWER_STEPS, *RATE_OF, *RATE_OF.values()} <= CORE.keys() and {*FEWER_STEPS} <= RATE_OF.keys()


def test_an_arm_is_tuned_until_its_best_rate_has_neighbours():
    def tuned(**means: float) -> dict:
        of_arm = {rate: {"100": mean - 1, "101": mean + 1} for rate, mean in means.items()}
        return {"chained_sums": {"agrpo": of_arm}}

    task = "chained_sums_fixed"  # takes the rates of `chained_sums`
    middle, low, high = ({"0.0001": a, "0.0003": b, "0.0006": c} for a, b, c in ((1, 9, 2), (9, 2, 1), (1, 2, 9)))
    for means, best, beyond in (
        (middle, 3e-4, None),
        (low, 1e-4, 3e-5),
        (high, 6e-4, 1e-3),
        (low | {"3e-05": 1}, 1e-4, None),
        (low | {"3e-05": 10}, 3e-5, None),  # the grid ends
    ):
        assert best_learning_rate(tuned(**means), task, "agrpo") == best
        assert next_learning_rate(tuned(**means), task, "agrpo") == beyond
    assert best_learning_rate(tuned(**high), task, "agrpo_fewer_steps") == 6e-4
    assert best_learning_rate(tuned(**high), task, "base") is None


@pytest.mark.parametrize("name", CORE)
def test_every_core_arm_has_a_trainer(name, tmp_path):
    task = "chained_sums" if name in ON_CHAINS else "sudoku_sweeps"
    setting = setting_of(task)
    trainer = make_trainer(Job(task, name, 0, 1e-4, tmp_path), Length(), setting, str(tmp_path), Budget(1.0))
    assert trainer.args.learning_rate == 1e-4 and trainer.args.max_completion_length == setting.canvas_length
    assert trainer.args.unmasking == ("random" if "random_order" in name or name == "just_grpo" else "max_prob")
    if name in FEWER_STEPS:
        assert trainer.args.denoising_steps == setting.fewer_steps[0]


@pytest.mark.slow
def test_parallel_decoding_takes_the_steps_it_needs(tmp_path):
    """Every block of 5 takes at least one step and at most 5; chance is one in ten."""
    found = train_and_evaluate(Job("chained_sums", "base", 0, None, tmp_path), Length(eval_size=32))
    assert found["accuracy"].keys() == {"36", "27", "18", "9"}
    assert 9 <= found["parallel"]["steps"] < 27 and found["parallel"]["accuracy"] > 0.2 > found["accuracy"]["18"]


def run_of(arm: str, seed: int, greedy: float, sampled: float) -> dict:
    return {
        "task": "countdown",
        "arm": arm,
        "seed": seed,
        "accuracy": {"16": greedy, "8": greedy - 0.1, "4": greedy - 0.2},
        "sampled_accuracy": sampled,
        "forward_units": 1000.0 + seed,
        "rollouts": 4,
        "curve": [],
    }


def test_differences_are_paired_by_seed():
    runs = [run_of("base", 0, 0.25, 0.25)]
    runs += [run_of("diffu_grpo", seed, 0.25 * (seed + 1), 0.5) for seed in (0, 1, 2)]
    # seed 2 has no partner yet; what differs between seeds cancels in the pairs
    runs += [run_of("sapo_3", seed, 0.25 * (seed + 1) + 0.125, 0.5 - 0.25 * seed) for seed in (1, 0)]
    base, diffu, sapo = summarise(runs)
    assert base["differences"] == [] and diffu["differences"] == []
    assert diffu["greedy"] == {"mean": 50.0, "standard_error": pytest.approx(25 / math.sqrt(3)), "std": 25.0}
    assert diffu["greedy_half_steps"]["mean"] == pytest.approx(40.0)
    assert diffu["greedy_quarter_steps"]["mean"] == pytest.approx(30.0)
    greedy, sampled = sapo["differences"]
    assert (greedy["measure"], greedy["baseline"]) == ("greedy", "diffu_grpo")
    assert (greedy["mean"], greedy["standard_error"], greedy["p_value"]) == (12.5, 0.0, 0.5)
    assert (sampled["measure"], sampled["mean"], sampled["standard_error"]) == ("sampled", -12.5, 12.5)
    assert sapo["forward_units"] == 1000.5
    table = markdown([base, diffu, sapo])
    assert "| base | 25.0 |" in table and "+12.5 ± 0.0 (0.500)" in table
    assert max(line.count("|") for line in table.splitlines()) <= 8  # seven columns


def test_figures_have_few_lines_whose_names_do_not_touch(tmp_path, monkeypatch):
    panels = list(figures._panels({*ARMS, "base"}))
    assert {arm for panel in panels for arm in panel} == {*ARMS}
    assert max(map(len, panels)) == figures.LINES == 6
    # two arms that end at the same reward
    runs = [run_of(arm, seed, 0.5, 0.5) for arm in ("diffu_grpo", "sapo_1", "sapo_3") for seed in (0, 1)]
    for run in runs:
        reward = 0.5 + 0.01 * run["seed"] + 0.2 * (run["arm"] == "sapo_3")
        run |= {"task": "countdown", "curve": [{"forward_units": units, "reward": reward} for units in (10.0, 90.0)]}
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.learning_curves(runs, "countdown", tmp_path / "curves.png")
    (axis,) = drawn[0].axes
    assert [text.get_text() for text in axis.texts] == ["diffu_grpo", "sapo_1", "sapo_3"]
    assert len({line.get_color() for line in axis.lines}) == 3
    drawn[0].canvas.draw()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    assert all(box.x1 <= axis.bbox.x1 for box in boxes)
    figures.accuracy({"all": summarise(runs)}, tmp_path / "accuracy.png")
    assert len(drawn) == 2


def test_arms_differ_in_one_thing():
    """All arms of a family share everything but the selection of steps, SAPO's settings, or the cache."""
    cached = {name: arm for name, arm in ARMS.items() if arm.baselines == ("agrpo_tuned",)}
    for name, arm in cached.items():
        added = {"cache": arm.settings["cache"], "rollout_correction": arm.settings["rollout_correction"]}
        assert arm.settings == ARMS["agrpo_tuned"].settings | added, name
    assert len(cached) == 4
    compared = {name: arm for name, arm in ARMS.items() if arm.baselines != TUNED and name not in cached}
    trajectory = {name: arm for name, arm in compared.items() if arm.method in ("atpo", "agrpo")}
    for name, arm in trajectory.items():
        shared = {k: v for k, v in arm.settings.items() if k not in ("step_selector", "step_draws", "num_mc_samples")}
        assert shared == {
            k: v for k, v in ARMS["uniform"].settings.items() if k not in ("step_selector", "num_mc_samples")
        }, name
        assert arm.settings["num_mc_samples"] == 4 or name in ("roec_cm_k2", "roec_cm_k8")
    for arm in (arm for arm in compared.values() if arm.method == "diffu_grpo"):
        assert arm.settings == ARMS["diffu_grpo"].settings


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.release
def test_a_second_start_does_only_what_is_missing(tmp_path):
    def compare(*arguments: str, fails: bool = False) -> str:
        command = [sys.executable, "recipes/benchmarks/compare_methods.py", "--output_dir", str(tmp_path)]
        command += ["--tasks", "countdown", "--eval_size", "8", "--workers", "1", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
        assert (result.returncode != 0) == fails, (result.stdout + result.stderr)[-3000:]
        return result.stdout + result.stderr

    compare("--arms", "sapo_1", "--seeds", "0", "--budget", "400")
    first = tmp_path / "runs" / "countdown" / "sapo_1" / "0.json"
    run = json.loads(first.read_text())
    assert 400 <= run["forward_units"] < 3000 and run["curve"][-1]["forward_units"] <= run["forward_units"]
    assert set(run["accuracy"]) == {"16", "8", "4"} and 0 <= run["sampled_accuracy"] <= 1
    written = first.stat().st_mtime_ns

    output = compare("--arms", "sapo_1", "uniform_fixed", "--seeds", "0", "--budget", "400")
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "runs" / "countdown" / "uniform_fixed" / "0.json").exists()
    assert "uniform_fixed" in output and "uniform_fixed" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "countdown.png").stat().st_size > 10_000
    assert "made with" in compare("--arms", "sapo_1", "--seeds", "0", "--budget", "800", fails=True)
