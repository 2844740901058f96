"""On a GPU everything comes out as on the CPU, and twice the same.

pytest -m gpu                                        # on a machine with a GPU; elsewhere all are skipped
TRL_DIFFUSION_GPU_TESTS_ON=cpu pytest -m gpu         # tries the tests themselves, the CPU against the CPU
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from methods import method_named
from peft import LoraConfig
from tiny import coded_prompts, tiny_model, tiny_sdar
from trainer_helpers import parameters_of

from trl_diffusion.evaluation import load_model
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.models.fused import fuse_elementwise
from trl_diffusion.sampling import SamplingConfig, row_generators, sample
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.tokenization import encode_prompt, left_pad

DEVICE = torch.device(os.environ.get("TRL_DIFFUSION_GPU_TESTS_ON", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU is at hand"),
]

ROWS = 16
NETWORKS = {"none": tiny_model, "prefix": tiny_model, "dual": tiny_model, "block": tiny_sdar}


def draw(device, model, config: SamplingConfig):
    prompts, mask = (part.to(device) for part in coded_prompts(ROWS))
    return sample(model.to(device), prompts, mask, config, row_generators(0, rows=range(ROWS)))


# ------------------------------------------- rollouts


@pytest.mark.parametrize("settings", [{"unmasking": "random"}, {"unmasking": "entropy", "top_k": 3}], ids=str)
@pytest.mark.parametrize("cache", NETWORKS)
def test_float32_rollouts_are_those_of_the_cpu(cache, settings):
    config = SamplingConfig(12, 6, 4, 1.3, cache=cache, **settings)
    expected, found = (draw(device, NETWORKS[cache](5, 10.0), config) for device in ("cpu", DEVICE))
    assert found.completion_ids.device.type == DEVICE.type
    assert torch.equal(found.completion_ids.cpu(), expected.completion_ids)
    assert torch.equal(found.unmask_step.cpu(), expected.unmask_step)
    torch.testing.assert_close(found.logps.cpu(), expected.logps, atol=1e-4, rtol=1e-4)


def test_the_exact_cache_changes_nothing():
    plain, cached = (
        draw(DEVICE, tiny_sdar(5, 10.0), SamplingConfig(12, 6, 4, 1.3, cache=x)) for x in ("none", "block")
    )
    assert torch.equal(plain.completion_ids, cached.completion_ids)
    torch.testing.assert_close(plain.logps, cached.logps, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="tests/test_fused.py compiles for the CPU")
@pytest.mark.parametrize("cache", NETWORKS)
def test_fused_layers_write_the_same(cache):
    config, model = SamplingConfig(12, 6, 4, 1.3, cache=cache), NETWORKS[cache](5, 10.0).to(DEVICE)
    plain = draw(DEVICE, model, config)
    fuse_elementwise(model)
    fused = draw(DEVICE, model, config)
    assert torch.equal(plain.completion_ids, fused.completion_ids)
    torch.testing.assert_close(plain.logps, fused.logps, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="tests/test_rollout_compile.py compiles for the CPU")
@pytest.mark.parametrize("cache", ["dual", "block"])
def test_compiled_steps_write_the_same(cache):
    """Twice, because a graph is recorded in the first rollout and repeated in the second."""
    config, model = SamplingConfig(12, 6, 4, 1.3, cache=cache), NETWORKS[cache](5, 10.0).to(DEVICE)
    for _ in range(2):
        plain, found = (draw(DEVICE, model, replace(config, rollout_compile=on)) for on in (False, True))
        assert torch.equal(plain.completion_ids, found.completion_ids)
        torch.testing.assert_close(plain.logps, found.logps, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)


def test_bfloat16_rollouts_of_a_trained_model_answer_as_those_of_the_cpu():
    model, tokenizer = load_model(EMBEDDED_MODEL)
    prompts = [encode_prompt(prompt, tokenizer) for prompt in load_word_problems("test", ROWS)["prompt"]]
    ids, mask = left_pad(prompts, model.config.eos_token_id)
    config = SamplingConfig(32, 16, 8, temperature=0.0, unmasking="max_prob")

    def answers(device, dtype):
        network = copy.deepcopy(model).to(device, dtype)
        return sample(network, ids.to(device), mask.to(device), config, row_generators(0, rows=range(ROWS)))

    expected, found = answers("cpu", torch.float32), answers(DEVICE, torch.bfloat16)
    equal = found.completion_ids.cpu() == expected.completion_ids
    assert equal.float().mean() > 0.9
    same = equal.all(1)
    assert same.float().mean() > 0.7
    torch.testing.assert_close(found.logps.cpu()[same], expected.logps[same], atol=0.1, rtol=0.1)


# ------------------------------------------- updates


def train(device: torch.device, name: str, folder, **settings: Any):
    """One LoRA update of a method; returns the trainer and the change of its weights."""
    method = method_named(name)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = method.make(folder, peft_config=lora, use_cpu=device.type == "cpu", logging_steps=1, **settings)
    assert trainer.accelerator.device.type == device.type
    before = parameters_of(trainer).cpu()
    trainer.train()
    return trainer, parameters_of(trainer).cpu() - before


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("name", ["agrpo", "diffu_grpo", "dipo"])  # trajectory, masked and replay views
def test_an_update_is_that_of_the_cpu(name, tmp_path):
    _, expected = train(torch.device("cpu"), name, tmp_path / "cpu", learning_rate=0.1)
    _, found = train(DEVICE, name, tmp_path / "gpu", learning_rate=0.1)
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("bf16", "most"), [(False, 1e-4), (True, 0.1)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["agrpo", "dipo"])  # old log-probabilities come from the rollout
def test_ratios_are_one_on_policy(name, bf16, most, tmp_path):
    trainer, _ = train(DEVICE, name, tmp_path, bf16=bf16)
    (largest,) = logged(trainer, "rollout/max_abs_log_ratio")
    assert largest < most


@pytest.fixture
def deterministic():
    """`full_determinism` sets what holds for the whole process."""
    yield {"full_determinism": True}
    torch.use_deterministic_algorithms(False)


def test_two_deterministic_runs_are_one(tmp_path, deterministic):
    runs = [train(DEVICE, "agrpo", tmp_path / name, max_steps=3, **deterministic) for name in ("first", "second")]
    (first, change), (second, other) = runs
    assert torch.equal(change, other) and change.norm() > 1e-3
    assert logged(first, "loss") == logged(second, "loss") and len(logged(first, "loss")) == 3
    assert not torch.equal(change, train(DEVICE, "agrpo", tmp_path / "third", max_steps=3, seed=1)[1])
