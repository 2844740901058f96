"""The start-up report: its forward units, FLOP and memory against what is counted."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launches import peak_of
from methods import METHODS, method_named
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.runtime import activations, cost
from trl_diffusion.runtime.outlook import Disk, rollout_length
from trl_diffusion.runtime.report import startup_report
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.cost import head_positions
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import DiffusionGRPOTrainer

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0)


def shown(trainer, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(startup_report(trainer.as_run()))
    return console.export_text()


# Texts never end, so that every rollout takes all its steps: the only end id has no token.
ENDLESS: dict[str, Any] = {"vocab_size": 6, "num_tokens": 5, "end_token_ids": [5]}


# ---------------------------------------------------------------- forward units


SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "inner updates": {"num_iterations": 2, "denoising_steps": 8},
    "several updates from a rollout": {"steps_per_generation": 4},
    "several rollouts for an update": {"steps_per_generation": 1, "per_device_train_batch_size": 4},
}
# One method for every way to go through views, or to score more than its own.
REPRESENTATIVE = ("agrpo", "diffu_grpo", "espo", "tracerl", "egspo", "stable_drl")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(method.name, settings, id=f"{method.name}, {schedule}")
        for method in METHODS
        if method.credit != "process_reward"
        for schedule, settings in SCHEDULES.items()
        if schedule == "plain" or method.name in REPRESENTATIVE
    ],
)
def test_forward_units_are_those_that_a_run_logs(name, settings, tmp_path, monkeypatch):
    method = method_named(name)
    # different ones of one length: shares of columns depend on it, and rows with the same prompt share its pass
    monkeypatch.setattr("methods.PROMPTS", [" ".join(words) for words in product("ab", repeat=3)])
    updates = {"max_steps": 4, "learning_rate": 0.01}  # of whole rollouts
    if method.name == "fork_grpo":
        updates["confidence_threshold"] = 1.0  # nothing is certain, so every step commits one token
    views = method.many_views if "num_iterations" in settings else method.few_views
    trainer = method.make(tmp_path, model=method.network(**ENDLESS), **updates | views | settings)
    expected = cost.forward_units(trainer.as_run())
    trainer.train()
    assert trainer.forward_units == pytest.approx(4 * expected.total)
    if name in ("agrpo", "atpo", "diffu_grpo"):
        assert bool(expected.old) == bool(expected.reference) == (name == "diffu_grpo")


def test_texts_that_end_early_cost_less(tmp_path):
    trainer = method_named("agrpo").make(tmp_path)
    expected = cost.forward_units(trainer.as_run())
    trainer.train()
    assert expected.training < trainer.forward_units < expected.total


@pytest.mark.parametrize("state", ["block", "keep", "prefix"])
@pytest.mark.parametrize("baseline", ["group", "earlier_state"])
def test_continuations_cost_at_most_what_is_said(state, baseline, tmp_path):
    def probe(reward):
        masks = {} if state == "keep" else {"num_mask_tokens": 3}
        return StepAwareReward(
            reward, success_threshold=-1.0, state=state, baseline=baseline, form="mean_normalised", **masks
        )

    method = replace(method_named("sapo"), wrap=probe)
    trainer = method.make(tmp_path, model=method.network(**ENDLESS), logging_steps=1)
    expected = cost.forward_units(trainer.as_run())
    trainer.train()
    probed = trainer.state.log_history[0]["step_aware/forward_units"]
    assert 0 < probed <= expected.probe
    assert trainer.forward_units - probed == pytest.approx(expected.total - expected.probe)


# ---------------------------------------------------------------- floating-point operations


def embedded_trainer(method: str, folder, peft_config=None, **settings) -> DiffusionGRPOTrainer:
    """One update of the embedded model on word problems, on texts that never end."""
    # the counter knows matrix products, not the CPU's fused attention
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, attn_implementation="eager")
    model.config.end_token_ids = [model.config.mask_token_id]
    small = dict(max_completion_length=32, block_length=8, denoising_steps=16, num_mc_samples=2, logging_steps=1)
    trainer = method_named(method).make(folder, model=model, peft_config=peft_config, **small | settings)
    trainer.processing_class = trainer._tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left")
    trainer.train_dataset = load_word_problems("train", 4, 0)
    return trainer


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("agrpo", {}),
        ("agrpo", {"peft_config": LORA}),
        ("agrpo", {"gradient_checkpointing": True}),
        ("agrpo", {"peft_config": LORA, "gradient_checkpointing": True}),
        ("atpo", {}),
        ("diffu_grpo", {"num_iterations": 1}),
        ("diffu_grpo", {"num_iterations": 1, "unmasking": "random", "peft_config": LORA, "beta": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "full",
)
def test_flop_are_those_that_torch_counts(method, settings, tmp_path):
    """Exactly in full training. Not counted: behind a frozen embedding the first layer's input gradient (0.5 %), with
    checkpointing the last product of each layer, which is not computed again (1.7 %)."""
    trainer = embedded_trainer(method, tmp_path, **settings)
    expected = cost.update_flop(trainer.as_run())
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    exact = not {"peft_config", "gradient_checkpointing"} & settings.keys()
    assert counter.get_total_flops() == pytest.approx(expected.total, rel=1e-3 if exact else 0.02)


def test_prompts_are_padded_to_the_longest_of_a_rollout(tmp_path):
    trainer = method_named("agrpo").make(tmp_path)  # four prompts at a time
    assert [len(prompt.split()) for prompt in trainer.train_dataset["prompt"]] == [2, 3, 1, 4, 2, 1, 2, 3]
    assert trainer.prompt_length() == (4 + 3) / 2
    stream = trainer.train_dataset.to_iterable_dataset()
    trainer.train_dataset = stream
    assert trainer.prompt_length() == (4 + 3) / 2


def test_flop_of_one_pass():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, attn_implementation="eager")
    shape = cost.network_shape(model)
    ids, positions = torch.full((2, 50), 7), torch.arange(50, 50 - 9, -1).sub(1).expand(2, -1)
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, positions=positions, targets=torch.full((2, 9), 7))
    # the rotary embedding is a product of positions and frequencies: 2 · 50 · 12 a row at most
    assert counter.get_total_flops() == pytest.approx(2 * shape.forward_flop(50, 9), abs=2 * 2 * 50 * 12)
    with FlopCounterMode(display=False) as counter:
        output.log_probs.sum().backward()
    assert counter.get_total_flops() == pytest.approx(2 * shape.backward_flop(50, 9), rel=1e-6)


@pytest.mark.parametrize(
    ("unmasking", "record_signals", "positions"),
    [("random", False, 8), ("random", True, 2 * (4 + 2)), ("low_confidence", False, 2 * (4 + 2))],
)
def test_positions_of_the_head(unmasking, record_signals, positions):
    config = SamplingConfig(8, 4, 4, unmasking=unmasking, record_signals=record_signals)
    assert head_positions(config) == positions


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop", "adagrad"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_memory_is_that_of_the_tensors(optim, peft_config, tmp_path):
    trainer = embedded_trainer("diffu_grpo", tmp_path, peft_config, optim=optim, num_iterations=2)
    expected = cost.memory(trainer.as_run())
    assert cost.parameter_count(trainer.model) == sum(weight.numel() for weight in trainer.model.parameters())
    assert expected.weights == 4 * sum(weight.numel() for weight in trainer.model.parameters())
    assert expected.reference == (0 if peft_config else expected.weights)
    trainer.train()
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert expected.gradients == 4 * sum(weight.numel() for weight in trained)
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    size = sum(value.nbytes for value in states if torch.is_tensor(value) and value.dim() > 0)
    assert expected.optimizer == size
    buffer = sum(value.nbytes for part in trainer._buffered_inputs for value in part.values() if value is not None)
    assert expected.buffer == pytest.approx(buffer, rel=0.1)


def test_an_optimizer_that_is_not_known_is_said_to_be(tmp_path):
    trainer = method_named("agrpo").make(tmp_path, optim="adafactor")
    assert cost.memory(trainer.as_run()).optimizer is None
    assert "optimizer unknown" in shown(trainer)


# ---------------------------------------------------------------- the panel


def test_the_panel_says_what_the_run_is(tmp_path):
    trainer = method_named("diffu_grpo").make(
        tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"]), num_iterations=2, reward_timeout=5.0
    )
    text = shown(trainer)
    for part in (
        "trl_diffusion · diffu-GRPO",
        "arXiv 2504.12216",
        "llada: mask id 4, end ids 0, 1",
        "full, sdpa, float32",
        "LoRA, rank 4",
        "4 prompts × 4 completions = 16 completions, 2 updates from each",
        "8 per device × 2 micro-batches × 1 process = 16 completions",
        "3 per completion and update",
        "dropout, gradient clipping, gradient checkpointing",
        "reward_error=raise",
    ):
        assert part in text, part
    assert "KL" not in text and "time limit" not in text
    lines = [[cell.strip() for cell in line.split("│")] for line in text.splitlines()]
    units = {cells[2]: cells[3] for cells in lines if len(cells) > 5}
    assert units["old log-probabilities"] == "48"  # 16 completions × 3 views
    assert units["rollout"] == "32"  # 16 × 4 steps for two updates
    assert "q_proj       │ 2 of 2" in text and "k_proj       │ 0 of 2" in text


def test_the_panel_names_the_step_aware_reward_and_what_is_off(tmp_path):
    text = shown(method_named("sapo").make(tmp_path, beta=0.0, mask_truncated_completions=True))
    assert "step-aware reward (SAPO, arXiv 2510.01544)" in text and "continuations, at most" in text
    assert "off" in text and "KL" in text and "truncated completions (they do not learn)" in text
    assert "reference model" not in text


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_training_prints_the_panel_once_with_the_progress_bar(disable_tqdm, tmp_path, capsys):
    trainer = method_named("agrpo").make(tmp_path, disable_tqdm=disable_tqdm)
    assert "forward units" not in capsys.readouterr().out
    trainer.train()
    assert capsys.readouterr().out.count("forward units") == (0 if disable_tqdm else 1)


# ---------------------------------------------------------------- what is ahead


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 3},
        {"steps_per_generation": 4},
        {"steps_per_generation": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"max_steps": 2, "num_train_epochs": 5},
    ],
    ids=str,
)
def test_a_run_is_as_long_as_is_said(settings, tmp_path):
    trainer = method_named("diffu_grpo").make(
        tmp_path, **{"max_steps": -1, "num_train_epochs": 1.5, "num_iterations": 1, "num_mc_samples": 1} | settings
    )
    said = rollout_length(trainer.as_run())
    trainer.train()
    assert trainer.state.global_step == said.updates and said.epoch is not None
    if trainer.args.max_steps == -1:
        assert said.updates == -(-3 * said.epoch // 2)
    assert trainer.state.epoch == pytest.approx(said.updates / said.epoch, abs=1 / said.epoch)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("settings", [{}, {"save_total_limit": 2}, {"save_only_model": True}], ids=str)
def test_checkpoints_are_as_many_and_as_large_as_is_said(settings, peft_config, tmp_path):
    trainer = embedded_trainer(
        "agrpo",
        tmp_path,
        peft_config,
        optim="adamw_torch",
        max_steps=5,
        save_strategy="steps",
        save_steps=2,
        denoising_steps=4,
        **settings,
    )
    said = Disk.of(trainer.as_run(), 5)
    assert said.written == 3 and said.kept == settings.get("save_total_limit", 3)
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 5
    kept = sorted(tmp_path.glob("checkpoint-*"))
    assert len(kept) == said.kept
    weights = "model.safetensors" if peft_config is None else "adapter_model.safetensors"
    assert said.model == pytest.approx((tmp_path / weights).stat().st_size, rel=0.02 if peft_config is None else 0.1)
    size = sum((kept[-1] / name).stat().st_size for name in (weights, "optimizer.pt") if (kept[-1] / name).is_file())
    assert said.checkpoint == pytest.approx(size, rel=0.02 if peft_config is None else 0.15)


def test_learning_rate_and_rewards_are_named(tmp_path):
    trainer = method_named("agrpo").make(
        tmp_path,
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_steps=50,
        reward_weights=[0.5],
        save_strategy="steps",
        save_steps=10,
        save_total_limit=2,
    )
    text = shown(trainer)
    assert "2e-05, cosine, 3 updates of warm-up, sgd, weight decay 0" in text
    assert "0.5 × text_reward" in text and "8 rows, prompts padded to 4 tokens on average" in text
    # 8 prompts are two rollouts of 4, of which each is for one update
    assert "50 updates = 25 epochs: 800 completions, 6,400 tokens if no text ends early" in text
    assert "every 10 updates, the last 2 of 5 kept" in text


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("lora", "checkpointing", "autocast", "dtype"),
    [
        (False, False, False, torch.float32),
        (False, True, True, torch.float32),
        (True, False, False, torch.float32),
        (True, True, True, torch.bfloat16),
        (True, True, False, torch.bfloat16),
    ],
)
def test_activations_are_those_that_pytorch_allocates(lora, checkpointing, autocast, dtype):
    rows, tokens, read = 2, 96, 48
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "max_position_embeddings": 128}
    # a vocabulary so small that the head's logits, whose chunks are smaller on a CPU, hardly count
    model: Any = tiny_model(vocab_size=16, num_tokens=16, **sizes).to(dtype)
    if lora:
        model = get_peft_model(model, LORA)
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    ids, mask = torch.full((rows, tokens), 7), torch.ones(rows, tokens, dtype=torch.long)
    mask[:, 0] = 0  # padding, as almost every batch has
    places = torch.arange(tokens - read, tokens).expand(rows, -1)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, attention_mask=mask, positions=places, targets=ids[:, :read]).log_probs.sum()

    loss, held, forward_peak = peak_of(forward)
    _, _, backward_peak = peak_of(loss.backward)
    run: Any = SimpleNamespace(
        model=model,
        mixed_precision="bf16" if autocast else "no",
        args=SimpleNamespace(gradient_checkpointing=checkpointing),
    )
    expected = activations.training_bytes(run, rows, tokens, read)
    assert expected == pytest.approx(max(forward_peak, held + backward_peak), rel=0.25)


def test_shards_and_whole_weights_are_counted_together(tmp_path):
    """Under ZeRO-3 the weights of the base are in shards when the report is made, and those of an adapter are not."""
    trainer = method_named("agrpo").make(tmp_path, peft_config=LORA)
    count, memory = cost.parameter_count(trainer.model), cost.memory(trainer.as_run())
    for parameter in trainer.model.parameters():
        if not parameter.requires_grad:  # as DeepSpeed leaves them
            parameter.ds_numel = parameter.numel()
            parameter.data = parameter.data.new_empty(0)
    assert cost.parameter_count(trainer.model) == count and cost.memory(trainer.as_run()) == memory
    assert 0 < count == sum(map(cost.numel, trainer.model.parameters()))
