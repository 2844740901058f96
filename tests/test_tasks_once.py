"""A task is one file and one entry in `TASKS`: everything else takes it from there. Shown with a task made here."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import evaluate
import pytest
from datasets import Dataset, Value

from trl_diffusion.cli import analyze, common, sft, train
from trl_diffusion.evaluation.metrics import metric_path
from trl_diffusion.tasks import TASKS, Task
from trl_diffusion.trainers import METHODS, DiffusionGRPOTrainer

RECIPES = Path(__file__).parent.parent / "recipes"


def generate(split: str, size: int, seed: int = 0, slips: bool = False) -> Dataset:
    """Write a digit again; the digits of the splits differ."""
    digits = [(seed + number) % 5 + 5 * (split == "test") for number in range(size)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Write {digit}."}],
                "digit": str(digit),
                "completion": [{"role": "assistant", "content": str(digit + slips)}],
            }
            for digit in digits
        ]
    )


def load(split, source=None, limit=None, prompt="plain", seed=0) -> Dataset:
    return generate(split, limit or 16, seed)


def score(text: str, row: dict) -> dict[str, float]:
    return {"accuracy": float(row["digit"] in text)}


def right_digit(completions, digit, **kwargs) -> list[float]:
    return [float(given in completion[0]["content"]) for completion, given in zip(completions, digit, strict=True)]


TOY = Task(
    name="toy",
    description="Share of digits written again.",
    load=load,
    score=score,
    rewards=(right_digit,),
    columns={"digit": Value("string")},
    generate=generate,
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", TOY)
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.syspath_prepend(str(RECIPES / "benchmarks"))
    return TOY


def dry_run(monkeypatch, tmp_path, *arguments: str) -> None:
    given = ["train.py", *arguments, "--dry_run", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", given)
    train.main()


def test_it_is_trained_on_with_its_own_rewards(toy, tmp_path, monkeypatch, capsys):
    seen = []
    make = DiffusionGRPOTrainer.__init__

    def spy(self, *args, **settings):
        seen.append(settings)
        make(self, *args, **settings)

    monkeypatch.setattr(DiffusionGRPOTrainer, "__init__", spy)
    dry_run(monkeypatch, tmp_path, "--task", "toy", "--method", "diffu_grpo", "--dataset_size", "40", "--seed", "2")
    assert "forward units" in capsys.readouterr().out
    (settings,) = seen
    assert settings["reward_funcs"] == [right_digit] and settings["args"].reward_weights == [1.0]
    assert settings["train_dataset"].to_list() == generate("train", 40, 2).to_list()
    dry_run(monkeypatch, tmp_path, "--task", "toy", "--method", "diffu_grpo", "--num_rollouts", "2")
    (reward,) = seen[-1]["reward_funcs"]
    assert (reward.reward, reward.num_rollouts, reward.success_threshold) == (right_digit, 2, 1.0)


def test_it_is_evaluated_analysed_compared_and_learnt(toy):
    assert sft.SFTArguments(dataset_path="toy=embedded").task == "toy"
    rows, held_out = sft.load(sft.SFTArguments(dataset_path="toy", dataset_size=9, eval_size=3))
    assert (len(rows), held_out["digit"]) == (9, ["5", "6", "7"])

    assert analyze.held_out("toy", 3, 1)["digit"] == ["6", "7", "8"]
    assert TASKS["toy"].is_correct("I write 6.", {"digit": "6"}) and not TASKS["toy"].is_correct("7", {"digit": "6"})

    make = import_module("make_embedded")
    args = make.EmbeddedArguments(tasks=["toy=6", "countdown=4"])
    assert make.sizes(args) == {"toy": 6, "countdown": 4} and len(make.make_dataset(args, slips=True)) == 10
    with pytest.raises(ValueError, match="'gsm8k' is no task with a generator; there are countdown, "):
        make.generator("gsm8k")

    run = import_module("comparison.run")
    assert run.generated(TASKS["toy"], "train", 2, 0)["digit"] == ["0", "1"]


def test_it_has_a_metric(toy):
    metric = evaluate.load(metric_path("toy"), "toy")
    result = metric.compute(predictions=["7", "8", "9", "5"], references=[{"digit": "7"}] * 4)
    assert result["accuracy"] == 0.25 and result["total"] == 4


def test_the_data_name_the_task_or_belong_to_it(toy):
    arguments = train.TrainArguments
    assert arguments(task="toy").data() == (toy, None)
    assert arguments(task="gsm8k", dataset_path="word_problems").data() == (TASKS["word_problems"], None)
    assert arguments(dataset_path="rows.jsonl").data() == (TASKS["gsm8k"], "rows.jsonl")
    assert arguments(dataset_path="countdown=rows.jsonl").data() == (TASKS["countdown"], "rows.jsonl")
    with pytest.raises(ValueError, match="problems of the task word_problems, but --task is toy"):
        arguments(task="toy", dataset_path="word_problems").data()


def test_every_task_and_method_has_a_config_of_the_bundled_model():
    for method in METHODS:
        for task in (None, *TASKS):
            for num_rollouts in (0, 3):
                file, adapted = train.bundled_config(task, method, num_rollouts)
                assert (common.CONFIGS / file).is_file()
                as_it_is = task in (None, "gsm8k", "word_problems") or (task, method) == ("chained_sums", "atpo")
                assert bool(adapted) != as_it_is
    assert train.bundled_config("countdown", "diffu_grpo", 3) == (
        "embedded/countdown_sapo.yaml",
        ["--num_rollouts", "3"],
    )
    assert "sudoku=embedded" in train.bundled_config("sudoku", "espo")[1]


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_on_every_generated_task(method, tmp_path, monkeypatch, capsys):
    for task in ("countdown", "sudoku"):
        dry_run(monkeypatch, tmp_path, "--task", task, "--method", method, "--dataset_size", "64")
        assert capsys.readouterr().out.count("forward units") == 1


@pytest.mark.parametrize("name", TASKS)
def test_the_first_reward_is_one_for_right_completions_alone(name):
    """Success is read from it."""
    task = TASKS[name]
    if task.generate is None:
        rows = [{"answer": "12"}] * 3
        texts = ["\\boxed{12}", "\\boxed{13}", ""]
    else:
        rows = task.generate("train", 60, slips=True).to_list()
        texts = [row["completion"][0]["content"] for row in rows]
    columns = {column: [row[column] for row in rows] for column in task.columns}
    rewards = task.rewards[0](completions=texts, **columns)
    correct = [task.is_correct(text, row) for text, row in zip(texts, rows, strict=True)]
    assert [reward == 1.0 for reward in rewards] == correct and {*correct} == {True, False}
