"""The dry run: without weights, GPU or Hub it gives the figures of the real start-up report, and the real errors."""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from launching import accelerate_launch, run
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig

from trl_diffusion.cli import train
from trl_diffusion.cli.dry_run import DryRunArguments, planned
from trl_diffusion.cli.names import CONFIGS
from trl_diffusion.credit import StepAwareReward
from trl_diffusion.models.embedded import EMBEDDED_MODEL, EMBEDDED_SDAR_MODEL
from trl_diffusion.models.meta_model import empty_model
from trl_diffusion.models.published import PUBLISHED, published_config
from trl_diffusion.runtime.dry_run import DryRun
from trl_diffusion.runtime.forecast import Evaluation, Machine, duration
from trl_diffusion.runtime.planned_launch import Launch
from trl_diffusion.runtime.stand_ins import CHARACTERS_PER_TOKEN, stand_in_tokenizer
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import METHODS, DiffusionGRPOTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
LORA = LoraConfig(r=4, target_modules="all-linear")
FOUR_BIT: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SMALL: dict[str, Any] = {
    "max_completion_length": 32,
    "block_length": 8,
    "denoising_steps": 16,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "num_mc_samples": 2,
    "max_steps": 4,
}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("trl_diffusion.runtime.dry_run.hub_is_reachable", lambda: False)


def reward(completions, **columns) -> list[float]:
    return [0.0] * len(completions)


# ---------------------------------------------------------------- the same figures as the real report


def arguments_of(method: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """Arguments of a trainer but for model and quantisation."""
    common: dict[str, Any] = {"bf16": False, "report_to": [], "gradient_checkpointing": False, "use_cpu": True}
    given: dict[str, Any] = {
        "processing_class": AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left"),
        "train_dataset": load_word_problems("train", 24, 0),
    }
    if method == "sft":
        config: Any = SFTConfig(str(folder), max_completion_length=32, max_steps=4, **common | settings)
        return given | {"args": config}
    config = METHODS[method].config_class(str(folder), **SMALL | common | settings)
    return given | {"args": config, "reward_funcs": [reward]}


RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all weights": ("agrpo", {}, {}),
    "LoRA and gradient checkpointing": ("agrpo", {"peft_config": LORA}, {"gradient_checkpointing": True}),
    "QLoRA in bfloat16": (
        "agrpo",
        {"peft_config": LORA, "quantization_config": BitsAndBytesConfig(**FOUR_BIT)},
        {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True},
    ),
    "a reference model": ("diffu_grpo", {}, {"num_iterations": 2, "num_mc_samples": 1}),
    "a step-aware reward": (
        "diffu_grpo",
        {"reward_funcs": [StepAwareReward(reward, success_threshold=1.0)]},
        {"num_iterations": 1, "num_mc_samples": 1, "beta": 0.0},
    ),
    "the block-causal model": ("dipo", {}, {"block_length": 4, "num_mc_samples": 0, "denoising_steps": 32}),
    "masked SFT": ("sft", {"peft_config": LORA}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_figures_are_those_of_the_real_report(name, tmp_path):
    method, given, settings = RUNS[name]
    trainer_class: Any = SFTTrainer if method == "sft" else METHODS[method]
    model = EMBEDDED_SDAR_MODEL if method == "dipo" else EMBEDDED_MODEL
    real = trainer_class(model=model, **arguments_of(method, tmp_path, **settings) | given)
    expected = real.figures(real.as_run())

    dry = DryRun(Launch(), prompt_tokens=200)
    quantization = given.get("quantization_config")
    others = {key: value for key, value in given.items() if key != "quantization_config"}
    with dry.active():
        arguments = arguments_of(method, tmp_path, **settings) | others
        policy = dry.policy(model, arguments["args"].model_init_kwargs or {}, quantization)
        planned_trainer = dry.build(trainer_class, model=policy, **arguments)
        run = planned_trainer.as_run()
        found = planned_trainer.figures(run)
    assert {weight.device.type for weight in run.model.parameters()} == {"meta"}
    assert found.facts == expected.facts
    assert (found.flop, found.length) == (expected.flop, expected.length) and found.flop > 0
    assert (found.memory, found.activations) == (expected.memory, expected.activations)
    assert dry.notes == []


# ---------------------------------------------------------------- 8B, offline


def report_of(capsys, monkeypatch, *arguments: str) -> dict[str, str]:
    """Facts of the report that a command prints, and under "tables" all of it."""
    monkeypatch.setenv("COLUMNS", "400")
    train.main([*arguments, "--dry_run"])
    text = capsys.readouterr().out
    panel = text[text.index("╭") :]
    rows = [line.strip("│ ").split("  ", 1) for line in panel.splitlines() if "┃" not in line]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2} | {"tables": panel}


LLADA, LLADA_LORA_64 = 8_015_581_184, 167_772_160
EXPECTED = {
    "agrpo": (
        ["agrpo", "--config", "llada_8b/gsm8k_agrpo", "--accelerate_config", "zero2"],
        {
            "launch": "8 processes, DeepSpeed ZeRO-2, pretended by one",
            "model": f"GSAI-ML/LLaDA-8B-Instruct, {(LLADA + LLADA_LORA_64) / 1e9:.3g} billion parameters, 168 million",
            "attention": "full, sdpa, bfloat16 (computed in bf16)",
            "data": "openai/gsm8k: rows not read, offline; 1,319 problems held out",
            "rewards": "correctness_reward, 0.2 × format_reward",
            "update": "8 per device × 4 micro-batches × 8 processes = 256 completions",
            "run": "500 updates: 128,000 completions, 49.2 million tokens if no text ends early",
            "learning rate": "5e-06, cosine, 5 updates of warm-up",
            "assumed": "a token is 3 characters",
            "not checked": "weights, which are not read",
        },
    ),
    "QLoRA": (
        ["agrpo", "--config", "llada_8b/gsm8k_agrpo_qlora", "--accelerate_config", "multi_gpu"],
        {"quantisation": "4 bit nf4, double quantisation, computed in bfloat16", "launch": "8 processes, DDP"},
    ),
    "block-causal": (
        ["dipo", "--config", "sdar_8b/gsm8k_dipo", "--world_size", "16"],
        {
            "model": "JetLM/SDAR-8B-Chat, 8.54 billion parameters",
            "attention": "causal over blocks of 4",
            "update": "8 per device × 2 micro-batches × 16 processes = 256 completions",
        },
    ),
    "SFT": (
        ["sft", "--config", "llada_8b/sft", "--world_size", "2", "--dataset_size", "7473"],
        {
            # 7,473 rows in batches of 2 × 1, four of which make an update, three times
            "run": f"{3 * 935:,} updates = 3 epochs",
            "update": "1 per device × 4 micro-batches × 2 processes = 8 rows",
            "assumed": "there are 7,473 rows",
        },
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_laptop_reports_on_8b_without_the_hub(name, offline, capsys, monkeypatch):
    arguments, facts = EXPECTED[name]
    found = report_of(capsys, monkeypatch, *arguments)
    for fact, text in facts.items():
        assert text in found[fact], fact
    assert "does not fit" not in found["tables"]


@pytest.mark.thorough
@pytest.mark.parametrize("config", sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*_8b/*")))
def test_every_configuration_of_a_large_model_can_be_planned(config, offline, capsys, monkeypatch):
    if config.endswith("evaluate.yaml"):
        return
    settings = (CONFIGS / config).read_text()
    by_file = {"sft": "sft", "gsm8k_agrpo": "agrpo", "gsm8k_agrpo_qlora": "agrpo", "gsm8k_atpo": "atpo"}
    by_file["gsm8k_diffu_grpo"] = "diffu_grpo"
    method = [] if "\nmethod: " in settings else [by_file[Path(config).stem]]
    found = report_of(capsys, monkeypatch, *method, "--config", config, "--accelerate_config", "zero2")
    assert ("8 processes" in found["update"] and "hours" in found["time"]) or method == ["sft"]


def test_what_does_not_fit_is_marked(offline, capsys, monkeypatch):
    command = ["diffu_grpo", "--config", "llada_8b/gsm8k_diffu_grpo", "--use_peft", "false", "--world_size", "8"]
    found = report_of(capsys, monkeypatch, *command)["tables"]
    assert "total: hardly fits" in found and "does not fit" not in found
    command += ["--gpu_gib", "70"]
    found = report_of(capsys, monkeypatch, *command)["tables"]
    assert "total: does not fit" in found and "weights: does not fit" not in found
    # 14.9 GiB of weights, gradients and reference, and 29.9 GiB of AdamW's two averages in bfloat16
    assert found.count("14.9 GiB") >= 3 and "29.9 GiB" in found
    offloaded = report_of(capsys, monkeypatch, *command, "--accelerate_config", "zero3_offload")["tables"]
    assert "does not fit" not in offloaded and "optimizer, on the CPU" in offloaded
    # DeepSpeed's copy and averages in float32, an eighth on every process
    assert f"{3 * 4 * LLADA / 8 / 2**30:.3g} GiB" in offloaded


BLOCKS_OF_32 = ["--block_length", "32", "--denoising_steps", "192"]
FAMILIES = {
    "Dream-org/Dream-v0-Instruct-7B": [],
    "JetLM/SDAR-30B-A3B-Chat": ["--block_length", "4", "--denoising_steps", "192"],
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": [],
    "inclusionAI/LLaDA2.0-mini": BLOCKS_OF_32,
    "Efficient-Large-Model/Fast_dLLM_v2_7B": BLOCKS_OF_32,
    "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": [],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_of_every_family_can_be_planned(name, offline, capsys, monkeypatch):
    command = ["agrpo", "--config", "llada_8b/gsm8k_agrpo", "--model_name_or_path", name, *FAMILIES[name]]
    found = report_of(capsys, monkeypatch, *command, "--accelerate_config", "single_gpu")
    assert name in found["model"] and "hours" in found["time"] and "does not fit" not in found["tables"]


def test_sizes_of_published_checkpoints():
    expected = {
        "GSAI-ML/LLaDA": LLADA,
        "Dream-org": 7_615_616_512,
        "JetLM/SDAR-8B": 8_190_735_360,
        "JetLM/SDAR-30B": 30_532_122_624,
        "inclusionAI/LLaDA2.0-mini": 16_255_638_528,
        "inclusionAI/LLaDA2.1-mini": 16_255_638_528,
        "inclusionAI/LLaDA2.0-flash": 102_889_697_280,
        "inclusionAI/LLaDA2.1-flash": 102_889_697_280,
        "Efficient-Large-Model/Fast_dLLM_v2_7B": 7_615_616_512,
        "Efficient-Large-Model/Fast_dLLM_v2_1.5B": 1_543_714_304,
        "inclusionAI/LLaDA-MoE": 7_356_880_896,
        "dllm-hub/Qwen3": 596_049_920,
        "dllm-hub/Qwen2.5": 494_032_768,
    }
    for name in PUBLISHED:
        model = empty_model(published_config(name), "bfloat16")
        assert [model.num_parameters()] == [count for prefix, count in expected.items() if name.startswith(prefix)]
        assert model.family.mask_token_id is not None
        routers = {torch.float32} if "LLaDA2" in name else set()
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16} | routers


# ---------------------------------------------------------------- what is read, and what stands in for it


def test_files_at_hand_are_read_also_without_the_hub(offline, capsys, monkeypatch):
    found = report_of(capsys, monkeypatch, "agrpo")
    assert found["data"] == (
        "word_problems, generated problems: 4,000 rows, prompts padded to 29 tokens on average; 256 problems held out"
    )
    assert found["assumed"] == "nothing about model and data, which were read"
    assert found["run"].startswith("80 updates = 0.16 epochs")


def test_a_missing_file_is_an_error_where_the_hub_answers(monkeypatch):
    def absent():
        raise OSError("no such model")

    def unreachable():
        raise ConnectionError("no such data")

    monkeypatch.setattr("trl_diffusion.runtime.dry_run.hub_is_reachable", lambda: True)
    dry = DryRun(Launch(), 200)
    with dry.active():
        with pytest.raises(OSError, match="no such model"):
            dry.tokenizer(absent)
        with pytest.raises(ConnectionError, match="no such data"):
            dry.rows(unreachable, {}, stand_in_tokenizer(), 4)
    monkeypatch.setattr("trl_diffusion.runtime.dry_run.hub_is_reachable", lambda: False)
    with dry.active():
        tokenizer = dry.tokenizer(absent)
        rows, held_out = dry.rows(unreachable, {"answer": None}, tokenizer, 4)
    assert len(rows) == 4 and set(rows.column_names) == {"prompt", "completion", "answer"} and len(held_out) == 1
    assert abs(len(tokenizer(rows["prompt"][0])["input_ids"]) - 200) <= 7 / CHARACTERS_PER_TOKEN
    assert len(dry.notes) == 2


def test_a_model_that_nothing_is_known_of_is_an_error(offline):
    dry = DryRun(Launch(), 200)
    with (
        dry.active(),
        pytest.raises(ValueError, match="sizes do not come with trl_diffusion as those of GSAI-ML/LLaD"),
    ):
        dry.policy("someone/LLaDA-9B", {}, None)


# ---------------------------------------------------------------- the launch


def test_a_launcher_says_what_to_report_on_and_its_environment_is_left_alone(monkeypatch):
    launched = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "8",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with planned(["--dry_run"]) as launch:
        assert str(launch) == "8 processes, DeepSpeed ZeRO-3"
        assert {name: os.environ.get(name) for name in launched} == dict.fromkeys(launched) | {
            "ACCELERATE_MIXED_PRECISION": "bf16"
        }
        # a group of 8 needs all of 8 processes, and bfloat16 is not refused
        config = METHODS["agrpo"].config_class(
            "out", per_device_train_batch_size=1, num_generations=8, bf16=True, report_to=[]
        )
        assert (config.world_size, config.generation_batch_size) == (8, 8)
    assert {name: os.environ[name] for name in launched} == launched
    with planned([]) as launch:
        assert launch is None
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stopped, planned(["--dry_run"]):
        pass
    assert stopped.value.code == 0


def test_a_file_of_settings_can_ask_for_a_dry_run(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("dry_run: true\naccelerate_config: zero2\nworld_size: 4\n")
    with planned(["--config", str(path)]) as launch:
        assert str(launch) == "4 processes, DeepSpeed ZeRO-2"
    with planned(["--config", str(path), "--dry_run", "false"]) as launch:
        assert launch is None


# ---------------------------------------------------------------- what a real run would refuse

SDAR = ["dipo", "--config", "sdar_8b/gsm8k_dipo"]
AGRPO_8B = ["agrpo", "--config", "llada_8b/gsm8k_agrpo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*AGRPO_8B, "--world_size", "3", "--num_generations", "7"],
            r"num_generations \(7\) must divide.*3 proc",
        ),
        ([*AGRPO_8B, "--lora_target_modules", "q_project"], "LoRA target 'q_project' matches no linear layer"),
        ([*AGRPO_8B, "--denoising_steps", "336", "--max_completion_length", "4032"], "4096"),
        ([*SDAR, "--block_length", "8"], "writes blocks of 4 tokens"),
        ([*AGRPO_8B, "--accelerate_config", "zero2_offload", "--optim", "sgd"], "silently become DeepSpeed's Adam"),
        ([*AGRPO_8B, "--accelerate_config", "zero2", "--nonfinite_update", "skip"], "does not work with DeepSpeed"),
        ([*AGRPO_8B, "--deepspeed", "zero3.json"], "not from --deepspeed"),
        ([*AGRPO_8B, "--reward_weights", "1.0"], "reward weights"),
        ([*AGRPO_8B, "--accelerate_config", "zero22"], "zero22"),
        ([*AGRPO_8B, "--assumed_share", "25"], "assumed_share is a share of the peak"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_settings_that_a_run_would_refuse_are_refused(arguments, message, offline):
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        train.main([*arguments, "--dry_run"])


def test_options_of_a_dry_run_are_refused_without_one():
    for name, value in {"world_size": 8, "peak_tflops": 312.0, "gpu_gib": 40.0, "accelerate_config": "zero2"}.items():
        with pytest.raises(ValueError, match=f"{name} is about a dry run.*Add --dry_run"):
            DryRunArguments(**{name: value})
    DryRunArguments(dry_run=True, world_size=8)


# ---------------------------------------------------------------- hours

DECODING = SamplingConfig(32, 16, 8, temperature=0.0, unmasking="max_prob")


def test_hours_follow_from_the_operations(tmp_path):
    trainer: Any = METHODS["agrpo"](model=EMBEDDED_MODEL, **arguments_of("agrpo", tmp_path))
    run = replace(trainer.as_run(), launch=Launch(processes=4))
    figures = replace(trainer.figures(run), flop=9e14)
    machine = Machine(peak_tflops=100.0, share=0.25, gib=80.0)
    # 4 updates of 9e14 operations at 4 × 25e12 a second
    assert duration(run, figures, machine, None).startswith("about 36 s if no text ends early: 36 s of training")
    evaluation = Evaluation(problems=100, every=2, between=10, decoding=DECODING)
    assert evaluation.completions(updates=9) == 2 * 100 + 4 * 10  # after 2, 4, 6 and 8 updates
    # greedy decoding takes the cost of the rollout's steps, for other problems than those of training
    each = evaluation.flop(run, 9) / 240
    rollout = trainer.figures(run).costs
    assert each > 0 and rollout.row_count == 3
    assert replace(run, launch=Launch(4, fsdp=True)).launch.zero_stage == 3
    sharded = evaluation.flop(replace(run, launch=Launch(4, fsdp=True)), 9)
    assert sharded == pytest.approx(4 * 240 * each)  # under FSDP every process decodes all problems


def test_a_stand_in_counts_three_characters_as_a_token():
    ids = stand_in_tokenizer()("seven w", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "x" * 300}]]})
    templated = stand_in_tokenizer().apply_chat_template(rows["prompt"][0], add_generation_prompt=True)
    assert 105 <= len(templated["input_ids"]) <= 112


# ---------------------------------------------------------------- the recipes


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
    assert not [*(tmp_path / "out").glob("*")]


@pytest.mark.thorough
@pytest.mark.release
def test_a_dry_run_on_two_processes_reports_once_and_exits_with_0(tmp_path):
    command = [*accelerate_launch("cpu_ddp"), "recipes/gsm8k_agrpo.py", "--dry_run"]
    command += ["--output_dir", str(tmp_path / "out")]
    code, output = run(command, tmp_path, COLUMNS="200")
    assert code == 0, output[-4000:]
    assert output.count("forward units") == 1 and "× 2 processes = 128 completions" in output
    assert "2 processes, DDP, pretended by one" in output and "gain" not in output


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
