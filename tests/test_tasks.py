"""Tasks: generators, rewards and parsers."""

from __future__ import annotations

import json
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_diffusion.evaluation import wilson_interval
from trl_diffusion.tasks.countdown import (
    check_countdown,
    evaluate_expression,
    load_countdown,
    solve_countdown,
)
from trl_diffusion.tasks.gsm8k import correctness_reward, extract_answer, format_reward, load_gsm8k, same_answer
from trl_diffusion.tasks.sudoku import is_solution, load_sudoku, solve_sudoku, stated_grid
from trl_diffusion.tasks.word_problems import KINDS, load_word_problems, write_solution

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"public data files are not at {DATA}")


@pytest.mark.parametrize("load", [load_word_problems, load_countdown, load_sudoku])
def test_generators_are_seeded_and_their_splits_disjoint(load):
    first, again, other = load("train", 300, seed=1), load("train", 300, seed=1), load("train", 300, seed=2)
    assert first.to_list() == again.to_list() != other.to_list()
    with pytest.raises(ValueError, match="'validation'"):
        load("validation", 1)


@pytest.mark.slow
def test_splits_share_no_question():
    train, test = (load_word_problems(split, 3000, seed=seed) for split, seed in (("train", 1), ("test", 2)))
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in test}


def test_solutions_without_slips_are_right():
    rows = load_word_problems("train", 500)
    assert correctness_reward(rows["completion"], rows["answer"]) == [1.0] * 500
    assert format_reward(rows["completion"]) == [1.0] * 500
    for row in load_countdown("train", 300):
        assert check_countdown(row["completion"][0]["content"], row["numbers"], row["target"])
    for row in load_sudoku("train", 300):
        assert is_solution(row["completion"][0]["content"], row["puzzle"])
        assert solve_sudoku(row["puzzle"]) == [row["solution"]]


@pytest.mark.slow
def test_slips_happen_at_their_rate_and_leave_the_answer_alone():
    clean, slipped = load_word_problems("train", 6000), load_word_problems("train", 6000, slips=True)
    assert clean["answer"] == slipped["answer"]
    rewards = correctness_reward(slipped["completion"], slipped["answer"])
    for index, kind in enumerate(KINDS):
        rates = [reward for reward, row in zip(rewards, slipped["kind"], strict=True) if row == index]
        assert 1 - sum(rates) / len(rates) == pytest.approx(kind.slip_rate, abs=0.06)
    rows = load_countdown("train", 1000, slips=True)
    wrong = [not check_countdown(row["completion"][0]["content"], row["numbers"], row["target"]) for row in rows]
    assert sum(wrong) / 1000 == pytest.approx(0.4, abs=0.06)


def test_slips_by_hand():
    add, *_, two_steps = KINDS
    assert write_solution(add, (7, 5)) == "7 + 5 = 12\n#### 12"
    assert write_solution(add, (7, 5), "next") == "7 + 5 = 13\n#### 13"
    assert write_solution(two_steps, (5, 4, 3)) == "5 + 4 = 9\n9 - 3 = 6\n#### 6"
    assert write_solution(two_steps, (5, 4, 3), "mark") == "5 + 4 = 9\n9 - 3 = 6\n## 6"


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("7 + 5 = 12\n#### 12", "12", True),
        ("#### 12.", "12", True),
        ("#### 12.0", "12", True),
        ("####12", "12", True),
        ("#### $1,234", "1234", True),
        (r"#### \$1,234.50", "1234.5", True),
        (r"#### \boxed{12}", "12", True),
        (r"#### $\boxed{1,000}$.", "1000", True),
        (r"#### \frac{24}{2}", "12", True),
        ("#### 24/2", "12", True),
        ("#### 3*4", "12", True),
        ("#### 12 apples", "12", True),
        ("#### -3", "-3", True),
        ("#### 5\nno:\n#### 12", "12", True),
        ("#### 12\nno:\n#### 5", "12", False),
        ("12", "12", False),
        ("#### ", "12", False),
        ("#### 13", "12", False),
        ("#### 1/0", "12", False),
        ("#### 9^9^9^9^9", "12", False),
        ("#### 99999999999!", "12", False),
        ("#### (", "12", False),
        ("#### twelve", "12", False),
        ("", "12", False),
    ],
)
def test_correctness(text, gold, right):
    assert correctness_reward([text], [gold]) == [float(right)]
    message = [{"role": "assistant", "content": text}]
    assert correctness_reward([message], answer=[gold], prompts=["q"]) == [float(right)]


@pytest.mark.parametrize("empty", [None, "", [], [{"role": "assistant", "content": None}]])
def test_no_completion_earns_nothing(empty):
    assert correctness_reward([empty], ["1"]) == [0.0] == format_reward([empty])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7 + 5 = 12\n#### 12", 1.0),
        ("#### 12\n", 1.0),
        ("#### $1,200.", 1.0),
        ("#### 12\nDone.", 0.0),
        ("#### 12\n#### 12", 0.0),
        ("so #### 12", 0.0),
        ("#### twelve", 0.0),
        ("####", 0.0),
        ("12", 0.0),
    ],
)
def test_format(text, reward):
    assert format_reward([text]) == [reward]


def test_rewards_work_outside_of_the_main_thread():
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.extend(correctness_reward([r"#### \frac{24}{2}"], ["12"])))
    thread.start()
    thread.join()
    assert rewards == [1.0]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(alphabet=st.sampled_from("0123456789+-*/()=.,$%^!\\{} fracsqtboxedx\n#"), max_size=40))
def test_parsers_never_crash(text):
    correctness_reward([text, f"#### {text}"], ["12", "1/3"])
    format_reward([text, f"#### {text}"])
    check_countdown(f"<answer>{text}</answer>", [1, 2, 3], 6)
    stated_grid(text)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(-999, 999), st.integers(-999, 999))
def test_numbers_are_compared_exactly(left, right):
    assert same_answer(str(left), str(right)) == (left == right)
    assert same_answer(f"{left}.0", str(right)) == (left == right)


def test_expressions_are_evaluated_exactly_and_nothing_else_is():
    assert evaluate_expression("3+5*2") == 13
    assert evaluate_expression(" (3 + 5) × 2 ÷ 3") == Fraction(16, 3)
    assert evaluate_expression("-3--5") == 2
    for text in ("", "3+", "(3", "3)", "1/0", "2**3", "3 4", "__import__('os')", "1" * 201, "(" * 150, "-" * 199, "²"):
        assert evaluate_expression(text) is None, text


def test_countdown_counts_its_numbers():
    assert check_countdown("<answer>1</answer> <answer> 3+5 </answer>", [3, 5], 8)
    assert check_countdown("<answer>(3+5)*2</answer>", [2, 3, 5], 16)
    assert not check_countdown("<answer>8*2</answer>", [2, 3, 5], 16)
    assert not check_countdown("<answer>3+5+5+3</answer>", [2, 3, 5], 16)
    assert not check_countdown("(3+5)*2", [2, 3, 5], 16)
    assert evaluate_expression(solve_countdown([2, 3, 5], 13)) == 13
    with pytest.raises(ValueError, match="1000"):
        solve_countdown([1, 2, 3], 1000)


def test_sudoku_grids_are_found_in_text():
    assert stated_grid("so 1234 3412\n2143 4321.") == "1234341221434321"
    assert stated_grid("12343412214343211") is None
    assert stated_grid("1234") is None


def test_gsm8k_from_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"question": "How many?", "answer": "6 + 6 = 12\n#### 1,012"}
    path.write_text(json.dumps(row))
    (loaded,) = load_gsm8k(path)
    assert loaded["answer"] == "1012"
    assert loaded["prompt"][0]["role"] == "user" and loaded["prompt"][0]["content"].endswith("\n\nHow many?")
    assert load_gsm8k(path, instruction="")[0]["prompt"][0]["content"] == "How many?"
    path.write_text(json.dumps({"problem": "?", "answer": "1"}))
    with pytest.raises(ValueError, match=r"columns \['answer', 'problem'\].*\['question'\] missing"):
        load_gsm8k(path)
    path.write_text(json.dumps({"question": "?", "answer": "1"}))
    with pytest.raises(ValueError, match="#### n"):
        load_gsm8k(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_gsm8k("nowhere.jsonl")


@needs_data
def test_every_gsm8k_solution_is_right():
    rows = load_gsm8k(DATA / "gsm8k_train_first1000.jsonl")
    assert len(rows) == 1000
    assert correctness_reward(rows["completion"], rows["answer"]) == [1.0] * 1000
    assert rows[0]["answer"] == "72"
    assert all(extract_answer(f"#### {answer}") == answer for answer in rows["answer"])


@needs_data
def test_published_sudokus_are_solved():
    lines = (DATA / "sudoku_4x4_test.csv").read_text().split()[1:51]
    for line in lines:
        puzzle, solution = line.split(",")
        assert solution in solve_sudoku(puzzle)


def test_wilson_interval():
    low, high = wilson_interval(50, 100)
    assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    for total in range(1, 300):  # exactly, so that an error bar is never negative
        assert wilson_interval(0, total)[0] == 0.0 and wilson_interval(total, total)[1] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)
