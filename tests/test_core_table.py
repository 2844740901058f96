"""The core table: which runs it asks for, what it writes, and how its results are added to the stored ones."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

import claims  # noqa: E402
import core_table  # noqa: E402
from comparison import run as runs_of_jobs  # noqa: E402
from comparison.arms_table import arms_table  # noqa: E402
from comparison.claims import CLAIMS  # noqa: E402
from comparison.core import CORE, TUNING_SEEDS  # noqa: E402
from comparison.run import Job, Length, run_all  # noqa: E402

# Both arms of a pair, already tuned: the best rate has neighbours, so nothing is measured for it.
RATES = {
    f"{rate:g}": dict.fromkeys(map(str, TUNING_SEEDS), value) for rate, value in ((1e-4, 1), (3e-4, 9), (6e-4, 2))
}
TUNED = {"chained_sums": {"agrpo": RATES, "diffu_grpo": RATES}}


def result(job: Job, length: Length, sampled: float) -> dict:
    """Make the result of a run without training."""
    greedy = dict.fromkeys(("27", "36", "18", "9"), sampled)
    found = {"task": job.task, "arm": job.arm, "seed": job.seed, "learning_rate": job.learning_rate}
    found |= {"accuracy": greedy, "sampled_accuracy": sampled, "curve": [{"forward_units": 10.0, "reward": sampled}]}
    return found | asdict(length) | {"parallel": {"accuracy": sampled, "steps": 9.0}}


@pytest.fixture
def table(tmp_path, monkeypatch) -> Callable[..., list[Job]]:
    """Runs `core_table.py` with arguments; the runs take no time, and those that were done are returned."""

    def table(accuracy: Callable[[Job], float], *arguments: str, tuned: dict | None = TUNED) -> list[Job]:
        done = []

        def all_at_once(jobs, length, workers):
            for job in jobs:
                if not runs_of_jobs._finished(job, length):
                    runs_of_jobs._write(job.path, result(job, length, accuracy(job)))
                    done.append(job)
            return [json.loads(job.path.read_text()) for job in jobs]

        (tmp_path / "rates.json").write_text(json.dumps(tuned))
        command = ["core_table.py", "--tasks", "chained_sums", "--arms", "diffu_grpo"]
        command += ["--learning_rates", str(tmp_path / "rates.json"), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        monkeypatch.setattr(core_table, "run_all", all_at_once)
        core_table.main()
        return done

    return table


def stored(folder: Path) -> list[dict]:
    return json.loads((folder / "out" / "core_table.json").read_text())


def of_seeds(jobs: list[Job], arm: str) -> list[int]:
    return [job.seed for job in jobs if job.arm == arm and not job.tuning]


def apart(job: Job) -> float:
    """AGRPO is 20 points better than diffu-GRPO, with every seed."""
    return (0.5 if job.arm == "agrpo" else 0.3) + 0.01 * job.seed


def alike(job: Job) -> float:
    """Two arms that differ by 10 points, to this side or that."""
    return 0.5 + (0.05 if (job.arm == "agrpo") == bool(job.seed % 2) else -0.05)


def test_a_decided_pair_has_the_seeds_that_are_asked_for(table, tmp_path):
    done = table(apart, "--seeds", "4")
    assert of_seeds(done, "agrpo") == of_seeds(done, "diffu_grpo") == [0, 1, 2, 3]  # with its baseline
    assert {job.learning_rate for job in done} == {None, 3e-4} and of_seeds(done, "base") == [0]
    assert len(stored(tmp_path)) == 9 and all("curve" not in run for run in stored(tmp_path))
    assert "20.0" in (tmp_path / "out" / "results.md").read_text()
    assert table(apart, "--seeds", "4") == []


def test_an_undecided_pair_gets_ten_more_until_the_most(table):
    done = table(alike, "--seeds", "4", "--most_seeds", "20")
    assert of_seeds(done, "agrpo") == of_seeds(done, "diffu_grpo") == [*range(20)]  # 4, 14, and then the most


def test_arms_without_a_rate_are_tuned(table, tmp_path):
    """The best of three is the highest, so the next one is tried; seeds of tuning are not used again."""
    done = table(lambda job: 0.2 + 100 * job.learning_rate if job.learning_rate else 0.2, "--seeds", "2", tuned={})
    tried = [job.learning_rate for job in done if job.tuning and job.arm == "agrpo"]
    assert sorted(tried) == sorted([1e-4, 3e-4, 6e-4, 1e-3] * 3)
    assert {job.learning_rate for job in done if not job.tuning} == {None, 1e-3}
    assert {job.seed for job in done if job.tuning} == {*TUNING_SEEDS}
    rates = json.loads((tmp_path / "out" / "learning_rates.json").read_text())["chained_sums"]["agrpo"]
    assert rates.keys() == {"0.0001", "0.0003", "0.0006", "0.001"}


def test_stored_runs_are_taken_if_they_are_of_this_length_and_rate(table, tmp_path):
    def run(arm: str, seed: int, rate: float, length: Length) -> dict:
        return result(Job("chained_sums", arm, seed, rate, tmp_path), length, 0.5)

    known = [run("agrpo", 0, 3e-4, Length()), run("agrpo", 1, 6e-4, Length()), run("agrpo", 2, 3e-4, Length(500))]
    (tmp_path / "stored.json").write_text(json.dumps(known))
    done = table(apart, "--seeds", "3", "--stored", str(tmp_path / "stored.json"))
    assert of_seeds(done, "agrpo") == [1, 2]


def test_runs_of_another_length_are_not_mixed_in(table, tmp_path):
    table(apart, "--seeds", "2", "--budget", "500")
    with pytest.raises(SystemExit, match=r"'budget': 500.0.*Choose another --output_dir or delete it"):
        table(apart, "--seeds", "2")
    for path in (tmp_path / "out" / "runs").glob("*/*/0.json"):
        path.unlink()
    table(apart, "--seeds", "1", "--most_seeds", "1")
    assert {run["budget"] for run in stored(tmp_path)} == {16_000}  # seed 1 of the folder is of the other length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "agrpo_curriculum"], "agrpo_curriculum: trained in the order of difficulty; .* chained_sums have"),
        (["--learning_rates", "rates.jsn"], "rates.jsn is no file; without the option, the learning rates are those"),
        (["--stored", "elsewhere.json"], "elsewhere.json is no file"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(table, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        table(apart, *arguments)
    assert not (tmp_path / "out").exists()
    _, error = capsys.readouterr()
    assert re.search(message, " ".join(error.split()))


def test_a_run_that_fails_ends_the_others_and_loses_none_that_is_done(tmp_path, monkeypatch):
    def train_and_evaluate(job, length):
        if job.seed == 1:
            raise ValueError("no such column")
        time.sleep(0.05)
        return {"task": job.task, "arm": job.arm, "sampled_accuracy": 0.5}

    monkeypatch.setattr(runs_of_jobs, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(runs_of_jobs, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    jobs = [Job("chained_sums", "agrpo", seed, 1e-4, tmp_path) for seed in range(400)]
    with pytest.raises(ValueError, match="no such column"):
        run_all(jobs, Length(), 1)
    done = {path.name for path in tmp_path.iterdir()}
    assert "0.json" in done and len(done) < 399


# ---------------------------------------------------------------- adding to the stored results


def compact_run(task: str, arm: str, seed: int, rate: float = 3e-4, **more: float) -> dict:
    found = {"task": task, "arm": arm, "seed": seed, "learning_rate": rate, "area": 1.0, "sampled_accuracy": 0.5}
    return found | asdict(Length()) | more


def test_a_core_table_is_added_to_the_stored_results(tmp_path):
    results, folder = tmp_path / "results", tmp_path / "folder"
    known = [
        compact_run("sudoku_sweeps", "agrpo", 0),
        *(compact_run("chained_sums", "agrpo", seed) for seed in (0, 1)),
    ]
    known += [compact_run("chained_sums", "espo", seed, 1e-4) for seed in (0, 1)]
    new = [compact_run("chained_sums", "agrpo", seed, sampled_accuracy=0.7) for seed in (1, 2)]
    new += [compact_run("chained_sums", "espo", 0, 6e-4)]
    rates = {"chained_sums": {"espo": {"0.0001": {"100": 3.0}}}}, {"chained_sums": {"espo": {"0.0006": {"100": 9.0}}}}
    for where, runs, measured in zip((results, folder), (known, new), rates, strict=True):
        where.mkdir()
        (where / "core_table.json").write_text(json.dumps(runs))
        (where / "learning_rates.json").write_text(json.dumps(measured))
    claims.take(folder, results)
    runs = json.loads((results / "core_table.json").read_text())
    found = {(run["task"], run["arm"], run["seed"]): (run["learning_rate"], run["sampled_accuracy"]) for run in runs}
    assert found == {
        ("chained_sums", "agrpo", 0): (3e-4, 0.5),
        ("chained_sums", "agrpo", 1): (3e-4, 0.7),  # the newer one
        ("chained_sums", "agrpo", 2): (3e-4, 0.7),
        ("chained_sums", "espo", 0): (6e-4, 0.5),  # seed 1 was at a rate that is no longer chosen
        ("sudoku_sweeps", "agrpo", 0): (3e-4, 0.5),
    }
    measured = json.loads((results / "learning_rates.json").read_text())
    assert measured == {"chained_sums": {"espo": {"0.0001": {"100": 3.0}, "0.0006": {"100": 9.0}}}}


def test_runs_of_another_length_are_not_added():
    with pytest.raises(SystemExit, match="different budget"):
        claims.with_taken(
            [compact_run("chained_sums", "agrpo", 0)], [compact_run("chained_sums", "agrpo", 1, budget=9)]
        )


# ---------------------------------------------------------------- what the arms of a claim differ in


def test_claims_about_one_choice_compare_arms_that_differ_in_it_alone():
    _, lines = arms_table()
    differences = {line[0].strip("`"): line[3] for line in lines}
    assert differences["agrpo_sum"] == "step_reduction sum (mean), loss_type dr_grpo (grpo)"
    assert differences["tracerl"] == "num_iterations 2 (4), shrink 4, epsilon 0.2 (0.5), beta 0.01 (0.04)"
    assert differences["sapo_3"] == "process rewards, N 3 (0)"
    for claim in CLAIMS:
        one, other = CORE[claim.arm], CORE[claim.baseline]
        if claim.compares_methods:
            assert one.method != other.method
        else:
            stated = {**one.settings, **other.settings}
            differing = [name for name in stated if one.settings.get(name) != other.settings.get(name)]
            assert len(differing) + (one.step_aware != other.step_aware) == 1, claim.text
