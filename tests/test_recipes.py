"""The recipes as a newcomer starts them, through `accelerate launch`."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from launching import HANG, accelerate_launch, run
from safetensors.torch import load_file
from start_matrix import LORA, start
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from trl_diffusion.cli import common, train
from trl_diffusion.models.embedded import EMBEDDED_MODEL, embedded_arguments
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.arguments import OPTIONS
from trl_diffusion.tasks.sudoku_sweeps import load_sudoku_sweeps
from trl_diffusion.trainers import METHODS, AGRPOConfig, ATPOConfig, DiffuGRPOConfig

ROOT = Path(__file__).parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train_first1000.jsonl"
CONFIGS = ROOT / "trl_diffusion" / "configs"
QUICK = ["--max_steps", "2", "--eval_size", "8", "--logging_steps", "1", "--num_mc_samples", "2"]

BY_HAND = [pytest.mark.thorough, pytest.mark.release]

pytestmark = pytest.mark.slow


def launch(folder: Path, script: str, *arguments: str, processes: str = "single_gpu") -> str:
    code, output = run([*accelerate_launch(processes), script, *arguments], folder)
    assert code == 0, output[-4000:]
    return output


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]


def run_recipe(name: str, monkeypatch, *arguments: str) -> None:
    """A recipe in this process, as one process on the CPU."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 0


def test_without_arguments_the_embedded_model_trains_and_says_so(tmp_path):
    out = tmp_path / "out"
    output = launch(tmp_path, "recipes/gsm8k_agrpo.py", *QUICK, "--output_dir", str(out))
    output = output.replace("\n", "")  # long paths wrap
    assert "training the bundled model" in output
    for word in ("before", "after", "gain", "curves.png", "Held-out problems", "Step 2"):
        assert word in output
    assert output.count("✓ ") + output.count("✗ ") == 6  # three problems, before and after
    completions = pd.read_parquet(out / "completions" / "completions_00002.parquet")
    assert len(completions) == 64 and {"prompt", "completion", "correctness_reward"} <= {*completions.columns}
    assert (out / "curves.png").stat().st_size > 10_000
    assert "2510.04019" in (out / "README.md").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "LLaDAModelLM"
    assert any("rollout/seconds" in entry for entry in history(out))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("recipe", "paper", "arguments"),
    [
        ("gsm8k_diffu_grpo", "2504.12216", []),
        ("gsm8k_atpo", "2511.15208", ["--plot_every", "1"]),
        ("countdown_sapo", "2510.01544", ["--num_rollouts", "2"]),
    ],
)
def test_other_methods_train_the_embedded_model(recipe, paper, arguments, tmp_path, monkeypatch, capsys):
    run_recipe(recipe, monkeypatch, *QUICK, *arguments, "--save_steps", "2", "--output_dir", str(tmp_path))
    output = capsys.readouterr().out
    assert "training the bundled model" in output and "gain" in output
    assert paper in (tmp_path / "README.md").read_text()
    assert any("forward_units" in entry for entry in history(tmp_path))
    if recipe == "gsm8k_atpo":
        assert (tmp_path / "confusion_zones" / "update_000001.png").stat().st_size > 10_000
    if recipe == "countdown_sapo":
        assert any(entry.get("step_aware/continuations", 0) > 0 for entry in history(tmp_path))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("recipe", "processes", "arguments"),
    [
        ("gsm8k_atpo", "cpu_ddp", []),
        pytest.param(
            "countdown_sapo",
            "cpu_zero3",
            ["--ds3_gather_for_generation", "false"],
            marks=pytest.mark.release,
        ),
    ],
)
def test_two_processes_train_like_one(recipe, processes, arguments, tmp_path, monkeypatch):
    """Same rewards, held-out accuracy and held-out samples, with half the rows on each process."""
    small = [*QUICK, "--save_steps", "2", "--max_grad_norm", "1.0", "--num_iterations", "1"]
    size = "--per_device_train_batch_size"
    run_recipe(recipe, monkeypatch, *small, size, "16", "--output_dir", str(tmp_path / "one"))
    two = [size, "8", "--output_dir", str(tmp_path / "two"), *arguments]
    launch(tmp_path, f"recipes/{recipe}.py", *small, *two, processes=processes)
    names = ("reward", "eval_accuracy", "step_aware/continuations", "step_aware/process_reward_mean")
    one, two = (
        [{name: entry[name] for name in names if name in entry} for entry in history(tmp_path / folder)]
        for folder in ("one", "two")
    )
    assert any("reward" in entry for entry in one)
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, abs=1e-5)
    kept = [(tmp_path / folder / "held_out_samples.jsonl").read_text() for folder in ("one", "two")]
    assert kept[0] == kept[1] and [json.loads(line)["row"] for line in kept[0].splitlines()] == [0, 1, 2] * 2


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not beside the project")
def test_real_questions_run_through_the_whole_job(tmp_path, monkeypatch, capsys):
    """With the questions that the embedded model has positions for; with a longer one the recipe stops at start."""
    path = tmp_path / "short.jsonl"
    lines = GSM8K.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if len(json.loads(line)["question"]) < 110))
    arguments = ["--dataset_path", str(path), "--output_dir", str(tmp_path), "--per_device_train_batch_size", "8"]
    run_recipe("gsm8k_agrpo", monkeypatch, *QUICK, *arguments)
    assert "of 8" in capsys.readouterr().out
    assert sum("reward" in entry for entry in history(tmp_path)) == 2


def test_lora_saves_an_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    run_recipe("gsm8k_agrpo", monkeypatch, *QUICK, *LORA, "--output_dir", str(tmp_path))
    output = capsys.readouterr().out
    assert "LoRA coverage" in output and "Adapter and model card" in output
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("recipe", "weights", "backend", "dry_run"),
    [
        ("gsm8k_agrpo", "lora", "cpu_zero3", False),
        pytest.param("gsm8k_agrpo", "full", "cpu_zero2_offload", True, marks=BY_HAND),
        pytest.param("gsm8k_diffu_grpo", "lora", "cpu_ddp", False, marks=BY_HAND),
    ],
)
def test_recipes_start_as_a_user_starts_them(recipe, weights, backend, dry_run, tmp_path):
    """No flag for the launch, with progress bar and report; `start_matrix.py` runs all combinations."""
    if backend not in ("single_gpu", "cpu_ddp"):
        pytest.importorskip("deepspeed")
    assert start(recipe, weights, backend, tmp_path / "out", dry_run) is None


TINY_RUN = ["--eval_size", "2", "--max_steps", "1", "--per_device_train_batch_size", "8", "--disable_tqdm", "true"]


@pytest.mark.parametrize(
    ("model", "name", "arguments"),
    [
        ("embedded_sdar", "gsm8k_agrpo", TINY_RUN),
        ("embedded_sdar", "gsm8k_atpo", TINY_RUN),
        ("embedded_sdar", "sft", TINY_RUN),
        ("embedded_sdar", "analyze_trajectories", ["--num_completions", "2"]),
        ("embedded_sdar", "evaluate", ["--limit", "2"]),
        ("embedded_chains", "gsm8k_atpo", TINY_RUN),
        ("embedded_chains", "sft", TINY_RUN),
        ("embedded_chains", "analyze_trajectories", ["--num_completions", "2"]),
        ("embedded_chains", "evaluate", ["--limit", "2"]),
        ("embedded_puzzles", "analyze_trajectories", ["--num_completions", "2"]),
        ("embedded_puzzles", "evaluate", ["--limit", "2"]),
    ],
)
def test_the_name_of_an_embedded_model_is_enough(model, name, arguments, tmp_path, monkeypatch):
    run_recipe(name, monkeypatch, "--model_name_or_path", model, *arguments, "--output_dir", str(tmp_path / "out"))
    assert any(path.suffix in (".png", ".json") for path in (tmp_path / "out").iterdir())


def test_a_curriculum_trains_on_few_blanks_first(tmp_path):
    """Four puzzles, one an update, in the order of their difficulty."""
    words = ["agrpo", "--task", "sudoku_sweeps", "--curriculum", "difficulty", "--dataset_size", "4", *TINY_RUN]
    words += ["--max_steps", "4", "--num_iterations", "1", "--logging_steps", "1", "--output_dir", str(tmp_path)]
    words += ["--denoising_steps", "6"]
    train.main(words)
    files = sorted((tmp_path / "completions").glob("*.parquet"))
    blanks = [{prompt[0]["content"].count("0") for prompt in pd.read_parquet(file)["prompt"]} for file in files]
    given = sorted(load_sudoku_sweeps("train", 4, 42)["difficulty"])
    assert blanks == [{count} for count in given] and len({*given}) > 2


def test_a_curriculum_needs_a_column_of_numbers():
    rows = Dataset.from_list([{"text": "b", "level": 2.5}, {"text": "a", "level": 1.0}])
    ordered, held_out = train.by_difficulty(lambda: (rows, rows), "level")
    assert ordered["text"] == ["a", "b"] and held_out["text"] == ["b", "a"]
    with pytest.raises(ValueError, match=r"a column of numbers\) must be one of level; got 'text'"):
        train.by_difficulty(lambda: (rows, rows), "text")
    with pytest.raises(ValueError, match="the data have no column of numbers, only text"):
        train.by_difficulty(lambda: (rows.remove_columns("level"), rows), "level")


@pytest.mark.thorough
def test_methods_that_need_full_attention_refuse_the_block_causal_embedded_model(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="noises the canvas as a whole, and sdar has block-causal attention"):
        run_recipe(
            "countdown_sapo",
            monkeypatch,
            "--model_name_or_path=embedded_sdar",
            *TINY_RUN,
            "--output_dir",
            str(tmp_path),
            "--debug",
        )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--config", "x"]),
        (["--max_steps", "3"], ["--config", "x", "--max_steps", "3"]),
        (["--model_name_or_path", "embedded"], ["--config", "x", "--model_name_or_path", "embedded"]),
        (
            ["--model_name_or_path=embedded_sdar"],
            ["--config", "x", "--block_length", "4", "--model_name_or_path=embedded_sdar"],
        ),
        (
            ["--model_name_or_path", "embedded_chains", "--block_length", "9"],
            [
                *("--config", "x", "--task", "chained_sums", "--block_length", "5"),
                *("--model_name_or_path", "embedded_chains", "--block_length", "9"),
            ],
        ),
        (
            ["--task", "chained_sums_fixed=embedded"],
            [
                *("--config", "x", "--task", "chained_sums", "--block_length", "5"),
                *("--model_name_or_path", "embedded_chains", "--task", "chained_sums_fixed=embedded"),
            ],
        ),
        (["--task", "countdown"], ["--config", "x", "--task", "countdown"]),
        (["--model_name_or_path", "embedded_sdar", "--config", "y"], None),
        (["--model_name_or_path", "GSAI-ML/LLaDA-8B-Instruct"], None),
        (["--adapter=z"], None),
    ],
)
def test_arguments_for_the_embedded_models(arguments, expected):
    options = {"task": "--task", "block_length": "--block_length"}  # of a command that draws on no canvas
    assert embedded_arguments(arguments, ["--config", "x"], options, "--adapter") == expected


def test_no_embedded_model_knows_all_tasks():
    asked = ["--tasks", "chained_sums", "countdown"]
    with pytest.raises(ValueError, match="embedded_chains is for chained_sums, embedded is for countdown"):
        embedded_arguments(asked, [], {"task": "--tasks"})
    assert embedded_arguments([*asked, "--model_name_or_path", "here"], [], {"task": "--tasks"}) is None


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gsm8k_agrpo", "sft"])
def test_recipes_train_an_adapter_further(name, tmp_path, monkeypatch, capsys):
    """Its shape and its base are its own, whatever the settings for new adapters are."""
    run_recipe(
        "gsm8k_agrpo", monkeypatch, *TINY_RUN, *LORA, "--learning_rate", "0.1", "--output_dir", str(tmp_path / "first")
    )
    config = CONFIGS / "embedded" / f"{name}.yaml"
    given = ["--config", str(config), "--model_name_or_path", str(tmp_path / "first"), "--use_peft", "--lora_r", "9"]
    given += ["--warmup_steps", "0"]
    run_recipe(name, monkeypatch, *given, *TINY_RUN, "--output_dir", str(tmp_path / "second"))
    output = capsys.readouterr().out
    assert f"is an adapter of {EMBEDDED_MODEL}: it is trained further as it is" in output.replace("\n", " ")
    assert "Adapter and model card" in output
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys() and all(second[key].shape == first[key].shape for key in first)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    saved = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert (saved["r"], saved["base_model_name_or_path"]) == (4, EMBEDDED_MODEL)


def test_a_dataset_without_answers_is_refused(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "2 + 2?"}\n' * 20)
    with pytest.raises(ValueError, match="GSM8K needs `question` and `answer`"):
        run_recipe("gsm8k_agrpo", monkeypatch, *QUICK, "--dataset_path", str(rows), "--debug")


def parsed(name: str, config: type, folder: str = "llada_8b") -> tuple:
    """Script, training and model arguments of a config of a large model."""
    parser = TrlParser((train.TrainArguments, config, ModelConfig))
    return parser.parse_args_and_config(["--config", str(CONFIGS / folder / f"{name}.yaml"), "--use_cpu"])


def test_the_agrpo_config_parses_to_the_papers_settings():
    script, config, model = parsed("gsm8k_agrpo", AGRPOConfig)
    assert (config.num_mc_samples, config.max_completion_length, config.block_length) == (24, 384, 12)
    assert (config.temperature, config.top_k, config.top_p, config.step_draws) == (0.6, 150, 0.99, "entropy")
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64, 64, 0.0)
    assert model.lora_target_modules in ("all-linear", ["all-linear"])
    greedy = SamplingConfig(256, 128, 32, temperature=0.0, unmasking="max_prob", record_support=False)
    assert script.decoding(config) == greedy and script.eval_batch_size == 64


def test_every_decoding_option_of_training_has_one_for_held_out_problems():
    script = common.RecipeArguments
    assert {f"eval_{name}" for name in OPTIONS} <= {option.name for option in fields(script)}
    config = AGRPOConfig(use_cpu=True, bf16=False, max_completion_length=24, block_length=8, denoising_steps=24)
    chosen = script(
        eval_temperature=0.7,
        eval_top_k=5,
        eval_top_p=0.9,
        eval_confidence_threshold=0.9,
        eval_cache="prefix",
        eval_cache_refresh=2,
    )
    assert chosen.decoding(config) == SamplingConfig(
        24, 24, 8, 0.7, 5, 0.9, "max_prob", False, False, 0.9, None, cache="prefix", cache_refresh=2
    )
    by_entropy = script(eval_unmasking="entropy", eval_entropy_bound=0.1, eval_canvas_length=30)
    expected = SamplingConfig(32, 24, 8, 0.0, 0, 1.0, "entropy", False, False, None, 0.1)  # in whole blocks
    assert by_entropy.decoding(config) == expected


def test_the_diffu_grpo_and_sapo_configs_parse_to_the_papers_settings():
    diffu = parsed("gsm8k_diffu_grpo", DiffuGRPOConfig)
    sapo = parsed("countdown_sapo", DiffuGRPOConfig)
    for _, config, model in (diffu, sapo):
        assert (config.max_completion_length, config.block_length, config.denoising_steps) == (256, 32, 128)
        assert (config.temperature, config.unmasking, config.num_generations) == (0.9, "low_confidence", 6)
        assert (config.epsilon, config.beta, config.use_bias_correction_kl) == (0.5, 0.04, False)
        assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (3e-6, 0.1, 0.2)
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (128, 64, 0.0)
    assert (diffu[1].num_iterations, diffu[1].prompt_mask_probability) == (12, 0.15)
    assert (sapo[1].num_iterations, sapo[1].warmup_steps) == (8, 600)
    assert (sapo[0].num_rollouts, sapo[0].num_mask_tokens, sapo[0].process_weight) == (3, 64, 1.0)


def test_the_atpo_config_selects_eight_steps_by_the_hybrid_rule():
    _, config, _ = parsed("gsm8k_atpo", ATPOConfig)
    assert (config.step_selector, config.num_mc_samples, config.denoising_steps) == ("roec_cm", 8, 128)
    assert (config.loss_type, config.step_reduction, config.beta) == ("grpo", "mean", 0.0)


# By `recipes/train.py` alone: paper and, of the LLaDA-8B config, what the paper says where it is not as in d1.
D1 = dict(max_completion_length=256, block_length=32, unmasking="low_confidence", max_grad_norm=0.2)
D1_LORA = dict(use_peft=True, lora_r=128, lora_alpha=64, lora_dropout=0.0)
LORA_OF = {
    "just_grpo": dict(use_peft=False),
    "fork_grpo": D1_LORA | dict(lora_dropout=0.05),
    "egspo": D1_LORA | dict(lora_dropout=0.05),
    "stable_drl": dict(use_peft=False),  # it trains all weights
    "step_rs": D1_LORA | dict(lora_r=64),
}
SHARED = {
    "dmpo": ("2510.08233", dict(alpha=0.04, temperature=0.2, num_generations=16, num_iterations=8, num_mc_samples=4)),
    "espo": ("2512.03759", dict(epsilon=0.2, beta=1e-3, denoising_steps=256, num_generations=6, num_iterations=8)),
    "gdpo": ("2510.08554", dict(epsilon=0.5, beta=0.0, learning_rate=3e-7, num_mc_samples=3, num_iterations=12)),
    "gdsd": ("2605.29398", dict(psi=10.0, epsilon=4e-4, beta=1e-3, num_generations=16, denoising_steps=256)),
    "coupled_grpo": ("2506.20639", dict(learning_rate=1e-6, beta=0.01, num_generations=10, num_iterations=2)),
    "wd1": ("2507.08838", dict(learning_rate=3e-6, temperature=0.9, num_generations=6, num_iterations=8)),
    "spg": ("2510.09541", dict(bound_power=1.5, mix_weight=0.5, num_mc_samples=2, num_iterations=4)),
    "stable_drl": ("2603.06743", dict(epsilon=0.2, num_iterations=2, num_generations=16, learning_rate=2e-6)),
    "stable_espo": ("2603.06743", dict(epsilon=0.2, beta=1e-3, denoising_steps=256, num_iterations=8)),
    "uni_grpo": ("2505.15809", dict(epsilon=0.2, min_mask_rate=0.1, max_mask_rate=0.9, num_mc_samples=1)),
    "tracerl": ("2509.06949", dict(shrink=8, num_mc_samples=16, epsilon=0.2, beta=0.01)),
    "just_grpo": (
        "2601.15165",
        dict(block_length=1, unmasking="random", max_grad_norm=1.0, num_mc_samples=256, learning_rate=5e-6)
        | dict(num_generations=16, temperature=1.0, weight_decay=0.0, beta=0.0, max_steps=125),
    ),
    "egspo": (
        "2603.12554",
        dict(fill_weight=0.1, num_mc_samples=8, step_draws="top_entropy", epsilon=0.5, beta=0.04, learning_rate=3e-5)
        | dict(num_generations=8, temperature=0.9, denoising_steps=128, weight_decay=0.1, adam_beta2=0.99),
    ),
    "step_rs": ("2610.00661", dict(unmasking="random", max_grad_norm=1.0, first_risk=1.0, last_risk=0.0)),
    "daca": ("2605.16342", dict(num_mc_samples=4, progress_floor=0.5, epsilon=0.5, beta=0.04, num_iterations=12)),
    "diffpo": ("2510.02212", dict(num_mc_samples=2, weight_cap=2.0, epsilon=0.5, beta=0.04, num_iterations=12)),
    "mapg": (
        "2607.15200",
        dict(unmasking="plackett_luce", num_generations=4, num_iterations=12, num_mc_samples=12, denoising_steps=128)
        | dict(epsilon=3e-4, epsilon_high=4e-4, beta=0.0, temperature=0.9, learning_rate=3e-6),
    ),
    "fork_grpo": (
        "2609.39859",
        dict(unmasking="max_prob", max_grad_norm=0.5, confidence_threshold=0.8, fallback="leftmost", temperature=0.8)
        | dict(learning_rate=2e-5, num_generations=16, adam_beta2=0.99, weight_decay=0.0, beta=0.0),
    ),
}


def test_every_method_has_its_configs():
    named = {
        folder: {path.stem.removeprefix("gsm8k_") for path in (CONFIGS / folder).glob("gsm8k_*.yaml")}
        for folder in ("embedded", "llada_8b", "sdar_8b")
    }
    methods = METHODS
    expected = {*methods, "agrpo_qlora", "spg_informed"}
    assert named == {"embedded": expected, "llada_8b": expected - {"dipo"}, "sdar_8b": {"dipo"}}
    own_script = {path.stem.removeprefix("gsm8k_") for path in (ROOT / "recipes").glob("gsm8k_*.py")}
    assert {*SHARED, "dipo"} == set(methods) - own_script


@pytest.mark.parametrize("name", [*SHARED, "dipo"])
def test_the_shared_recipe_trains_the_embedded_model(name, tmp_path, monkeypatch, capsys):
    paper, _ = (SHARED | {"dipo": ("2512.22234", {})})[name]
    small = ["--max_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "16"]
    small += ["--eval_size", "4", "--use_cpu", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", name, *small])
    train.main()
    output = capsys.readouterr().out
    assert "training the bundled model" in output
    assert f"for example {'sdar_8b' if name == 'dipo' else 'llada_8b'}/gsm8k_{name}." in output
    assert f"{METHODS[name]._name}, 2 updates" in output and "gain" in output
    assert paper in (tmp_path / "README.md").read_text()
    assert [entry["grad_norm"] > 0 for entry in history(tmp_path) if "grad_norm" in entry] == [True, True]


@pytest.mark.parametrize("name", SHARED)
def test_llada_configs_of_the_shared_recipe_name_their_method_and_keep_the_papers_settings(name):
    path = str(CONFIGS / "llada_8b" / f"gsm8k_{name}.yaml")
    assert train.chosen(["--config", path]).method == name
    _, config, model = parsed(f"gsm8k_{name}", METHODS[name].config_class)
    for arguments, expected in ((config, D1 | SHARED[name][1]), (model, LORA_OF.get(name, D1_LORA))):
        assert {field: getattr(arguments, field) for field in expected} == expected


def test_the_sdar_config_names_dipo_and_keeps_the_papers_settings():
    assert train.chosen(["--config", str(CONFIGS / "sdar_8b" / "gsm8k_dipo.yaml")]).method == "dipo"
    _, config, model = parsed("gsm8k_dipo", METHODS["dipo"].config_class, "sdar_8b")
    assert model.model_name_or_path == "JetLM/SDAR-8B-Chat"
    assert (config.epsilon, config.epsilon_high, config.beta, config.num_iterations) == (0.2, 0.28, 0.0, 1)
    assert (config.block_length, config.sampling_config().steps_per_block, config.num_mc_samples) == (4, 4, 4)
    assert (config.temperature, config.top_k, config.num_generations, config.learning_rate) == (1.0, 50, 8, 1e-6)
    assert (config.unmasking, config.confidence_threshold) == ("max_prob", 0.9)


def test_command_line_and_config_agree_about_the_method():
    path = str(CONFIGS / "llada_8b" / "gsm8k_dmpo.yaml")
    chosen = train.chosen
    with pytest.raises(ValueError, match="the method is wd1 in --method and dmpo in "):
        chosen(["--config", path, "--method", "wd1"])
    assert chosen(["--config", path, "--method", "dmpo"]).method == chosen(["dmpo", "--config", path]).method == "dmpo"
    assert chosen(["espo", "--max_steps", "3"]).others == ["--max_steps", "3"]
    sapo = str(CONFIGS / "llada_8b" / "countdown_sapo.yaml")
    found = chosen(["--config", sapo])
    assert (found.task, found.method, found.num_rollouts) == ("countdown", "diffu_grpo", 3)
    assert chosen(["--config", sapo, "--num_rollouts", "0", "--task", "sudoku"]).num_rollouts == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no method was given"),
        (["ppo"], "method must be one of .* got 'ppo'"),
        (["--method", "difu_grpo"], "got 'difu_grpo'. Did you mean 'diffu_grpo'?"),
    ],
)
def test_without_a_known_method_the_names_are_listed(arguments, problem):
    with pytest.raises(ValueError, match=problem) as refused:
        train.chosen(arguments)
    assert ", ".join(METHODS) in str(refused.value)


@pytest.mark.thorough
@pytest.mark.release
def test_memory_benchmark_runs():
    command = ["recipes/benchmarks/memory.py", "--views", "1", "2", "--updates", "1", "--vocabulary", "600"]
    command += ["--hidden", "32", "--layers", "1", "--canvas", "16"]
    output = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=True
    ).stdout
    assert "peak memory in MiB" in output and "against M = 1" in output
