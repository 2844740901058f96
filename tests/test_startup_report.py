"""The start-up report: its forward units, FLOP and memory against what is counted, and the dry run."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import METHODS, method_named
from peft import LoraConfig
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.runtime import cost
from trl_diffusion.runtime.report import startup_report
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.cost import head_positions
from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import DiffusionGRPOTrainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
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
# One method for every way to go through views.
REPRESENTATIVE = ("agrpo", "diffu_grpo", "espo", "tracerl")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(
            method.name,
            settings,
            id=f"{method.name}, {schedule}",
            marks=[] if schedule == "plain" or method.name in REPRESENTATIVE else pytest.mark.thorough,
        )
        for method in METHODS
        if method.credit != "process_reward"
        for schedule, settings in SCHEDULES.items()
    ],
)
def test_forward_units_are_those_that_a_run_logs(name, settings, tmp_path, monkeypatch):
    method = method_named(name)
    # different ones of one length: shares of columns depend on it, and rows with the same prompt share its pass
    monkeypatch.setattr("methods.PROMPTS", [" ".join(words) for words in product("ab", repeat=3)])
    updates = {"max_steps": 2, "learning_rate": 0.01}
    views = method.many_views if "num_iterations" in settings else method.few_views
    trainer = method.make(tmp_path, model=method.network(**ENDLESS), **updates | views | settings)
    expected = cost.forward_units(trainer.as_run())
    trainer.train()
    assert trainer.forward_units == pytest.approx(2 * expected.total)
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


# ---------------------------------------------------------------- the dry run


def start(name: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 0


@pytest.mark.parametrize("name", ["gsm8k_agrpo", "gsm8k_atpo", "gsm8k_diffu_grpo", "countdown_sapo"])
def test_a_dry_run_of_a_recipe_neither_samples_nor_trains(name, tmp_path, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("a dry run must not do this")

    monkeypatch.setattr(sys, "argv", [name, "--dry_run", "--use_cpu", "--output_dir", str(tmp_path / "out")])
    for method in ("train", "_generate_single_turn", "save_model"):
        monkeypatch.setattr(DiffusionGRPOTrainer, method, never)
    start(name)
    assert capsys.readouterr().out.count("forward units") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.thorough
def test_a_dry_run_on_two_processes_reports_once_and_exits_with_0(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port, "--config_file"]
    command += ["trl_diffusion/accelerate_configs/cpu_ddp.yaml", "recipes/gsm8k_agrpo.py", "--dry_run"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("forward units") == 1 and "× 2 processes = 128 completions" in result.stdout
    assert "held-out accuracy" not in result.stdout


def test_a_dry_run_checks_the_columns(tmp_path, monkeypatch):
    task = TASKS["word_problems"]
    without = replace(task, load=lambda *args, **settings: task.load(*args, **settings).remove_columns("answer"))
    monkeypatch.setitem(TASKS, "word_problems", without)
    monkeypatch.setattr(
        sys, "argv", ["gsm8k_agrpo", "--dry_run", "--use_cpu", "--debug", "--output_dir", str(tmp_path)]
    )
    with pytest.raises(ValueError, match="no column 'answer'"):
        start("gsm8k_agrpo")


def test_a_dry_run_checks_the_number_of_rows(tmp_path, monkeypatch):
    few = ["--dataset_size", "5", "--per_device_train_batch_size", "64", "--num_generations", "8"]
    monkeypatch.setattr(sys, "argv", ["gsm8k_agrpo", "--dry_run", "--debug", *few, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="train_dataset has 5 rows, and a rollout batch needs 8 prompts"):
        start("gsm8k_agrpo")


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
