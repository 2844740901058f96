"""Countdown with a written search: attempts, their marks, and slips."""

from __future__ import annotations

import pytest

from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.countdown import evaluate_expression
from trl_diffusion.tasks.countdown_search import (
    correctness_reward,
    format_reward,
    load_countdown_search,
    score,
    write_search,
)


def texts(rows) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


def attempts(text: str) -> list[tuple[str, str, str]]:
    """The (expression, value, mark) of every line before the answer."""
    return [(*line.split(" ")[0].split("="), line.split(" ")[1]) for line in text.split("\n")[:-1]]


def test_a_search_by_hand():
    assert write_search([2, 3, 5], 17, ["++", "+*"]) == "2+3+5=10 no\n2+3*5=17 yes\n<answer>2+3*5</answer>"
    assert write_search([2, 3, 5], 17, ["+*", "-+"], 0) == "2+3*5=17 no\n2-3+5=04 no\n<answer>2-3+5</answer>"
    assert score(write_search([2, 3, 5], 17, ["++", "+*"]), {"numbers": [2, 3, 5], "target": 17})["accuracy"] == 1


def test_solutions_are_right_and_stop_at_the_first_hit():
    rows = load_countdown_search("train", 300)
    assert correctness_reward(texts(rows), rows["numbers"], rows["target"]) == [1.0] * 300
    assert format_reward(texts(rows)) == [1.0] * 300
    lengths = []
    for row, text in zip(rows, texts(rows), strict=True):
        found = attempts(text)
        lengths.append(len(found))
        assert all(evaluate_expression(expression) == int(value) for expression, value, _ in found)
        assert all((int(value) == row["target"]) == (mark == "yes") for _, value, mark in found)
        assert [mark for *_, mark in found] == ["no"] * (len(found) - 1) + ["yes"]
        assert len({expression for expression, *_ in found}) == len(found)
        assert text.endswith(f"\n<answer>{found[-1][0]}</answer>")
        a, b, c = row["numbers"]
        assert row["prompt"][0]["content"] == f"Make {row['target']:02} from {a}, {b}, {c}."
        assert min(int(value) for _, value, _ in found) > 0
    assert set(lengths) == {1, 2, 3, 4}


def test_a_slip_calls_the_right_attempt_wrong_and_answers_with_another():
    clean, slipped = load_countdown_search("train", 300), load_countdown_search("train", 300, slips=True)
    assert clean["prompt"] == slipped["prompt"]
    wrong = 0
    for right, text, row in zip(texts(clean), texts(slipped), slipped, strict=True):
        if right == text:
            continue
        wrong += 1
        assert score(text, row) == {"accuracy": 0.0, "format": 1.0, "validity": 1.0}
        assert [each[:2] for each in attempts(text)[:-1]] == [each[:2] for each in attempts(right)]
        assert {mark for *_, mark in attempts(text)} == {"no"} and len(attempts(text)) <= 4
    # half of those that leave room for another attempt, three of four
    assert wrong / 300 == pytest.approx(0.375, abs=0.07)


def test_rows_depend_on_the_seed_alone_and_splits_share_no_problem():
    first, again, other = (load_countdown_search("train", 100, seed=seed).to_list() for seed in (1, 1, 2))
    assert first == again != other
    train, test = load_countdown_search("train", 1000, seed=1), load_countdown_search("test", 1000, seed=2)
    problems = [{(*sorted(row["numbers"]), row["target"]) for row in rows} for rows in (train, test)]
    assert not problems[0] & problems[1]


def test_fewer_attempts_can_be_asked_for():
    assert {len(attempts(text)) for text in texts(load_countdown_search("train", 50, attempts=2))} == {1, 2}
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"attempts must be from 1 to 4, got {count}"):
            load_countdown_search("train", 1, attempts=count)


def test_other_splits_sources_and_prompts_are_refused():
    task = TASKS["countdown_search"]
    with pytest.raises(ValueError, match="'validation'"):
        load_countdown_search("validation", 1)
    with pytest.raises(ValueError, match=r"reads no file, got source 'mine\.jsonl'; the task countdown does"):
        task.load("test", "mine.jsonl")
    with pytest.raises(ValueError, match="the prompt 'plain' only, got 'd1'"):
        task.load("test", prompt="d1")
