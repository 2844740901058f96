"""`torch_compile=True`: the network is compiled around the scoring head, and learns what it learns without."""

from __future__ import annotations

import os

import pytest
import torch
from methods import method_named
from tiny import coded_prompts, tiny_model
from trainer_helpers import parameters_of

from trl_diffusion.sampling import SamplingConfig, row_generators, sample

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def environment_stays(monkeypatch):
    # `TrainingArguments` tells accelerate what to compile by environment variables, which would stay for other tests
    monkeypatch.setattr(os, "environ", os.environ.copy())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.thorough
def test_a_compiled_network_learns_the_same(tmp_path):
    method = method_named("agrpo")

    def learnt(**settings) -> torch.Tensor:
        trainer = method.make(
            tmp_path, model=tiny_model(num_hidden_layers=1), max_steps=2, **method.few_views | settings
        )
        before = parameters_of(trainer).clone()
        trainer.train()
        return parameters_of(trainer) - before

    plain = learnt()
    assert not torch._dynamo.utils.counters["frames"]
    compiled = learnt(torch_compile=True, torch_compile_backend="aot_eager")
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    # one graph from the tokens to the hidden states, one behind the head; a second of each for other shapes
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
    assert torch._dynamo.utils.counters["frames"]["ok"] == torch._dynamo.utils.counters["frames"]["total"] > 0


@pytest.mark.parametrize("in_place", [False, True])  # DeepSpeed compiles in place
def test_rollouts_run_uncompiled(in_place):
    model, (prompts, mask) = tiny_model(num_hidden_layers=1), coded_prompts(2)
    if in_place:
        model.compile(backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    sample(model, prompts, mask, SamplingConfig(8, 4, 4), row_generators(0, rows=range(2)))
    assert not torch._dynamo.utils.counters["frames"]
    model(input_ids=prompts, attention_mask=mask)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
