"""Prompts of uneven length: which are padded together, and that it changes nothing but the cost."""

from __future__ import annotations

import random

import pytest
import torch
from test_sampling import network
from tiny import coded_prompts, forwards_of, tiny_sdar

from trl_diffusion.sampling import SamplingConfig, row_generators, sample
from trl_diffusion.sampling import batching as buckets
from trl_diffusion.sampling.cost import prompt_share


def cost(parts: list[list[int]], lengths: list[int], canvas: int, each: int) -> int:
    return sum(len(part) * (max(lengths[row] for row in part) + canvas) + each for part in parts)


def partitions(rows: list[int]):
    """Every way to cut a list into runs."""
    for cuts in range(2 ** (len(rows) - 1)):
        parts = [[rows[0]]]
        for place, row in enumerate(rows[1:]):
            if cuts >> place & 1:
                parts.append([])
            parts[-1].append(row)
        yield parts


@pytest.mark.parametrize("seed", range(10))
def test_no_other_partition_by_length_is_cheaper(seed):
    generator = random.Random(seed)
    lengths = [generator.choice([10, 40, 150, 400, 401, 900]) for _ in range(generator.randint(1, 9))]
    chosen = buckets.prompt_buckets(lengths, 64)
    assert sorted(row for part in chosen for row in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in chosen)
    by_length = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    assert cost(chosen, lengths, 64, 256) == min(cost(parts, lengths, 64, 256) for parts in partitions(by_length))


def test_small_differences_are_not_worth_a_pass():
    assert buckets.prompt_buckets([100, 90, 95, 100], 256) == [[0, 1, 2, 3]]
    assert buckets.prompt_buckets([100, 900, 95, 900], 256) == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("cache", "refresh", "apart"),
    [("none", 0, True), ("prefix", 0, False), ("dual", 1, True), ("dual", 0, False)],
)
def test_prompts_that_are_seldom_computed_are_not_worth_a_pass(cache, refresh, apart):
    config = SamplingConfig(256, 128, 32, cache=cache, cache_refresh=refresh)
    share = prompt_share(config, network().family)
    assert share == {"none": 1.0}.get(cache, 1.0 if refresh else 1 / 16)
    lengths = [100, 900, 95, 900]
    assert (len(buckets.prompt_buckets(lengths, 256, share)) > 1) == apart


def test_prompts_behind_the_block_cache_are_computed_once():
    config = SamplingConfig(256, 128, 4)
    assert prompt_share(config, tiny_sdar().family) == 1 / 129
    assert buckets.prompt_buckets([100, 900, 95, 900], 256, 1 / 129) == [[0, 1, 2, 3]]


def test_completions_are_those_of_one_padded_batch(monkeypatch):
    model, config, rows = network(), SamplingConfig(12, 6, 4, 1.3, top_k=3, record_signals=True), 12
    prompts, mask = coded_prompts(rows)

    def run():
        with forwards_of(model) as calls:
            return sample(model, prompts, mask, config, row_generators(0, rows=range(rows))), calls

    together, padded = run()
    monkeypatch.setattr(buckets, "_FORWARD_TOKENS", 0)
    apart, trimmed = run()
    for name, value in vars(together).items():
        if isinstance(value, torch.Tensor) and name != "prompt_columns":
            torch.testing.assert_close(getattr(apart, name), value, rtol=1e-4, atol=1e-5, msg=name)
    assert together.prompt_columns.unique().tolist() == [8] and apart.prompt_columns.unique().tolist() == [5, 6, 7, 8]
    masks = [[call["attention_mask"] for call in calls] for calls in (padded, trimmed)]  # None where nothing is hidden
    assert any(mask is not None and (mask[:, :8] == 0).any() for mask in masks[0])
    assert not any(mask is not None and (mask[:, :5] == 0).any() for mask in masks[1])
    assert {call["input_ids"].size(1) for call in trimmed} == {17, 18, 19, 20}
    assert apart.forwards == len(trimmed) > together.forwards == len(padded)


def test_columns_that_are_padding_in_every_row_are_cut():
    model, config = network(), SamplingConfig(8, 4, 4)
    prompts, mask = coded_prompts(4)
    wide = torch.nn.functional.pad(prompts, (5, 0)), torch.nn.functional.pad(mask, (5, 0))
    with forwards_of(model) as calls:
        trajectory = sample(model, *wide, config, row_generators(0, rows=range(4)))
    assert {call["input_ids"].size(1) for call in calls} == {16}
    narrow = sample(model, prompts, mask, config, row_generators(0, rows=range(4)))
    assert torch.equal(trajectory.completion_ids, narrow.completion_ids)
