"""A denoising step launches few operations, the host waits for none of them, and few copies of the logits exist."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch
from launches import Launches, Step, peak_of
from test_continuation import mixed_states
from tiny import coded_prompts, tiny_model, tiny_sdar

from trl_diffusion.distribution import draw, entropies, score_targets
from trl_diffusion.models import LLaDAModelLM, SDARForCausalLM
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators, sample
from trl_diffusion.sampling.drawing import draw_everywhere, draw_scored
from trl_diffusion.sampling.unmasking import RULES, Candidates, Choice, Rule, step_signals

ROWS, BLOCKS = 16, 2
BOUNDS = {"confidence_threshold": 0.6, "entropy_bound": 0.5}
# Operations outside of the network at a step within a block, with some to spare. They were more than twice as many
# before the host knew what a step commits.
MOST = {"random": 58, "max_prob": 61, "entropy": 66, "margin": 63, "plackett_luce": 91, "low_confidence": 67}
MORE_IN_PARALLEL = 46  # every row commits a number of its own

CACHES = ("none", "prefix", "dual", "block")
CASES = [(name, None) for name in RULES] + [(name, RULES[name].parallel) for name in RULES if RULES[name].parallel]


def network(cache: str):
    """A network whose texts never end: no row leaves early."""
    settings = dict(vocab_size=8, num_tokens=5, eos_token_id=6, end_token_ids=[6], num_hidden_layers=1)
    return tiny_sdar(5, 10.0, **settings) if cache == "block" else tiny_model(5, 10.0, **settings)


def launched(cache: str, config: SamplingConfig, state: CanvasState | None = None, padded: bool = True) -> list[Step]:
    """The steps of a rollout from its first forward on; the end of the last block is not among them."""
    model, (prompts, mask) = network(cache), coded_prompts(ROWS)
    streams = row_generators(0, rows=range(ROWS))
    first = 0 if padded else 3
    with Launches(model) as launches:
        sample(model, prompts[:, first:], mask[:, first:], replace(config, cache=cache), streams, state=state)
    first = 2 if cache == "block" else 1  # before it the rollout is set up, and the block cache computes the prompts
    return launches.steps[first:-1]


def waits(step: Step) -> int:
    return step.waits.total()


@pytest.mark.parametrize(("unmasking", "bound"), CASES)
@pytest.mark.parametrize("cache", CACHES)
def test_what_a_step_launches(cache, unmasking, bound):
    parallel = {} if bound is None else {bound: BOUNDS[bound]}
    steps = launched(cache, SamplingConfig(8, 8, 4, unmasking=unmasking, **parallel))
    assert len(steps) == 7 or bound
    # With parallel unmasking the host asks how many tokens a step commits. At the end of a block it asks whether the
    # logits were finite, and which texts have ended.
    own = 1 if bound else 0
    assert max(map(waits, steps)) <= own + 2
    assert sum(map(waits, steps)) <= own * len(steps) + 2 * (BLOCKS - 1)
    assert not any(step.waits_inside for step in steps)
    assert median(step.outside for step in steps) <= MOST[unmasking] + own * MORE_IN_PARALLEL


@pytest.mark.parametrize("cache", CACHES)
def test_without_padding_the_network_is_given_no_mask(cache):
    steps = launched(cache, SamplingConfig(8, 8, 4), padded=False)
    assert sum(map(waits, steps)) == 2 * (BLOCKS - 1) and not any(step.waits_inside for step in steps)


@pytest.mark.parametrize("settings", [{"unmasking": "random"}, {"record_signals": True}, {"shift_window": 2}], ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_rows_that_commit_different_numbers_of_tokens(cache, settings):
    """Also of rows that start inside of a block, the host knows how many."""
    config = SamplingConfig(**{"canvas_length": 12, "denoising_steps": 6, "block_length": 4} | settings)
    steps = launched(cache, config, mixed_states(network(cache), ROWS))
    blocks = 3 * ROWS if cache != "none" else 3  # rows that share a cache wait for those at earlier blocks
    assert max(map(waits, steps)) <= 2 * 3 and sum(map(waits, steps)) <= 2 * blocks
    assert not any(step.waits_inside for step in steps)


ASKING = {
    "item": lambda values: values.max().item(),
    "int": lambda values: int(values.sum()),
    "if": lambda values: 0 if (values > 0).all() else 1,
    "tolist": lambda values: values.tolist(),
    "cpu": lambda values: values.cpu(),
    "nonzero": lambda values: values.nonzero(),
    "where": lambda values: torch.where(values > 0),
    "mask": lambda values: values[values > 0],
    "write": lambda values: values.index_put((values > 0,), torch.zeros((), dtype=values.dtype)),
    "masked_select": lambda values: values.masked_select(values > 0),
    "unique": lambda values: values.unique(),
    "equal": lambda values: torch.equal(values, values),
    "repeat_interleave": lambda values: values.flatten().repeat_interleave(
        torch.ones(values.numel(), dtype=torch.long)
    ),
    "tensor": lambda values: torch.tensor([0, 1], device=values.device),
}


@pytest.fixture(scope="module")
def undisturbed() -> list[Step]:
    return launched("none", SamplingConfig(8, 8, 4))


@pytest.mark.parametrize("how", ASKING)
def test_a_step_that_waits_is_found(how, undisturbed, monkeypatch):
    def waiting(candidates: Candidates) -> Choice:
        ASKING[how](candidates.order_noise)
        return RULES["random"].choose(candidates)

    monkeypatch.setitem(RULES, "waiting", Rule(waiting, "as random, but slowly", reads_logits=False))
    disturbed = launched("none", SamplingConfig(8, 8, 4, unmasking="waiting"))
    assert all(waits(after) > waits(before) for before, after in zip(undisturbed, disturbed, strict=True))


@pytest.mark.parametrize("model_class", [LLaDAModelLM, SDARForCausalLM])
def test_a_caller_that_knows_of_padding_gets_the_same_numbers(model_class):
    model, (prompts, mask) = tiny_model(5, 10.0, model_class).eval(), coded_prompts(ROWS)
    positions = torch.arange(8).expand(ROWS, -1)
    with torch.no_grad():
        asked = model(prompts, mask, positions=positions).logits
        told = model(prompts, mask, positions=positions, padded=True).logits
        assert torch.equal(asked, told)
        unpadded = prompts[:, 3:]
        asked = model(unpadded, torch.ones_like(unpadded), positions=positions[:, :5]).logits
        for given in (torch.ones_like(unpadded), None):
            assert torch.equal(asked, model(unpadded, given, positions=positions[:, :5], padded=False).logits)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 2}, {"unmasking": "low_confidence"}, {"temperature": 0.0}], ids=str
)
def test_logits_that_are_not_finite_are_found_at_the_end_of_their_block(settings):
    """Until then the sampler goes on with whatever ids were drawn."""
    model, calls = network("none"), []

    def spoil(module, args, logits):
        calls.append(logits)
        if len(calls) >= 7:  # the third of the second block's four steps
            logits[[3, 7], :, 2:] = torch.nan
        return logits

    model.lm_head.register_forward_hook(spoil)
    prompts, mask = coded_prompts(ROWS)
    config = SamplingConfig(**{"canvas_length": 16, "denoising_steps": 16, "block_length": 4} | settings)
    with pytest.raises(FloatingPointError, match="not finite for 2 of 16 rows in forward 7 of this rollout"):
        sample(model, prompts[:, 3:], mask[:, 3:], config, row_generators(0, rows=range(ROWS)))
    assert len(calls) == 8


@pytest.mark.parametrize("size", [5, 513, 1025])
def test_a_draw_from_nan_is_an_index(size):
    """The network is run on it before the NaN is found."""
    drawn = draw(torch.full((2, 64, size), torch.nan), torch.linspace(0, 1, 128, dtype=torch.float64).view(2, 64))
    assert (drawn >= 0).all() and (drawn < size).all()


# ---------------------------------------------------------------- memory


def candidates_of(logits: torch.Tensor, bound: float | None) -> Candidates:
    rows, count, _ = logits.shape
    noise = torch.rand(rows, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Candidates(
        is_masked=torch.ones(rows, count, dtype=torch.bool),
        min_commits=np.ones(rows, dtype=np.int64),
        order_noise=noise,
        logits=logits,
        bound=bound,
        leftmost=False,
        position_noise=noise,
        position_temperature=1.0,
        draw=lambda given: draw_everywhere(given, noise, SamplingConfig(64, 64, 32)),
    )


@pytest.mark.parametrize("moment", [*CASES, "signals", "scores", "scores of the hottest"], ids=str)
def test_a_step_holds_at_most_two_copies_of_the_logits(moment):
    logits = torch.randn(4, 32, 4096, generator=torch.Generator().manual_seed(0))
    logits[..., -5:] = -torch.inf
    noise = torch.rand(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if moment == "signals":
        run = partial(step_signals, logits, torch.ones(4, 32, dtype=torch.bool))
    elif isinstance(moment, str):
        temperature = 1.0 if moment == "scores" else 1.5
        run = partial(draw_scored, logits, noise, SamplingConfig(64, 64, 32, temperature=temperature))
    else:
        name, setting = moment
        run = partial(RULES[name].choose, candidates_of(logits, BOUNDS.get(setting)))
    given = logits.clone()
    _, _, peak = peak_of(run)
    assert peak < 2.1 * logits.nbytes
    assert torch.equal(logits, given)  # what is computed in place is a copy


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_entropies_are_those_of_the_probabilities(scale):
    logits = scale * torch.randn(3, 5, 700, generator=torch.Generator().manual_seed(0))
    logits[..., -9:] = -torch.inf
    expected = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    torch.testing.assert_close(entropies(logits).double(), expected, atol=1e-6, rtol=1e-6)
    # where a gradient flows nothing is overwritten, and the numbers are the same
    targets = logits.argmax(-1)
    followed = logits.clone().requires_grad_()
    for got, wanted in zip(score_targets(followed, targets), score_targets(logits, targets), strict=True):
        assert torch.equal(got, wanted) and got.requires_grad
    score_targets(followed, targets)[1].sum().backward()
    assert followed.grad is not None and followed.grad.isfinite().all()
