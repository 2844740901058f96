"""`full_determinism=True`: no operation that PyTorch refuses on a GPU under deterministic algorithms.

The tests run on CPUs, where PyTorch refuses nothing, so what it refuses on GPUs is refused here by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from methods import METHODS
from test_sampling import network, rollout
from tiny import tiny_sdar
from torch.overrides import TorchFunctionMode

from trl_diffusion.credit.step_draws import draw_steps
from trl_diffusion.credit.step_selection import SELECTORS, StepSignals
from trl_diffusion.distribution import cumulative_shares, running_sum, sum_before
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.unmasking import RULES

# By torch.use_deterministic_algorithms: always, or with floats, or with weights, or with indices.
ALWAYS = {"histc", "histogram", "put_", "put", "kthvalue", "nll_loss", "ctc_loss"}


class GPU(TorchFunctionMode):
    """Refuses what PyTorch's page on `use_deterministic_algorithms` lists for CUDA, as far as it could occur here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        floating = any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in args[:1])
        refused = name in ALWAYS
        refused |= name in ("cumsum", "cumsum_") and (floating or kwargs.get("dtype", torch.int).is_floating_point)
        refused |= name == "bincount" and (len(args) > 1 or "weights" in kwargs)
        refused |= name in ("median", "nanmedian") and (len(args) > 1 or "dim" in kwargs)
        refused |= name in ("scatter_reduce", "scatter_reduce_") and "prod" in (*args, *kwargs.values())
        if refused and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return func(*args, **kwargs)


@contextmanager
def full_determinism() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        with GPU():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_a_gpu_refuses_is_refused():
    floats = torch.rand(3, 4)
    with full_determinism():
        for refused in (
            lambda: floats.cumsum(1),
            lambda: torch.cumsum(floats, 1),
            lambda: floats.long().cumsum(1, dtype=torch.float64),
            lambda: floats.median(1),
            lambda: floats.kthvalue(1),
            lambda: floats.histc(),
        ):
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                refused()
        floats.long().cumsum(1), floats.median(), floats.long().flatten().bincount()


ROLLOUTS = {
    **{rule: SamplingConfig(8, 4, 4, 1.3, unmasking=rule, record_signals=True) for rule in RULES},
    "truncated": SamplingConfig(8, 4, 4, 1.3, top_k=3, top_p=0.9),
    "top_p alone": SamplingConfig(8, 4, 4, 1.3, top_p=0.9, record_support=False),
    "threshold": SamplingConfig(8, 8, 4, 1.3, unmasking="max_prob", confidence_threshold=0.5),
    "bound": SamplingConfig(8, 8, 4, 1.3, unmasking="entropy", entropy_bound=1.0),
    "greedy": SamplingConfig(8, 4, 4, 0.0, unmasking="max_prob"),
    "prefix": SamplingConfig(8, 4, 4, 1.3, cache="prefix"),
    "dual": SamplingConfig(8, 4, 4, 1.3, cache="dual"),
}


@pytest.mark.parametrize("config", ROLLOUTS.values(), ids=ROLLOUTS.keys())
def test_rollouts(config):
    usual = rollout(network(), config)
    with full_determinism():
        trajectory = rollout(network(), config)
    for name, value in vars(usual).items():
        same = torch.equal(value, vars(trajectory)[name]) if isinstance(value, torch.Tensor) else True
        assert same, name


def test_rollouts_with_a_large_vocabulary_and_an_exact_cache():
    with full_determinism():
        rollout(network(vocab_size=1300), SamplingConfig(8, 4, 4, 1.3))  # drawn in parts
        rollout(tiny_sdar(), SamplingConfig(8, 4, 4, 1.3))


def test_drawn_and_sampled_steps():
    probabilities = torch.rand(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    noise = torch.from_numpy(np.random.default_rng(0).random((5, 12)))
    candidates = torch.ones(5, 12, dtype=torch.bool)
    signals = StepSignals(probabilities, probabilities.flip(1), probabilities.roll(1, 1), candidates, 4)
    with full_determinism():
        draws = draw_steps(probabilities, noise[:, :7], "mean")
        chosen = {name: selector(signals, 7, noise).steps for name, selector in SELECTORS.items()}
    points = (torch.arange(7) + noise[:, :7]) / 7
    assert torch.equal(draws.steps, torch.searchsorted(probabilities.cumsum(1), points, right=True))
    for name, steps in chosen.items():
        assert torch.equal(steps, SELECTORS[name](signals, 7, noise).steps), name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_updates_of_every_method(method, tmp_path):
    trainer = method.make(tmp_path, num_mc_samples=method.settings.get("num_mc_samples", 2))
    with full_determinism():
        trainer.train()
    assert trainer.state.global_step == 1


# ------------------------------------------- running sums


def test_running_sums_are_exact_and_never_decrease():
    values = torch.tensor([0.5, 0.0, 0.125, 2.0**-41, 0.25])
    assert running_sum(values, 2.0**-40).tolist() == [0.5, 0.5, 0.625, 0.625, 0.875]  # ties go to even
    assert sum_before(values, 2.0**-44).tolist() == [0.0, 0.5, 0.5, 0.625, 0.625 + 2.0**-41]
    masses = torch.rand(50, 400, generator=torch.Generator().manual_seed(0)) ** 40
    masses[:, ::3] = 0.0
    shares = cumulative_shares(masses)
    steps = shares.diff(dim=1)
    assert (steps >= 0).all() and (steps[:, 2::3] == 0).all()
    assert (shares[:, -1] - 1).abs().max() < 400 * 2.0**-52
    expected = masses.double().cumsum(1) / masses.double().sum(1, keepdim=True)
    torch.testing.assert_close(shares, expected, atol=1e-13, rtol=0)


def test_the_order_of_addition_does_not_matter():
    """The reason why a GPU's sums are refused: floats added in another order give another sum."""
    masses = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orders = [masses, masses.flip(0), masses.sort().values, masses.sort(descending=True).values]
    assert len({running_sum(order, 2.0**-30)[-1].item() for order in orders}) == 1
    assert len({order.cumsum(0)[-1].item() for order in orders}) > 1
