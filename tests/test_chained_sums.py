"""Chained sums: what they hold, and what masked SFT does not score."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from transformers import AutoTokenizer

from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.chained_sums import FIXED_LINES, HARD_LINES, LINES, SLIP_RATES, load_chained_sums
from trl_diffusion.trainers.base.sft_data import make_collator, tokenize_dataset

LINE = re.compile(r"(\d)\+(\d)=(\d)")


def lines_of(row) -> list[tuple[int, ...]]:
    *lines, last = row["completion"][0]["content"].split("\n")
    found = [tuple(map(int, LINE.fullmatch(line).groups())) for line in lines]
    assert last == f"#### {found[-1][2]}" and len(found) == LINES
    return found


@pytest.mark.parametrize("layout", ["moving", "fixed"])
def test_solutions_are_right_and_every_line_continues_the_one_before(layout):
    for row in load_chained_sums("train", 200, layout=layout):
        numbers = list(map(int, re.findall(r"\d", row["prompt"][0]["content"].removesuffix(" mod 10."))))
        lines = lines_of(row)
        assert [lines[0][0], *(number for _, number, _ in lines)] == numbers
        assert all((left + number) % 10 == result for left, number, result in lines)
        assert all(after[0] == before[2] for before, after in itertools.pairwise(lines))
        assert row["answer"] == str(sum(numbers) % 10) and row["unscored"] == []
        assert [at for at, (_, number, _) in enumerate(lines) if number in SLIP_RATES] == row["hard_lines"]
        assert len(row["hard_lines"]) == HARD_LINES
        assert TASKS["chained_sums"].is_correct(row["completion"][0]["content"], row)


def test_layouts():
    fixed, moving = (load_chained_sums("train", 300, layout=layout)["hard_lines"] for layout in ("fixed", "moving"))
    assert {tuple(lines) for lines in fixed} == {FIXED_LINES}
    places = torch.tensor(moving).flatten().bincount(minlength=LINES) / 300
    assert (places - HARD_LINES / LINES).abs().max() < 0.1  # six standard deviations are 0.17


def test_slips_are_one_too_large_on_lines_with_large_numbers_and_carried_on():
    rows = load_chained_sums("train", 2000, slips=True)
    plain = load_chained_sums("train", 2000)
    assert rows["prompt"] == plain["prompt"] and rows["answer"] == plain["answer"]
    slipped = {number: [] for number in range(1, 10)}
    for row in rows:
        lines = lines_of(row)
        assert all(after[0] == before[2] for before, after in itertools.pairwise(lines))
        errors = [(result - left - number) % 10 for left, number, result in lines]
        for (_, number, _), error in zip(lines, errors, strict=True):
            assert error in (0, 1)
            slipped[number].append(error)
        # at most three slips of one cannot make up for each other
        assert TASKS["chained_sums"].is_correct(row["completion"][0]["content"], row) == (not any(errors))
    for number, found in slipped.items():
        assert abs(sum(found) / len(found) - SLIP_RATES.get(number, 0.0)) < 0.05  # about four standard deviations


def test_splits_are_disjoint_whatever_the_seed():
    prompts = [
        {row[0]["content"] for row in load_chained_sums(split, 400, seed)["prompt"]}
        for split, seed in (("train", 0), ("train", 1), ("test", 0))
    ]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layout": "mixed"}, "layout must be one of moving, fixed, got 'mixed'"),
        ({"split": "dev"}, "dev"),
        ({"restart_share": 1.5}, "restart_share must lie in [0, 1], got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_chained_sums(**arguments)


@pytest.mark.parametrize("name", ["chained_sums", "chained_sums_fixed"])
def test_tasks_refuse_what_they_have_not(name):
    with pytest.raises(ValueError, match=r"reads no file, got source 'rows\.jsonl'"):
        TASKS[name].load("test", "rows.jsonl")
    with pytest.raises(ValueError, match="'plain' only, got 'd1'"):
        TASKS[name].load("test", prompt="d1")
    (row,) = TASKS[name].load("test", limit=1)
    assert (tuple(row["hard_lines"]) == FIXED_LINES) or name == "chained_sums"


def test_lines_that_begin_anew_are_right_and_their_begin_is_not_scored():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    rows = load_chained_sums("train", 300, restart_share=0.3)
    tokens = tokenize_dataset(rows, tokenizer, tiny_model().family, 64)
    begun = 0
    for row, encoded in zip(rows, tokens, strict=True):
        lines, text = lines_of(row), row["completion"][0]["content"]
        assert all((left + number) % 10 == result for left, number, result in lines)
        starts = {text[:start].count("\n"): text[start:end] for start, end in row["unscored"]}
        for line, (before, after) in enumerate(itertools.pairwise(lines), 1):
            assert after[0] == (int(starts[line]) if line in starts else before[2])
        shown = [tokenizer.decode(encoded["completion_ids"][at]) for at in encoded["shown"]]
        assert shown == list(starts.values())
        begun += len(shown)
    assert abs(begun / (300 * (LINES - 1)) - 0.3) < 0.05  # five standard deviations
    everywhere = load_chained_sums("train", 20, restart_share=1.0)
    assert all(len(row["unscored"]) == LINES - 1 for row in everywhere)
    assert everywhere["prompt"] == load_chained_sums("train", 20)["prompt"]


def test_the_collator_says_what_is_scored():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    rows = Dataset.from_list(
        [
            {"prompt": "a", "completion": "1+2=4", "unscored": [[4, 5]]},
            {"prompt": "b", "completion": "1+2=3", "unscored": []},
            {"prompt": "b", "completion": "1+2=3", "unscored": None},
        ]
    )
    family = tiny_model().family
    batch = make_collator(family.tail_token_id, 8)([*tokenize_dataset(rows, tokenizer, family, 8)])
    assert batch["scored"].tolist() == [[True] * 4 + [False] + [True] * 3, [True] * 8, [True] * 8]


@pytest.mark.parametrize("span", [[0, 0], [3, 2], [-1, 2], [4, 6], [1]])
def test_spans_outside_the_text_are_refused(span):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    rows = Dataset.from_list(
        [
            {"prompt": "a", "completion": "1+2=3", "unscored": [[0, 1]]},
            {"prompt": "a", "completion": "1+2=4", "unscored": [span]},
        ]
    )
    with pytest.raises(ValueError, match=r"Row 1 has \[.*in `unscored`, which is no span of its completion of 5"):
        tokenize_dataset(rows, tokenizer, tiny_model().family, 8)
