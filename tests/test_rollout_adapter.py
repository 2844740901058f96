"""LoRA in rollouts: merged into the weights of its layers or cast once, and everything as it was afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from methods import METHODS, PROMPTS, method_named
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import coded_prompts, tiny_mixture, tiny_model, tiny_sdar
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_helpers import rollout_of
from transformers import TrainerCallback

from trl_diffusion.adapters.merging import (
    cast_adapter,
    merge_obstacle,
    merged_adapter,
    merged_bytes,
    products_are_exact,
)
from trl_diffusion.evaluation.statistics import Estimate
from trl_diffusion.models import DreamModel
from trl_diffusion.runtime import rollout_adapter
from trl_diffusion.runtime.planned_launch import Launch
from trl_diffusion.runtime.rollout_adapter import RolloutAdapter, rollout_merge_obstacle
from trl_diffusion.runtime.rollouts import RolloutEngine
from trl_diffusion.sampling import SamplingConfig, Trajectory, row_generators, sample
from trl_diffusion.trainers.callbacks import AccuracyCallback

AGRPO = method_named("agrpo")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS = 16


def lora(**settings: Any) -> LoraConfig:
    """An adapter that changes the model from the start."""
    return LoraConfig(**{"r": 3, "target_modules": "all-linear", "init_lora_weights": False} | settings)


def adapted(model, config=None) -> PeftModel:
    torch.manual_seed(5)
    model = get_peft_model(model, config or lora())
    with torch.no_grad():  # as much as makes a difference, and keeps the model sharp
        for name, weight in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.mul_(0.5)
    return model


def several() -> PeftModel:
    """Two adapters on the same layers, both active."""
    model = adapted(tiny_model(3))
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    return model


NETWORKS: dict[str, Callable[[], PeftModel]] = {
    "LLaDA": lambda: adapted(tiny_model(3)),
    "Dream": lambda: adapted(tiny_model(3, model_class=DreamModel)),
    "SDAR": lambda: adapted(tiny_sdar(21)),
    "DoRA": lambda: adapted(tiny_model(3), lora(use_dora=True)),
    "rsLoRA, patterns": lambda: adapted(
        tiny_model(3), lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 3})
    ),
    "dropout": lambda: adapted(tiny_model(3), lora(lora_dropout=0.5)),
    "head": lambda: adapted(tiny_model(3), lora(target_modules=["q_proj", "lm_head"])),
    "tied head": lambda: adapted(tiny_model(3, tie_word_embeddings=True), lora(target_modules=["q_proj", "lm_head"])),
    "two adapters": several,
    "experts": lambda: adapted(
        tiny_mixture("lladamoe"), lora(target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS)
    ),
}


def drawn(model, **settings: Any) -> Trajectory:
    prompts, mask = coded_prompts(ROWS)
    config = SamplingConfig(**{"canvas_length": 8, "denoising_steps": 4, "block_length": 4} | settings)
    return sample(model, prompts, mask, config, row_generators(0, rows=range(ROWS)))


def layers(model) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class Unchanged:
    """The parameters of a model: which objects they are, where they lie, and every bit of them."""

    def __init__(self, model):
        self.model, self.parameters = model, dict(model.named_parameters(remove_duplicate=False))
        self.places = {name: weight.data_ptr() for name, weight in self.parameters.items()}
        self.values = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self.trained = {name for name, weight in self.parameters.items() if weight.requires_grad}

    def check(self) -> None:
        now = dict(self.model.named_parameters(remove_duplicate=False))
        assert list(now) == list(self.parameters)
        assert all(now[name] is weight for name, weight in self.parameters.items())
        assert self.places == {name: weight.data_ptr() for name, weight in now.items()}
        assert all(torch.equal(now[name], value) for name, value in self.values.items())
        assert self.trained == {name for name, weight in now.items() if weight.requires_grad}
        assert not any(layer.merged for layer in layers(self.model))


# ---------------------------------------------------------------- merged


@pytest.mark.parametrize("network", NETWORKS)
def test_a_merged_rollout_draws_the_same_tokens_and_leaves_every_bit(network):
    model = NETWORKS[network]().train()
    assert merge_obstacle(model) is None
    before, apart = Unchanged(model), drawn(model)
    with merged_adapter(model):
        assert all(layer.merged for layer in layers(model))
        together = drawn(model)
        greedy = drawn(model, temperature=0.0, unmasking="max_prob")
    before.check()
    assert torch.equal(together.completion_ids, apart.completion_ids)
    assert torch.equal(together.unmask_step, apart.unmask_step)
    torch.testing.assert_close(together.logps, apart.logps, rtol=1e-5, atol=2e-5)
    assert torch.equal(greedy.completion_ids, drawn(model, temperature=0.0, unmasking="max_prob").completion_ids)
    with model.disable_adapter():  # the adapter does something
        assert not torch.allclose(drawn(model).logps, apart.logps, atol=1e-3)
    before.check()


def test_a_tied_head_is_merged_and_the_embeddings_are_not():
    model = NETWORKS["tied head"]()
    base = model.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    with merged_adapter(model):
        assert not torch.equal(base.lm_head.base_layer.weight, base.model.embed_tokens.weight)
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight


def test_weights_are_restored_after_an_error_at_any_point(monkeypatch):
    model = NETWORKS["LLaDA"]()
    before = Unchanged(model)
    with pytest.raises(RuntimeError, match="while drawing"), merged_adapter(model):
        raise RuntimeError("while drawing")
    before.check()
    broken = layers(model)[5]
    monkeypatch.setattr(broken, "get_delta_weight", lambda adapter: torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="size"), merged_adapter(model):
        pytest.fail("the sixth layer cannot be merged")
    before.check()


def test_what_is_merged_or_turned_off_stays_so():
    model = NETWORKS["LLaDA"]()
    with merged_adapter(model):
        weights = [layer.get_base_layer().weight for layer in layers(model)]
        with merged_adapter(model):
            assert all(a.get_base_layer().weight is b for a, b in zip(layers(model), weights, strict=True))
        assert all(layer.merged for layer in layers(model))
    with model.disable_adapter():
        plain = drawn(model)
        with merged_adapter(model):
            assert torch.equal(drawn(model).completion_ids, plain.completion_ids)


def test_the_memory_is_that_of_the_adapted_layers():
    model = NETWORKS["experts"]()
    base = model.get_base_model().model.layers
    attention = sum(getattr(layer.self_attn, name).weight.nbytes for layer in base for name in ("q_proj", "v_proj"))
    experts = sum(
        weight.nbytes for name, weight in model.named_parameters() if "experts" in name and "lora_" not in name
    )
    assert merged_bytes(model) == attention + experts


# ---------------------------------------------------------------- where it is not done


def test_what_cannot_be_merged_without_a_loss_is_said():
    zero3, zero2 = (Launch(2, {"zero_optimization": {"stage": stage}}) for stage in (3, 2))
    model = NETWORKS["LLaDA"]()
    for obstacle, words in {
        rollout_merge_obstacle(model, "no", zero3): "divided among processes",
        rollout_merge_obstacle(model, "no", Launch(2, fsdp=True)): "divided among processes",
        rollout_merge_obstacle(model, "bf16", zero2): "computed in bf16",
        rollout_merge_obstacle(model, "fp16", Launch()): "computed in fp16",
        merge_obstacle(tiny_model()): "no adapter",
        merge_obstacle(adapted(tiny_model().bfloat16())): "weights are bfloat16",
        merge_obstacle(adapted(tiny_model(), LoHaConfig(r=2, target_modules=["q_proj"]))): "kind Linear",
        merge_obstacle(adapted(tiny_model(), lora(target_modules=["embed_tokens"]))): "kind Embedding",
    }.items():
        assert obstacle is not None and words in obstacle
    assert all(rollout_merge_obstacle(model, "no", launch) is None for launch in (zero2, Launch(2), Launch()))


def test_products_that_round_are_noticed(monkeypatch, tmp_path):
    assert products_are_exact(torch.device("cpu"))
    monkeypatch.setattr("trl_diffusion.adapters.merging.products_are_exact", lambda device: False)
    assert "TF32" in AGRPO.make(tmp_path, peft_config=lora()).rollout_adapter.obstacle


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bf16": True, "peft_config": lora()}, "passes are computed in bf16"),
        ({"model": tiny_model().bfloat16(), "peft_config": lora()}, "weights are bfloat16"),
        ({}, "there is no adapter"),
    ],
    ids=["autocast", "bfloat16", "no adapter"],
)
def test_a_wish_that_cannot_be_met_is_refused_at_the_start(settings, reason, tmp_path):
    with pytest.raises(ValueError, match=f"merge_adapter_for_rollout=True cannot be done: {reason}.* Leave it out"):
        AGRPO.make(tmp_path, merge_adapter_for_rollout=True, **copy.deepcopy(settings))
    assert not AGRPO.make(tmp_path, **copy.deepcopy(settings)).rollout_adapter.merges


@pytest.mark.slow
def test_a_quantised_base_is_not_merged(tmp_path):
    pytest.importorskip("bitsandbytes")
    from test_qlora import make

    tiny_model(seed=3).save_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "run", str(tmp_path / "base"))
    assert trainer.rollout_adapter == RolloutAdapter(obstacle=merge_obstacle(trainer.model))
    assert "the base is quantised" in str(trainer.rollout_adapter.obstacle)
    before = Unchanged(trainer.model)
    rollout_of(trainer, "a b")
    before.check()
    with pytest.raises(ValueError, match="True cannot be done: the base is quantised"):
        RolloutAdapter.of(trainer, True)


# ---------------------------------------------------------------- in training


@contextmanager
def seen_rollouts(monkeypatch) -> Iterator[list[SimpleNamespace]]:
    """Return what every rollout and continuation drew, whether merged, and the weight of a layer it was drawn with."""
    seen: list[SimpleNamespace] = []
    whole = RolloutEngine.sample

    def watched(engine, model, *args, **kwargs):
        trajectory = whole(engine, model, *args, **kwargs)
        layer = layers(model)[0]
        weight = layer.get_base_layer().weight.detach().clone()
        merged = {each.merged for each in layers(model)}
        assert len(merged) == 1
        expected = weight if layer.merged else None
        if layer.merged:
            base = model.saved_base + layer.get_delta_weight("default")
            torch.testing.assert_close(weight, base, rtol=0, atol=1e-6)
        seen.append(SimpleNamespace(trajectory=trajectory, merged=merged.pop(), weight=expected))
        return trajectory

    monkeypatch.setattr(RolloutEngine, "sample", watched)
    yield seen
    monkeypatch.undo()


def never_ties(completions, **kwargs) -> list[float]:
    return [float(row % 7) for row in range(len(completions))]


def trained(method, folder: Path, monkeypatch, **settings: Any):
    """A trained run with an adapter, and what its rollouts were."""
    torch.manual_seed(0)
    defaults = {"max_steps": 3, "peft_config": lora(), "learning_rate": 0.1, "reward": never_ties}
    trainer = method.make(folder, **defaults | settings)
    trainer.model.saved_base = layers(trainer.model)[0].get_base_layer().weight.detach().clone()
    before = Unchanged(trainer.model)
    with seen_rollouts(monkeypatch) as seen:
        trainer.train()
    base = {name: value for name, value in before.values.items() if "lora_" not in name}
    assert all(torch.equal(trainer.model.get_parameter(name), value) for name, value in base.items())
    assert all(trainer.model.get_parameter(name) is weight for name, weight in before.parameters.items())
    return trainer, seen


def close(trainer, other, tolerance: float = 1e-6) -> None:
    for (name, one), two in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


CHOSEN = {
    "agrpo": {"beta": 0.2, "loss_type": "dr_grpo"},  # the reference is the model with its adapter off
    "sapo": {},  # continuations
    "diffu_grpo": {"num_iterations": 2},
    "daca": {},  # fills
    "dipo": {},
}


@pytest.mark.parametrize("name", CHOSEN)
def test_updates_are_those_of_rollouts_that_are_not_merged(name, tmp_path, monkeypatch):
    method, settings = method_named(name), CHOSEN[name]
    merged, seen = trained(method, tmp_path / "merged", monkeypatch, **settings)
    apart, expected = trained(method, tmp_path / "apart", monkeypatch, merge_adapter_for_rollout=False, **settings)
    assert all(one.merged for one in seen) and not any(one.merged for one in expected)
    assert len(seen) == len(expected) >= 2
    for one, other in zip(seen, expected, strict=True):
        assert torch.equal(one.trajectory.completion_ids, other.trajectory.completion_ids)
    close(merged, apart, 2e-5)


def test_one_update_is_the_same_to_a_millionth(tmp_path, monkeypatch):
    settings = {"max_steps": 1, "learning_rate": 0.1}
    merged, _ = trained(AGRPO, tmp_path / "merged", monkeypatch, **settings)
    apart, _ = trained(AGRPO, tmp_path / "apart", monkeypatch, merge_adapter_for_rollout=False, **settings)
    close(merged, apart)
    assert merged.state.log_history[0]["rollout/max_abs_log_ratio"] < 1e-5


def test_every_rollout_is_drawn_with_the_adapter_as_it_is_then(tmp_path, monkeypatch):
    _, seen = trained(AGRPO, tmp_path, monkeypatch)  # which compares weights with base and adapter
    assert len(seen) == 3
    assert not torch.equal(seen[0].weight, seen[1].weight) and not torch.equal(seen[1].weight, seen[2].weight)


def test_an_error_in_a_rollout_leaves_every_bit(tmp_path, monkeypatch):
    trainer = AGRPO.make(tmp_path, peft_config=lora())
    before = Unchanged(trainer.model)

    def fail(*args, **kwargs):
        assert all(layer.merged for layer in layers(trainer.model))
        raise FloatingPointError("logits are not finite")

    monkeypatch.setattr(RolloutEngine, "sample", fail)
    with pytest.raises(FloatingPointError):
        trainer.train()
    before.check()


def test_evaluations_in_training_are_merged_too(tmp_path, monkeypatch):
    seen = []

    def measure(model, dataset):
        seen.append({layer.merged for layer in layers(model)})
        return Estimate.of(1, len(dataset))

    trainer = AGRPO.make(tmp_path, peft_config=lora())
    trainer.add_callback(AccuracyCallback(trainer, Dataset.from_dict({"prompt": PROMPTS}), measure))
    before = Unchanged(trainer.model)
    trainer.train()
    assert seen == [{True}, {True}] and not any(layer.merged for layer in layers(trainer.model))
    trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS}))
    assert before.parameters.keys() == dict(trainer.model.named_parameters()).keys()


@pytest.mark.slow
def test_a_run_that_stops_within_a_rollout_resumes_as_it_was(tmp_path, monkeypatch):
    """Three updates of each rollout; the checkpoint is one update into the second rollout."""

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    settings = {
        "max_steps": 7,
        "num_iterations": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "peft_config": lora(),
        "learning_rate": 0.1,
        "reward": never_ties,
    }
    whole, _ = trained(AGRPO, tmp_path / "whole", monkeypatch, **settings)

    def resumed(folder: Path, **more):
        torch.manual_seed(0)
        first = AGRPO.make(folder, **settings)
        first.add_callback(Killed())
        first.train()
        torch.manual_seed(0)
        second = AGRPO.make(folder, **settings | more)
        second.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        return second

    again = resumed(tmp_path / "again")
    assert again.state.global_step == 7
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    close(whole, resumed(tmp_path / "other", merge_adapter_for_rollout=False), 2e-5)  # the setting may change


def test_the_report_says_what_is_done(tmp_path):
    from test_startup_report import shown

    merged = AGRPO.make(tmp_path, peft_config=lora())
    assert "the adapter is merged, with a copy of its layers' weights (17 KiB)" in " ".join(shown(merged).split())
    off = AGRPO.make(tmp_path, peft_config=lora(), merge_adapter_for_rollout=False)
    assert "the adapter is not merged: merge_adapter_for_rollout is off" in shown(off)
    assert "in rollouts" not in shown(AGRPO.make(tmp_path))
    copied = merged.as_run(), off.as_run()
    from trl_diffusion.runtime.activations import rollout_activations

    more, less = (rollout_activations(run).rollout for run in copied)
    assert more - less == merged_bytes(merged.model)


# ---------------------------------------------------------------- cast once


class Casts(TorchDispatchMode):
    """Counts operations that copy a tensor to another dtype."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_to_copy"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_that_are_cast_once_compute_the_same_bits_with_fewer_casts(dtype):
    model = adapted(tiny_model(3).to(dtype)).eval()
    ids = torch.tensor([[2, 3, 4, 4], [3, 3, 2, 4]])
    before, logits, casts = Unchanged(model), [], []
    for context in (cast_adapter(model, torch.bfloat16), None):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as counted:
            if context is None:
                logits.append(model(input_ids=ids).logits)
            else:
                with context:
                    start = counted.count
                    logits.append(model(input_ids=ids).logits)
                    counted.count -= start
        casts.append(counted.count)
    before.check()
    assert torch.equal(*logits)
    assert casts[0] <= casts[1] - 2 * 14  # the two matrices of 14 layers


@pytest.mark.parametrize("network", ["DoRA", "experts"])
def test_other_kinds_are_not_cast(network):
    model = NETWORKS[network]()
    plain = [name for name, weight in model.named_parameters() if "lora_" in name and "experts" in name]
    with cast_adapter(model, torch.bfloat16):
        cast = [name for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16]
    assert not cast if network == "DoRA" else cast and not set(cast) & set(plain)


def test_updates_under_autocast_are_the_same_bit_for_bit(tmp_path, monkeypatch):
    cast, _ = trained(AGRPO, tmp_path / "cast", monkeypatch, bf16=True)
    assert cast.rollout_adapter.cast_to == torch.bfloat16 and "computed in bf16" in cast.rollout_adapter.obstacle
    monkeypatch.setattr(rollout_adapter, "_AUTOCAST", {})
    plain, _ = trained(AGRPO, tmp_path / "plain", monkeypatch, bf16=True)
    assert plain.rollout_adapter.cast_to is None
    assert all(torch.equal(a, b) for a, b in zip(cast.model.parameters(), plain.model.parameters(), strict=True))


def test_all_methods_have_the_setting():
    assert all(method.config.__dataclass_fields__["merge_adapter_for_rollout"].default is None for method in METHODS)
