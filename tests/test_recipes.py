"""The recipes as a newcomer starts them, through `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from trl import TrlParser

from trl_diffusion.trainers import AGRPOConfig

ROOT = Path(__file__).parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train_first1000.jsonl"
QUICK = ["--max_steps", "2", "--eval_size", "8", "--logging_steps", "1", "--num_mc_samples", "2"]

pytestmark = pytest.mark.slow


def launch(script: str, *arguments: str, fails: bool = False) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += ["recipes/accelerate_configs/single_gpu.yaml", script, *arguments]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=420)
    output = result.stdout + result.stderr
    assert (result.returncode != 0) == fails, output[-4000:]
    return output


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]


def test_without_arguments_the_embedded_model_trains_and_says_so(tmp_path):
    output = launch("recipes/gsm8k_agrpo.py", *QUICK, "--output_dir", str(tmp_path))
    assert "running on the embedded model" in output
    for word in ("before", "after", "gain", "curves.png"):
        assert word in output
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "2510.04019" in (tmp_path / "README.md").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LLaDAModelLM"
    assert any("rollout/seconds" in entry for entry in history(tmp_path))


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not beside the project")
def test_real_questions_run_through_the_whole_job(tmp_path):
    arguments = ["--dataset_path", str(GSM8K), "--output_dir", str(tmp_path), "--per_device_train_batch_size", "8"]
    output = launch("recipes/gsm8k_agrpo.py", *QUICK, *arguments)
    assert "of 8" in output
    assert sum("reward" in entry for entry in history(tmp_path)) == 2


def test_lora_saves_an_adapter(tmp_path):
    lora = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
    output = launch("recipes/gsm8k_agrpo.py", *QUICK, *lora, "--output_dir", str(tmp_path))
    assert "LoRA coverage" in output and "Adapter and model card" in output
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


def test_a_dataset_without_answers_is_refused_in_one_line(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "2 + 2?"}\n' * 20)
    output = launch("recipes/gsm8k_agrpo.py", *QUICK, "--dataset_path", str(rows), fails=True)
    assert "GSM8K needs `question` and `answer`" in output


def test_the_llada_config_parses_to_the_papers_settings():
    path = ROOT / "recipes" / "configs" / "llada_8b" / "gsm8k_agrpo.yaml"
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        from gsm8k import GSM8KArguments
    finally:
        sys.path.pop(0)
    from trl import ModelConfig

    arguments = ["--config", str(path), "--use_cpu"]
    script, config, model = TrlParser((GSM8KArguments, AGRPOConfig, ModelConfig)).parse_args_and_config(arguments)
    assert (config.num_mc_samples, config.max_completion_length, config.block_length) == (24, 384, 12)
    assert (config.temperature, config.top_k, config.top_p, config.step_draws) == (0.6, 150, 0.99, "entropy")
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64, 64, 0.0)
    assert model.lora_target_modules in ("all-linear", ["all-linear"])
    assert script.decoding(config) == {
        "canvas_length": 256,
        "block_length": 32,
        "denoising_steps": 128,
        "batch_size": 64,
    }


def test_memory_benchmark_runs():
    command = ["recipes/benchmarks/memory.py", "--views", "1", "2", "--updates", "1", "--vocabulary", "600"]
    command += ["--hidden", "32", "--layers", "1", "--canvas", "16"]
    output = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240, check=True
    ).stdout
    assert "peak memory in MiB" in output and "against M = 1" in output
