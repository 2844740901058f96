"""Answers as networks write them: the right ones are right, and nothing else is."""

from __future__ import annotations

import pytest
from answer_cases import CASES, Case

from trl_diffusion.tasks import countdown, gsm8k, math500


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.gold}-{case.text!r}")
def test_answers_are_read_as_they_are_meant(case: Case):
    assert case.score == case.right


def test_rewards_read_what_scores_read():
    for task, reward in (("gsm8k", gsm8k.correctness_reward), ("math500", math500.correctness_reward)):
        cases = [case for case in CASES if case.task == task]
        assert reward([case.text for case in cases], [case.gold for case in cases]) == [case.right for case in cases]
    cases = [case for case in CASES if case.task == "countdown"]
    numbers, targets = zip(*(case.gold for case in cases), strict=True)
    rewards = countdown.correctness_reward([case.text for case in cases], list(numbers), list(targets))
    assert rewards == [case.right for case in cases]
