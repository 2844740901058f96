"""Informed Masking: confidence shifts against stored canvases, biased subsets by enumeration, and its three hosts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from typing import Any

import pytest
import torch
from methods import method_named
from scipy.stats import chisquare
from test_composition import BASE
from tiny import MASK, canvas_logits, coded_prompts, tiny_model, tiny_sdar
from trainer_helpers import parameters_of, plan_of, rollout_of

from trl_diffusion.likelihood import InformedMasking, MaskedViews, SubsetPairs, TextSubsets
from trl_diffusion.likelihood.informed import filled_shifts, mask_logits
from trl_diffusion.likelihood.plans import opposed_subsets, random_subsets
from trl_diffusion.losses import WeightedLikelihood
from trl_diffusion.sampling import SamplingConfig, row_generators, sample
from trl_diffusion.trainers import ESPOConfig, GDPOConfig, SPGConfig

ROWS, KEPT, REJECTED = 20_000, 1e-3, 1e-6  # p-values, see test_sampling.py

# ------------------------------------------- what the rollout records

PLAIN = SamplingConfig(12, 6, 4, 1.3, unmasking="low_confidence", shift_window=2)
RECORDED: dict[str, SamplingConfig] = {
    "low confidence": PLAIN,
    "random order, one token a step": replace(PLAIN, denoising_steps=12, unmasking="random", shift_window=10),
    "the nearest neighbours": replace(PLAIN, denoising_steps=12, unmasking="entropy", shift_window=1),
    "as many tokens as are certain": replace(
        PLAIN, block_length=12, denoising_steps=12, unmasking="max_prob", confidence_threshold=0.9, shift_window=3
    ),
    "one block": replace(PLAIN, block_length=12, unmasking="margin", shift_window=4),
}


def rolled_out(config: SamplingConfig, model=None, rows: int = 16):
    """Trajectories of prompts of different length, with their prompts."""
    ids, mask = coded_prompts(rows)
    model = tiny_model(seed=3) if model is None else model
    return sample(model, ids, mask, config, row_generators(0, rows=range(rows))), ids, mask, model


@torch.no_grad()
def shifts_by_hand(config: SamplingConfig, trajectory, ids, mask, model, late: int = 0) -> torch.Tensor:
    """m_i from the canvases before and after each step, one row and one step at a time; -1 where none follows."""
    found = torch.full(trajectory.completion_ids.shape, -1.0)
    for row, steps in enumerate(trajectory.unmask_step.tolist()):

        def confidence(step: int, row=row) -> torch.Tensor:
            unmask_step = trajectory.unmask_step[row]
            hidden = (unmask_step >= step) | (unmask_step < 0)
            canvas = trajectory.completion_ids[row].masked_fill(hidden, MASK)
            logits = canvas_logits(model, ids[row : row + 1], mask[row : row + 1], canvas.unsqueeze(0))
            return logits[0].softmax(-1).amax(-1)

        for start in range(0, config.canvas_length, config.block_length):
            block = range(start, start + config.block_length)
            taken = sorted({steps[i] for i in block} - {-1})
            for step, following in pairwise(taken):
                change = (confidence(following + late) - confidence(step)).abs()
                for i in (i for i in block if steps[i] == step):
                    near = [j for j in block if abs(j - i) <= config.shift_window and steps[j] >= following]
                    found[row, i] = sum(change[j].item() for j in near)
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_shifts_are_those_of_the_stored_canvases(name):
    config = RECORDED[name]
    trajectory, *rest = rolled_out(config)
    expected = shifts_by_hand(config, trajectory, *rest)
    torch.testing.assert_close(trajectory.confidence_shift, expected, atol=1e-5, rtol=1e-4)
    assert (expected > 1e-3).sum() > 20 and (expected < 0).any()
    # negative controls: the confidences one step late, and another window
    late = shifts_by_hand(config, trajectory, *rest, late=1)
    assert (late - expected).abs().max() > 1e-2
    wider = replace(config, shift_window=1 if config.shift_window > 1 else 2)
    assert (shifts_by_hand(wider, trajectory, *rest) - expected).abs().max() > 1e-2


def test_with_an_exact_cache_shifts_are_the_same():
    model = tiny_sdar(seed=21)
    config = replace(PLAIN, cache="block")
    cached, plain = (rolled_out(replace(config, cache=name), model)[0] for name in ("block", "none"))
    assert torch.equal(cached.completion_ids, plain.completion_ids)
    torch.testing.assert_close(cached.confidence_shift, plain.confidence_shift, atol=1e-5, rtol=1e-4)
    assert (plain.confidence_shift > 1e-3).any()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_row_is_recorded_alike_in_every_batch(cache):
    """With and without rows that are further, wait, or have another prompt length."""
    config = replace(PLAIN, denoising_steps=12, cache=cache)
    together, ids, mask, model = rolled_out(config)
    for row in (0, 3, 7):
        own = row_generators(0, rows=[row])
        alone = sample(model, ids[row : row + 1], mask[row : row + 1], config, own)
        torch.testing.assert_close(alone.confidence_shift[0], together.confidence_shift[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RECORDED)
def test_recording_changes_no_completion(name):
    config = RECORDED[name]
    recorded, without = (rolled_out(replace(config, shift_window=w))[0] for w in (config.shift_window, None))
    assert without.confidence_shift is None
    assert torch.equal(recorded.completion_ids, without.completion_ids)
    assert torch.equal(recorded.unmask_step, without.unmask_step)
    assert torch.equal(recorded.row_units, without.row_units)
    if config.unmasking != "random":  # where it is, the head runs at other positions
        assert torch.equal(recorded.logps, without.logps)


# ------------------------------------------- logits


def test_filled_shifts_by_hand():
    shift = torch.tensor([[1.0, 3.0, -1.0, 5.0, -1.0, -1.0], [-1.0, 2.0, 4.0, -1.0, -1.0, 0.0], [-1.0] * 6])
    # blocks of two: known, (–, 5), none: the row's mean 3; (–, 2), (4, –), (–, 0); nothing at all
    expected = [[1, 3, 5, 5, 3, 3], [2, 2, 4, 4, 0, 0], [0] * 6]
    assert filled_shifts(shift, 2).tolist() == expected
    # one block of six: the row's mean
    assert filled_shifts(shift, 6).tolist() == [[1, 3, 3, 5, 3, 3], [2, 2, 4, 2, 2, 0], [0] * 6]


def test_mask_logits_by_hand():
    shift = torch.tensor([[1.0, 3.0, 2.0, 9.0, 4.0, 4.0]])
    text = torch.tensor([[True, True, True, False, True, True]])
    # (3 − m) / 2 in the first region, whose last position is no text; equal shifts in the second
    found = mask_logits(shift, text, 3, 1.5)
    assert found[0].tolist() == pytest.approx([1.5, 0, 0.75, 0, 0, 0], abs=1e-6)
    # (4 − m) / 3 over all of the text
    assert mask_logits(shift, text, 6, 3.0)[0].tolist() == pytest.approx([3, 1, 2, 0, 0, 0], abs=1e-6)
    assert not mask_logits(shift, text, 6, 0.0).any()
    assert not mask_logits(shift, torch.zeros_like(text), 6, 1.5).any()  # a region without positions


# ------------------------------------------- subsets

LOGITS = torch.tensor([1.5, 0.0, 0.9, 0.3]).double()


def successive(size: int, weights: list[float]) -> dict[tuple[int, ...], float]:
    """Probability of every subset if its positions are drawn one after the other without replacement."""
    found: dict[tuple[int, ...], float] = {}
    for chosen in combinations(range(len(weights)), size):
        found[chosen] = 0.0
        for order in permutations(chosen):
            chance, left = 1.0, sum(weights)
            for position in order:
                chance, left = chance * weights[position] / left, left - weights[position]
            found[chosen] += chance
    return found


def p_value(masked: torch.Tensor, expected: dict[tuple[int, ...], float]) -> float:
    """χ² of the subsets [N, L] against their probabilities."""
    seen = Counter(tuple(row.nonzero().flatten().tolist()) for row in masked)
    assert seen.keys() <= expected.keys()
    return chisquare([seen[chosen] for chosen in expected], [ROWS * p for p in expected.values()]).pvalue


def uniform_noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_biased_subsets_have_the_probabilities_of_successive_draws(size):
    noise, counts = uniform_noise(ROWS, 1, 4), torch.full((ROWS, 1), size)
    masked = random_subsets(counts, noise, logits=LOGITS.view(1, 1, 4)).masked[:, 0]
    expected, uniform = successive(size, LOGITS.exp().tolist()), successive(size, [1.0] * 4)
    assert sum(expected.values()) == pytest.approx(1)
    assert p_value(masked, expected) > KEPT
    assert p_value(masked, uniform) < REJECTED  # negative controls: no bias, and the opposite one
    assert p_value(masked, successive(size, (-LOGITS).exp().tolist())) < REJECTED
    assert p_value(random_subsets(counts, noise).masked[:, 0], uniform) > KEPT


def test_both_subsets_of_a_pair_are_biased_alike():
    noise, counts = uniform_noise(ROWS, 1, 4), torch.ones(ROWS, 1, dtype=torch.long)
    plan = opposed_subsets(counts, noise, LOGITS.view(1, 1, 4))
    first, second = plan.masked.unbind(1)
    weights = LOGITS.exp().tolist()
    assert p_value(first, successive(1, weights)) > KEPT and p_value(second, successive(3, weights)) > KEPT
    assert p_value(~first, successive(3, weights)) < REJECTED  # negative control: the complement is biased upstream
    assert plan.rate[0].tolist() == [0.25, 0.75]


def test_subsets_stay_among_the_allowed_positions():
    allowed = torch.tensor([True, False, True, True]).expand(100, 1, 4)
    counts = torch.arange(100).unsqueeze(1) % 4
    noise = uniform_noise(100, 1, 4)
    plan = random_subsets(counts, noise, allowed, 5 * LOGITS.view(1, 1, 4))
    assert torch.equal(plan.masked.sum(-1), counts) and not (plan.masked & ~allowed).any()


def test_equal_logits_are_uniform_subsets_of_the_same_noise():
    noise, counts = uniform_noise(500, 2, 64), torch.randint(0, 65, (500, 2))
    for logits in (torch.zeros(1, 1, 64), torch.full((500, 1, 64), 0.7).double()):
        assert torch.equal(random_subsets(counts, noise, logits=logits).masked, random_subsets(counts, noise).masked)
        first, second = opposed_subsets(counts, noise, logits).masked.unflatten(1, (2, 2)).unbind(2)
        assert torch.equal(second, ~first)


# ------------------------------------------- hosts

INFORMED = {"mask_bias": "informed"}
HOSTS: dict[str, dict[str, Any]] = {
    "spg": {},
    "spg, random": {},
    "espo": {"num_mc_samples": 4, "beta": 0.1},
    "gdpo": {"num_mc_samples": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_at_sharpness_zero_it_is_the_host_bit_for_bit(name, tmp_path):
    """Sizes and shares are those of the host at every sharpness."""
    settings = {"denoising_steps": 8, "num_iterations": 2} | HOSTS[name]
    updates, plans = {}, {}
    sharpness = {case: INFORMED | {"mask_sharpness": float(case)} for case in ("0", "2")}
    for case, more in {"host": {}, **sharpness}.items():
        trainer = method_named(name).make(tmp_path / case, **settings | more)
        assert (trainer.args.sampling_config().shift_window is None) == (case == "host")
        plans[case] = rollout_of(trainer, "a b b a", "b a a")
        trainer = method_named(name).make(tmp_path / case, max_steps=2, **settings | more)
        before = parameters_of(trainer).clone()
        trainer.train()
        updates[case] = parameters_of(trainer) - before
        updates[f"{case} units"] = trainer.forward_units
    assert updates["host"].norm() > 1e-2 and torch.equal(updates["0"], updates["host"])
    assert plans["0"].keys() == plans["host"].keys()
    for key, value in plans["host"].items():
        assert torch.equal(plans["0"][key], value), key
    # sharper: the same completions, sizes and blocks under other masks, and not a forward more
    for key in ("completion_ids", "completion_mask", "mask_rate", "advantages"):
        assert torch.equal(plans["2"][key], plans["host"][key]), key
    assert torch.equal(plans["2"]["targets"].sum(-1), plans["host"]["targets"].sum(-1))
    assert torch.equal(plans["2"]["masked"].sum(-1), plans["host"]["masked"].sum(-1))
    assert not torch.equal(plans["2"]["masked"], plans["host"]["masked"])
    assert not torch.equal(updates["2"], updates["host"])
    assert updates["2 units"] > 0 and updates["0 units"] == updates["host units"]


@pytest.mark.parametrize("name", HOSTS)
def test_tokens_that_shifted_little_are_masked_more_often(name, tmp_path):
    """With very sharp masks every masked token shifted less than every token of its region that is left."""
    settings = {"denoising_steps": 8, "num_iterations": 1, "temperature": 2.0} | HOSTS[name]
    trainer = method_named(name).make(tmp_path, **settings | INFORMED | {"mask_sharpness": 1e4})
    rows = rollout_of(trainer, "a b b a", "b a a", copies=8)
    trajectory = trainer.last_rollout[0]
    shift = filled_shifts(trajectory.confidence_shift, 4)
    text = torch.ones_like(shift, dtype=torch.bool)
    if name.startswith("spg"):
        text = torch.arange(8) < trainer.family.effective_length(rows["completion_ids"]).unsqueeze(1)
    size = 4 if name == "spg" else 8
    agree = []
    for view in rows["targets"][:, 0].unbind(1):
        for row in range(len(view)):
            for start in range(0, 8, size):
                part = slice(start, start + size)
                inside, masked = text[row, part], view[row, part]
                if masked.any() and (inside & ~masked).any():
                    agree.append(shift[row, part][masked].max() <= shift[row, part][inside & ~masked].min())
    assert len(agree) > 12 and sum(agree) > 0.95 * len(agree)  # equal shifts to 1e-4 of their range may swap
    assert (rows["targets"] & ~rows["masked"]).sum() == 0


@pytest.mark.slow
def test_a_run_resumed_within_a_rollout_batch_ends_in_the_same_weights(tmp_path):
    """The masks of later updates come from the shifts of the rollout before the checkpoint."""
    method = method_named("spg, informed")
    settings: dict[str, Any] = dict(max_steps=3, num_iterations=3, learning_rate=0.2)
    whole = method.make(tmp_path / "whole", save_strategy="steps", save_steps=1, **settings)
    whole.train()
    again = method.make(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert torch.equal(parameters_of(again), parameters_of(whole))
    other = method.make(tmp_path / "other", **settings, mask_sharpness=0.5)
    with pytest.raises(ValueError, match=r"`mask_sharpness` was 1\.5 and is 0\.5"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))


# ------------------------------------------- composition and bad input


def test_a_composed_method_records_what_its_likelihood_needs(tmp_path):
    likelihood = MaskedViews(TextSubsets(2, informed=InformedMasking(3.0, 2)))
    trainer = BASE.make(tmp_path, choices={"likelihood": likelihood, "loss": WeightedLikelihood("sum")})
    assert trainer.args.sampling_config().shift_window == 2
    rows = rollout_of(trainer, "a b", "b a a")
    trajectory = trainer.last_rollout[0]
    assert trajectory.confidence_shift.shape == rows["completion_ids"].shape
    with pytest.raises(ValueError, match=r"this trajectory has none\. Draw it with SamplingConfig\(shift_window=2\)"):
        plan_of(trainer, replace(trajectory, confidence_shift=None), rows)


def test_biased_pairs_are_no_two_unbiased_estimates():
    assert SubsetPairs(2).independent_halves and not SubsetPairs(2, InformedMasking()).independent_halves


@pytest.mark.parametrize("config", [SPGConfig, ESPOConfig, GDPOConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_bias": "entropy"}, "mask_bias must be one of uniform, informed; got 'entropy'"),
        ({"mask_sharpness": 2.0}, r"mask_sharpness=2\.0 would have no effect: masks are uniform\. Set mask_bias="),
        ({"mask_window": 4}, r"mask_window=4 would have no effect"),
        (INFORMED | {"mask_sharpness": -1.0}, r"mask_sharpness must be at least 0, got -1\.0"),
        (INFORMED | {"mask_window": 0}, "mask_window must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_with_the_reason(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config("unused", use_cpu=True, bf16=False, report_to=[], **settings)


def test_an_empty_window_of_the_sampler_is_refused():
    with pytest.raises(ValueError, match="shift_window must be at least 1, got 0"):
        SamplingConfig(shift_window=0)
