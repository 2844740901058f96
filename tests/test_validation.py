"""Checks of single settings: messages name the setting, what was given and what is possible."""

from __future__ import annotations

import pytest

from trl_diffusion.validation import at_least, one_of


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("max_prb", "unmasking must be one of max_prob, margin, entropy; got 'max_prb'. Did you mean 'max_prob'?"),
        ("left", "unmasking must be one of max_prob, margin, entropy; got 'left'."),
        (None, "unmasking must be one of max_prob, margin, entropy; got None."),
        (3, "unmasking must be one of max_prob, margin, entropy; got 3."),
    ],
)
def test_another_value_is_refused_with_the_choices(value, message):
    choices = {"max_prob": 1, "margin": 2, "entropy": 3}  # a table of functions is a list of choices too
    with pytest.raises(ValueError) as error:
        one_of("unmasking", value, choices)
    assert str(error.value) == message
    for choice in choices:
        one_of("unmasking", choice, choices)


def test_a_number_that_is_too_small_is_refused():
    at_least("views", 1, 1)
    at_least("rate", float("inf"), 0)
    with pytest.raises(ValueError, match=r"^views must be at least 1, got 0\.$"):
        at_least("views", 0, 1)
    with pytest.raises(ValueError, match=r"^rate must be at least 0, got nan\.$"):
        at_least("rate", float("nan"), 0)
