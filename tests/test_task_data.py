"""Data sets, prompts, rewards and metrics of the tasks."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from trl_diffusion.evaluation import wilson_interval
from trl_diffusion.evaluation.metrics import metric_path
from trl_diffusion.evaluation.metrics.task_metric import summarize
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.tasks import (
    TASKS,
    countdown,
    gsm8k,
    math500,
    rows,
    sudoku,
    word_problems,
)
from trl_diffusion.tasks import d1_prompts as prompts
from trl_diffusion.tasks.split import held_out

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"public data files are not at {DATA}")
SUDOKU = ("0234341221434320", "1234341221434321")


def write_lines(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_tasks_have_their_names_and_headlines():
    headlines = {name: next(iter(task.score("", sample(name)))) for name, task in TASKS.items()}
    assert headlines == {
        "gsm8k": "accuracy",
        "math500": "accuracy",
        "countdown": "accuracy",
        "sudoku": "puzzles_solved",
        "word_problems": "accuracy",
        "chained_sums": "accuracy",
        "chained_sums_fixed": "accuracy",
        "sudoku_sweeps": "puzzles_solved",
        "countdown_search": "accuracy",
    }


def sample(task: str) -> dict:
    if task in ("countdown", "countdown_search"):
        return {"numbers": [2, 3, 5], "target": 16}
    if task in ("sudoku", "sudoku_sweeps"):
        return {"puzzle": SUDOKU[0], "solution": SUDOKU[1]}
    return {"answer": "12"}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.embedded])
def test_embedded_data_is_offline_and_its_solutions_score_one(name):
    task = TASKS[name]
    data = task.load("test", "embedded", limit=40)
    assert len(data) == 40 and [message["role"] for message in data[0]["prompt"]] == ["user"]
    for row in data:
        assert set(task.score(row["completion"][0]["content"], row).values()) == {1.0}
        assert set(task.score("", row).values()) == {0.0}
    assert task.load("test", "embedded").num_rows == 256


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.embedded])
def test_tasks_without_a_generator_say_so(name):
    with pytest.raises(ValueError, match="no embedded data"):
        TASKS[name].load("test", "embedded")


@pytest.mark.parametrize("name", TASKS)
def test_unknown_splits_and_prompts_are_refused(name):
    source = "embedded" if TASKS[name].embedded else "missing.jsonl"
    with pytest.raises(ValueError, match="'validation'"):
        TASKS[name].load("validation", source)
    with pytest.raises(ValueError, match="'d2'"):
        TASKS[name].load("test", source, prompt="d2")


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(FileNotFoundError, match=r"No Countdown file at .*rows\.jsonl"):
        countdown.read_countdown(path)
    path.write_text('{"nums": [1, 2, 3], "target": 6}\nnums: 1, 2\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*rows\.jsonl is not JSON .*'nums: 1, 2'"):
        countdown.read_countdown(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* is no JSON object"):
        countdown.read_countdown(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        countdown.read_countdown(path)
    write_lines(path, {"nums": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"needs `nums` and `target`: \['target'\] missing"):
        countdown.read_countdown(path)
    write_lines(path, {"nums": [1, 2, "x"], "target": 3})
    with pytest.raises(ValueError, match="whole numbers, got 'x'"):
        countdown.read_countdown(path)
    write_lines(path, {"problem": "?"})
    with pytest.raises(ValueError, match="without an answer"):
        math500.load_math("test", path)


def test_math_train_holds_no_problem_of_the_test(tmp_path):
    train = write_lines(
        tmp_path / "train.jsonl",
        {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$."},
        {"problem": "Halve one.", "solution": "So $\\boxed{\\frac{1}{2}}$ or \\boxed{0.5}"},
    )
    test = write_lines(tmp_path / "test.jsonl", {"problem": "what  is $1 + 1$?", "answer": "2"})
    (kept,) = math500.load_math("train", train, exclude=test)
    assert (kept["problem"], kept["answer"]) == ("Halve one.", "0.5")
    assert len(math500.load_math("train", train)) == 2
    (row,) = math500.load_math("test", test)
    assert row["answer"] == "2" and row["prompt"] == prompts.user(f"{math500.INSTRUCTION}\n\nwhat  is $1 + 1$?")


def test_math_on_the_hub_is_seven_subjects_without_math_500(monkeypatch):
    asked = []

    def load_dataset(source, name, split):
        asked.append((source, name, split))
        problem = {"problem": f"problem {name}", "solution": "\\boxed{1}"}
        shared = {"problem": "problem algebra", "solution": "\\boxed{1}", "answer": "1"}
        return Dataset.from_list([problem] if name else [shared])

    monkeypatch.setattr(rows, "load_dataset", load_dataset)
    train = math500.load_math("train")
    assert len(train) == 6 and "problem algebra" not in train["problem"]
    assert asked[-1] == ("HuggingFaceH4/MATH-500", None, "test")
    assert {split for _, name, split in asked if name} == {"train"}
    assert math500.load_math("test")["problem"] == ["problem algebra"]


def test_countdown_on_the_hub_is_cut_to_three_numbers_and_256_tests(monkeypatch):
    data = Dataset.from_list([{"nums": [1, n, 3 + n % 7], "target": n + 1} for n in range(3000)])
    data = Dataset.from_list([*data.to_list(), {"nums": [1, 2, 3, 4], "target": 10}])
    monkeypatch.setattr(rows, "load_dataset", lambda source, name, split: data)
    train, test = (countdown.read_countdown(split=split) for split in ("train", "test"))
    assert len(test) == 256 and 2200 < len(train) < 2600
    problems = [{(tuple(sorted(row["numbers"])), row["target"]) for row in split} for split in (train, test)]
    assert not problems[0] & problems[1]
    assert {len(row["numbers"]) for row in train} == {3}


def test_countdown_leaves_out_given_problems(tmp_path):
    known = write_lines(tmp_path / "known.jsonl", {"input": "3,2,1", "output": "6"})
    path = write_lines(tmp_path / "rows.jsonl", {"nums": [1, 2, 3], "target": 6}, {"nums": [1, 2, 3], "target": 5})
    assert countdown.read_countdown(path, exclude=known)["target"] == [5]
    assert len(countdown.read_countdown(path)) == 2


@pytest.mark.slow
def test_sudoku_can_be_split_by_solution():
    train = sudoku.load_sudoku("train", 400, seed=1, disjoint_by="solution")
    test = sudoku.load_sudoku("test", 400, seed=2, disjoint_by="solution")
    assert not set(train["solution"]) & set(test["solution"])
    assert all(held_out(row["puzzle"]) and held_out(row["solution"]) for row in test)
    assert all(sudoku.solve_sudoku(row["puzzle"]) == [row["solution"]] for row in [*train, *test])
    # By puzzle, which the embedded checkpoint was trained with, solutions are shared.
    by_puzzle = [set(sudoku.load_sudoku(split, 400)["solution"]) for split in ("train", "test")]
    assert by_puzzle[0] & by_puzzle[1]
    kept = sudoku.load_sudoku("train", 200, exclude=set(train["solution"]))
    assert not set(kept["solution"]) & set(train["solution"])
    with pytest.raises(ValueError, match="none of the 288 grids"):
        sudoku.load_sudoku("train", 1, exclude=sudoku._grids())
    with pytest.raises(ValueError, match="'row'"):
        sudoku.load_sudoku(disjoint_by="row")


@pytest.mark.parametrize(
    ("load", "digest"),
    [
        (sudoku.load_sudoku, "c6a30bdc1cf97878"),
        (countdown.load_countdown, "b88a3f6cd10ce576"),
        (word_problems.load_word_problems, "e960875dcc1aa462"),
    ],
)
def test_generated_data_stays_what_the_embedded_model_was_trained_on(load, digest):
    data = [load(split, 300, seed=7, slips=True).to_list() for split in ("train", "test")]
    assert hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16] == digest


def test_sudoku_files(tmp_path):
    path = tmp_path / "puzzles.csv"
    path.write_text("Puzzle,Solution\n" + ",".join(SUDOKU) + "\n")
    (row,) = sudoku.read_sudoku(path)
    assert (row["puzzle"], row["solution"]) == SUDOKU
    assert len(sudoku.read_sudoku(path, "train")) + len(sudoku.read_sudoku(path, "test")) == 1
    assert len(sudoku.read_sudoku(path, exclude=[SUDOKU[1]])) == 0
    path.write_text(f"Puzzle,Solution\n{SUDOKU[0].lstrip('0')},{SUDOKU[1]}\n")
    with pytest.raises(ValueError, match="lost leading zeros"):
        sudoku.read_sudoku(path)
    path.write_text(f"Puzzle,Solution\n{SUDOKU[0]},2{SUDOKU[1][1:]}\n")
    with pytest.raises(ValueError, match="a solution that fits"):
        sudoku.read_sudoku(path)
    path.write_text("Puzzle\n1\n")
    with pytest.raises(ValueError, match=r"\['Solution'\] missing"):
        sudoku.read_sudoku(path)


@needs_data
def test_published_files_load_with_every_prompt():
    files = {"gsm8k": "gsm8k_test.jsonl", "countdown": "countdown_cd3_test.jsonl", "sudoku": "sudoku_4x4_test.csv"}
    sizes = {}
    for name, file in files.items():
        for prompt in TASKS[name].prompts:
            data = TASKS[name].load("test", str(DATA / file), prompt=prompt)
            roles = [message["role"] for message in data[0]["prompt"]]
            assert roles == (["user", "assistant"] if prompt == "d1" else ["user"])
            sizes[name] = len(data)
    assert sizes == {"gsm8k": 1319, "countdown": 256, "sudoku": 500}
    assert TASKS["gsm8k"].load("test", str(DATA / "gsm8k_test.jsonl"), limit=3).num_rows == 3
    # Half of what d1 sells as unique has one solution only.
    published = sudoku.read_sudoku(DATA / "sudoku_4x4_test.csv")
    assert sum(len(sudoku.solve_sudoku(puzzle)) == 1 for puzzle in published["puzzle"]) == 376
    assert len(set(published["solution"])) == 229


@needs_data
@pytest.mark.parametrize("task", ["countdown", "sudoku", "gsm8k"])
def test_d1_prompts_end_with_the_question_of_the_published_outputs(task):
    records = rows.read_rows(DATA / f"llada_8b_instruct_{task}_128.jsonl", ("question", "ground_truth"), task)
    for record in records[:100]:
        question, truth = record["question"], record["ground_truth"]
        if task == "countdown":
            prompt = prompts.countdown(*truth, "d1")
        else:
            prompt = prompts.sudoku(question[-17:-1], "d1") if task == "sudoku" else prompts.gsm8k(question, "d1")
        assert prompt[0]["content"].endswith(f"\n\n{question}")
        assert prompt[1] == {"role": "assistant", "content": "<reasoning>"}


def test_a_begun_answer_is_continued_by_the_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    text = tokenizer.apply_chat_template(prompts.gsm8k("Why?", "d1"), tokenize=False, continue_final_message=True)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n<reasoning>")


REWARDS = [
    (gsm8k.correctness_reward, {"answer": ["12", "12", None]}, ["#### 12", "\\boxed{13}", "#### 12"]),
    (math500.correctness_reward, {"answer": ["\\frac12", "2", None]}, ["\\boxed{1/2}", "\\boxed{3}", "\\boxed{2}"]),
    (
        countdown.correctness_reward,
        {"numbers": [[2, 3, 5], [2, 3, 5], None], "target": [16, 16, None]},
        ["<answer>(3+5)*2 = 16</answer>", "<answer>8*2</answer>", "<answer>1</answer>"],
    ),
    (sudoku.solved_reward, {"puzzle": [SUDOKU[0], SUDOKU[0], None]}, [SUDOKU[1], SUDOKU[0], SUDOKU[1]]),
    (sudoku.cells_reward, {"puzzle": [SUDOKU[0], SUDOKU[0], None]}, [SUDOKU[1], SUDOKU[0], SUDOKU[1]]),
]


@pytest.mark.parametrize(("reward", "columns", "texts"), REWARDS)
@pytest.mark.parametrize("messages", [True, False])
def test_rewards_have_trls_form(reward, columns, texts, messages):
    """One float or None per completion, sync, with TRL's other keyword arguments let through."""
    completions = [[{"role": "assistant", "content": text}] for text in texts] if messages else texts
    logged: dict[str, list] = {}
    extra = {"prompts": ["p"] * 3, "completion_ids": [[1]] * 3, "trainer_state": None, "log_metric": print}
    values = reward(completions=completions, log_extra=logged.__setitem__, **columns, **extra)
    assert values == [1.0, 0.0, None]
    assert not inspect.iscoroutinefunction(reward)
    assert all(len(column) == 3 and all(type(value) is str for value in column) for column in logged.values())
    assert reward(completions, **columns) == values
    assert reward([None, [], ""], **columns) == [0.0, 0.0, None]


@pytest.mark.parametrize("task", [gsm8k, math500, countdown, sudoku])
def test_format_rewards(task):
    right = {gsm8k: "so\n#### 5", math500: "\\boxed{x}", countdown: "\\boxed{1+1}", sudoku: SUDOKU[0]}[task]
    assert task.format_reward([right, "nothing", None]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("<answer>(3+5)*2</answer>", (1, 1, 1)),
        ("\\boxed{2 \\times (5 + 3) = 16}", (1, 1, 1)),
        ("<answer>16 = (3+5)*2</answer>", (1, 1, 1)),
        ("<answer>3+5*2</answer>", (0, 1, 1)),
        ("<answer>3+5+3+5</answer>", (0, 1, 0)),
        ("<answer>16</answer>", (0, 1, 0)),
        ("<answer>2/(3-3)</answer>", (0, 1, 0)),
        ("<answer>5/(3-3)*2</answer>", (0, 1, 0)),
        ("<answer>a+b</answer>", (0, 0, 0)),
        # every side of an equation is read: this one states expressions, none of them of the three numbers
        ("<answer>3+5=8*2=16</answer>", (0, 1, 0)),
        ("<answer>3+5=8=8=8=16</answer>", (0, 0, 0)),
        ("(3+5)*2", (0, 0, 0)),
    ],
)
def test_countdown_scores_format_validity_and_correctness(text, scores):
    found = countdown.score(text, {"numbers": [2, 3, 5], "target": 16})
    assert (found["accuracy"], found["format"], found["validity"]) == scores


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("<answer>1234341221434321</answer>", SUDOKU[1]),
        ("<answer>\n1234\n3412\n2143\n4321\n</answer>", SUDOKU[1]),
        ("<answer>| 1 2 | 3 4 |\n| 3 4 | 1 2 |\n---------\n| 2 1 | 4 3 |\n| 4 3 | 2 1 |</answer>", SUDOKU[1]),
        ("[[1,2,3,4],[3,4,1,2],[2,1,4,3],[4,3,2,1]]", SUDOKU[1]),
        ("0234341221434320 is solved by 1234341221434321.", SUDOKU[1]),
        ("1234341221434321 <answer>12343412</answer>", None),
        ("12343412214343211", None),
        ("1234 5678 1234 1234 1234", None),
        ("", None),
    ],
)
def test_grids_are_read_from_common_layouts(text, grid):
    assert sudoku.stated_grid(text) == grid


def test_solved_puzzles_and_right_cells_are_different_scores():
    row = {"puzzle": "0034341221430020", "solution": "1234341221434321"}
    nearly = sudoku.score("1234341221434323", row)
    assert nearly["puzzles_solved"] == 0 and nearly["cells_correct"] == pytest.approx(4 / 5)
    # Any solution counts, not only the published one.
    open_row = {"puzzle": "0" * 16, "solution": "1234341221434321"}
    assert sudoku.score("4321214334121234", open_row)["puzzles_solved"] == 1


METRICS = {
    "gsm8k": (["#### 12", "\\boxed{13}", "12"], "accuracy", [1, 0, 0]),
    "math500": (["\\boxed{12}", "\\boxed{13}", "12"], "accuracy", [1, 0, 0]),
    "word_problems": (["#### 12", "## 12", "#### 13"], "accuracy", [1, 0, 0]),
    "countdown": (["<answer>(3+5)*2</answer>", "<answer>8*2</answer>", "16"], "accuracy", [1, 0, 0]),
    "sudoku": ([SUDOKU[1], SUDOKU[0], "no"], "puzzles_solved", [1, 0, 0]),
    "sudoku_sweeps": ([f"{SUDOKU[0]}\n\n{SUDOKU[1]}", SUDOKU[0], "no"], "puzzles_solved", [1, 0, 0]),
    "countdown_search": (["8*2=16 yes\n<answer>(3+5)*2</answer>", "16 yes", "no"], "accuracy", [1, 0, 0]),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_load_with_evaluate_and_have_wilson_intervals(name):
    evaluate = pytest.importorskip("evaluate")
    texts, headline, right = METRICS[name]
    metric = evaluate.load(metric_path(name))
    result = metric.compute(predictions=texts, references=[sample(name)] * 3)
    low, high = wilson_interval(sum(right), 3)
    assert (result[headline], result[f"{headline}_low"], result[f"{headline}_high"]) == (1 / 3, low, high)
    assert result["total"] == 3
    assert {key.removesuffix("_low") for key in result if key.endswith("_low")} == set(
        TASKS[name].score("", sample(name))
    )
    if TASKS[name].score_d1 is None:
        with pytest.raises(ValueError, match=r"protocols \['own'\], got 'd1'"):
            metric.compute(predictions=texts, references=[sample(name)] * 3, protocol="d1")
    else:
        by_d1 = metric.compute(predictions=texts, references=[sample(name)] * 3, protocol="d1")
        expected = summarize([TASKS[name].score_d1(text, sample(name)) for text in texts])
        assert by_d1 == expected


def test_metrics_refuse_what_they_cannot_score():
    with pytest.raises(ValueError, match="no metric for the task 'chess'"):
        metric_path("chess")
    with pytest.raises(ValueError, match="at least one"):
        summarize([])
