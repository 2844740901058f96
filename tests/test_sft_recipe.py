"""The recipe of masked SFT: where rows come from, what is held out, and runs on the embedded model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from launching import accelerate_launch, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from trl_diffusion.cli import sft
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.sudoku import load_sudoku
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import SFTConfig

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "trl_diffusion" / "configs" / "embedded" / "sft.yaml"
SMALL = ["--max_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--eval_size", "4", "--dataset_size", "64"]
SMALL += ["--eval_denoising_steps", "8"]


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    load_word_problems("train", 40).select_columns(["prompt", "completion"]).to_json(path)
    return path


def started(folder: Path, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sft.py", *SMALL, "--use_cpu", "--output_dir", str(folder), *arguments])
    sft.main()


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]


# ---------------------------------------------------------------- rows


def test_a_task_brings_its_own_splits():
    args = sft.SFTArguments(dataset_path="countdown=embedded", dataset_size=30, eval_size=7)
    rows, held_out = sft.load(args)
    assert (args.task, len(rows), len(held_out)) == ("countdown", 30, 7)
    assert not {row["prompt"][0]["content"] for row in rows} & {row["prompt"][0]["content"] for row in held_out}


def test_the_last_rows_of_a_file_are_held_out(rows_file, tmp_path):
    rows, held_out = sft.load(sft.SFTArguments(dataset_path=str(rows_file), eval_size=10))
    given = load_word_problems("train", 40)["completion"]
    assert [*rows["completion"], *held_out["completion"]] == list(given) and len(held_out) == 10
    rows, _ = sft.load(sft.SFTArguments(dataset_path=str(rows_file), eval_size=10, dataset_size=5))
    assert list(rows["completion"]) == list(given[:5])

    questions = tmp_path / "gsm8k.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(9)))
    rows, held_out = sft.load(sft.SFTArguments(dataset_path=f"gsm8k={questions}", eval_size=3))
    assert (list(rows["answer"]), list(held_out["answer"])) == (list("012345"), list("678"))


def test_rows_that_cannot_be_used_are_refused(rows_file, tmp_path):
    for size in (0, 40, 256):
        with pytest.raises(ValueError, match=f"has 40 rows, of which --eval_size {size} are held out"):
            sft.load(sft.SFTArguments(dataset_path=str(rows_file), eval_size=size))
    (tmp_path / "texts.jsonl").write_text('{"prompt": "2 + 2?", "answer": "4"}\n' * 3)
    with pytest.raises(ValueError, match=r"SFT needs `prompt` and `completion`: \['completion'\] missing"):
        sft.load(sft.SFTArguments(dataset_path=str(tmp_path / "texts.jsonl"), eval_size=1))
    with pytest.raises(FileNotFoundError, match="No SFT file"):
        sft.load(sft.SFTArguments(dataset_path="none.jsonl"))


def test_an_answer_is_right_if_the_tasks_first_score_is_full():
    row = load_sudoku("train", 1)[0]
    last = row["puzzle"].rindex("0")
    wrong = row["solution"][:last] + "1234"[int(row["solution"][last]) % 4] + row["solution"][last + 1 :]
    assert TASKS["sudoku"].is_correct(row["solution"], row)
    assert not TASKS["sudoku"].is_correct(wrong, row)
    assert 0 < TASKS["sudoku"].score(wrong, row)["cells_correct"] < 1  # another score


def test_the_config_of_llada_8b_has_d1s_settings():
    parser = TrlParser((sft.SFTArguments, SFTConfig, ModelConfig))
    path = ROOT / "trl_diffusion" / "configs" / "llada_8b" / "sft.yaml"
    script, config, model = parser.parse_args_and_config(["--config", str(path), "--use_cpu"])
    assert (script.task, config.min_noise_level, config.learning_rate, config.weight_decay) == (
        "gsm8k",
        1e-3,
        1e-5,
        0.1,
    )
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.max_grad_norm) == (
        1,
        4,
        1.0,
    )
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (128, 256, 0.05)
    assert model.lora_target_modules == ["q_proj", "k_proj", "v_proj"]
    greedy = SamplingConfig(256, 128, 32, temperature=0.0, unmasking="max_prob", record_support=False)
    assert script.decoding(config) == greedy and script.eval_batch_size == 64


def test_decoding_follows_the_canvas():
    decoding = sft.SFTArguments().decoding(SFTConfig(max_completion_length=24, use_cpu=True, bf16=False))
    assert (decoding.canvas_length, decoding.block_length, decoding.denoising_steps) == (24, 24, 12)


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_without_arguments_the_embedded_model_learns_word_problems_and_says_so(tmp_path, monkeypatch, capsys):
    started(tmp_path, monkeypatch)
    output = capsys.readouterr().out.replace("\n", "")  # long paths wrap
    assert "training the bundled model" in output and "for example llada_8b/sft." in output
    assert "masked SFT, 2 updates" in output and "gain" in output and "Model and model card" in output
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "2504.12216" in (tmp_path / "README.md").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LLaDAModelLM"
    assert [entry["step"] for entry in history(tmp_path) if "loss" in entry] == [1, 2]


@pytest.mark.slow
def test_other_rows_are_measured_by_their_loss(rows_file, tmp_path, monkeypatch, capsys):
    lora = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
    quick = ["--learning_rate", "0.01", "--warmup_steps", "0"]
    started(tmp_path, monkeypatch, "--dataset_path", str(rows_file), "--config", str(EMBEDDED), *lora, *quick)
    output = " ".join(capsys.readouterr().out.split())
    found = re.search(r"Held-out loss, in nats per position: (\d\.\d+) after 0 updates, (\d\.\d+) after 2\.", output)
    assert found and float(found[1]) == pytest.approx(history(tmp_path)[0]["eval_loss"], abs=1e-3)
    assert found[2] != found[1]
    assert "Adapter and model card" in output and (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_dry_run_prints_the_report_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    started(tmp_path / "out", monkeypatch, "--dry_run")
    output = capsys.readouterr().out
    assert "64 rows; prompts of" in output and "masked SFT" in output and "gain" not in output
    assert not [*tmp_path.rglob("*.*")]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.release
def test_two_processes_train_like_one(tmp_path):
    weights = []
    for config, size in (("single_gpu", "16"), ("cpu_ddp", "8")):
        folder = tmp_path / config
        folder.mkdir()
        settings = [*SMALL, "--optim", "sgd", "--per_device_train_batch_size", size, "--output_dir", str(folder)]
        code, output = run([*accelerate_launch(config), "recipes/sft.py", *settings], folder)
        assert code == 0, output[-4000:]
        weights.append(load_file(folder / "model.safetensors"))
    one, two = weights
    start = load_file(Path(EMBEDDED_MODEL) / "model.safetensors")
    assert one.keys() == start.keys() and all(not torch.equal(value, start[name]) for name, value in one.items())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)
