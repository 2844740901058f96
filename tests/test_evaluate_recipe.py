"""`recipes/evaluate.py` and the lm-evaluation-harness from their command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from launching import HANG, accelerate_launch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_diffusion.cli import evaluate
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.tasks.word_problems import load_word_problems

ROOT = Path(__file__).parent.parent
PROBLEMS, STEPS, BATCH = 96, 16, 8
ARGUMENTS = ["--tasks", "word_problems=embedded", "--limit", str(PROBLEMS), "--denoising_steps", str(STEPS)]
ARGUMENTS += ["--batch_size", str(BATCH)]
CELL = f"word_problems-canvas32-steps{STEPS}"

pytestmark = pytest.mark.slow


def start(output_dir: Path, *arguments: str, processes: int = 1) -> subprocess.Popen:
    config = {1: "single_gpu", 2: "cpu_ddp"}[processes]
    command = [*accelerate_launch(config, "--num_cpu_threads_per_process", "1"), "recipes/evaluate.py"]
    command += ["--use_cpu", "true", *ARGUMENTS, "--output_dir", str(output_dir), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, fails: bool = False) -> str:
    output, _ = process.communicate(timeout=HANG)
    assert (process.returncode != 0) == fails, output[-4000:]
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, never stopped: folder and console output."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, finish(start(folder))


def test_without_a_model_the_embedded_one_is_evaluated(alone):
    folder, output = alone
    assert "No model given: evaluating the bundled one" in output
    assert "canvas 32, 16 steps, block 8, max_prob, greedy" in output and "Samples, summary.json" in output
    (result,) = json.loads((folder / "summary.json").read_text())
    assert result["settings"]["problems"] == PROBLEMS == result["completions"]
    samples = [json.loads(line) for line in (folder / CELL / "samples.jsonl").read_text().splitlines()]
    right = sum(one["scores"]["accuracy"] for one in samples)
    assert result["scores"]["accuracy"]["value"] == right / PROBLEMS and 0.3 < right / PROBLEMS < 0.7
    assert set(files(folder)) == {
        "summary.json",
        "summary.md",
        "accuracy.png",
        f"{CELL}/samples.jsonl",
        f"{CELL}/settings.json",
    }


@pytest.mark.thorough
def test_two_processes_killed_and_started_again_give_the_same_files(alone, tmp_path):
    process = start(tmp_path, processes=2)
    parts = [tmp_path / CELL / f"part-{rank}.jsonl" for rank in (0, 1)]
    deadline = time.monotonic() + HANG
    while not all(part.exists() and part.stat().st_size for part in parts):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.01)
    # the launcher's workers lead sessions of their own
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):  # helpers of one that is dead already
            one.kill()
    process.communicate()
    done = sum(part.read_bytes().count(b"\n") for part in parts) // BATCH
    assert 2 <= done < PROBLEMS / BATCH
    assert not (tmp_path / CELL / "samples.jsonl").exists()

    output = finish(start(tmp_path, processes=2))
    assert f"Continuing: {done} of {PROBLEMS // BATCH} batches are on disk." in output
    assert files(tmp_path) == files(alone[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm9k"], "tasks must be one of gsm8k, math500, .* got 'gsm9k'. Did you mean 'gsm8k'?"),
        (["--prompt", "d2"], r"prompt \(of countdown\) must be one of plain, d1.*; got 'd2'"),
        (["--protocols", "own", "d2"], "protocols must be one of own, d1; got 'd2'"),
        (["--protocols", "d1"], "d1 has no protocol for word_problems"),
        (["--canvas_lengths", "256"], "canvas of 256 does not fit.*256 positions"),
        (["--denoising_steps", "12", "--canvas_lengths", "32", "64"], r"denoising_steps \(12\).* \(8 = 64 / 8\)"),
        (["--adapter", EMBEDDED_MODEL], "holds no adapter"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--completions_per_prompt", "0"], "completions_per_prompt must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(monkeypatch, tmp_path, arguments, message):
    embedded = [] if "--adapter" in arguments else ["--config", "trl_diffusion/configs/embedded/evaluate.yaml"]
    monkeypatch.chdir(ROOT)
    command = ["evaluate.py", *embedded, "--output_dir", str(tmp_path / "out"), *arguments]
    if arguments[0] == "--canvas_lengths":
        command += ["--denoising_steps", "128"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match=message):
        evaluate.main()
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged_and_the_summary_says_so(monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(ROOT)
    options = ["--adapter", str(tmp_path / "adapter"), "--tasks", "word_problems=embedded", "--limit", "4"]
    options += ["--canvas_lengths", "32", "--denoising_steps", "8", "--block_length", "8", "--use_cpu"]
    texts, summaries = [], []
    for merge in ([], ["--merge_adapter", "false"]):
        folder = tmp_path / f"out{len(merge)}"
        evaluate.main([*options, *merge, "--output_dir", str(folder)])
        texts.append([json.loads(line)["completion"] for line in next(folder.glob("*/samples.jsonl")).open()])
        summaries.append((folder / "summary.md").read_text())
        assert "Adapter merged into its base: " in capsys.readouterr().out
    assert texts[0] == texts[1] and len(texts[0]) == 4
    assert "- adapter_merged: yes\n" in summaries[0]
    assert "- adapter_merged: no: merge_adapter is off\n" in summaries[1]
    weights = [[line for line in summary.splitlines() if "weights" in line] for summary in summaries]
    assert weights[0] == weights[1] and len(weights[0]) == 1  # of the weights that are stored


DATA = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"public data files are not at {DATA}")
def test_local_files_are_evaluated_under_both_protocols(monkeypatch, tmp_path, capsys):
    sources = ["gsm8k=gsm8k_train_first1000.jsonl", "countdown=countdown_cd3_test.jsonl", "sudoku=sudoku_4x4_test.csv"]
    command = ["evaluate.py", "--config", str(ROOT / "trl_diffusion" / "configs" / "embedded" / "evaluate.yaml")]
    command += ["--tasks", *(source.replace("=", f"={DATA}/") for source in sources), "--protocols", "own", "d1"]
    command += ["--limit", "2", "--denoising_steps", "4", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()
    results = json.loads((tmp_path / "summary.json").read_text())
    assert [result["settings"]["task"] for result in results] == ["gsm8k", "countdown", "sudoku"]
    assert [next(iter(result["scores"])) for result in results] == ["accuracy", "accuracy", "puzzles_solved"]
    assert all(any(name.startswith("d1 ") for name in result["scores"]) for result in results)
    assert results[1]["settings"]["source"].endswith("countdown_cd3_test.jsonl")
    assert "d1 " in capsys.readouterr().out


def test_a_file_that_is_not_json_lines_and_a_missing_column_are_refused(monkeypatch, tmp_path):
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--tasks", f"gsm8k={rows}", "--output_dir", str(tmp_path)])
    rows.write_text("question,answer\n")
    with pytest.raises(ValueError, match="is not JSON"):
        evaluate.main()
    rows.write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match=r"GSM8K needs .*\['answer'\] missing"):
        evaluate.main()


def test_other_settings_in_the_same_folder_are_refused(alone, monkeypatch):
    before = files(alone[0])
    monkeypatch.chdir(ROOT)
    command = ["evaluate.py", *ARGUMENTS, "--output_dir", str(alone[0]), "--block_length", "16"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match=r"other settings: decoding.block_length is 8 there and 16 here"):
        evaluate.main()
    assert files(alone[0]) == before


def test_the_llada_config_is_d1_s():
    config = ROOT / "trl_diffusion" / "configs" / "llada_8b" / "evaluate.yaml"
    args, by_default = evaluate.parse(["--config", str(config), "--adapter", "somewhere"])
    assert not by_default and args.model_name_or_path == "GSAI-ML/LLaDA-8B-Instruct" and args.adapter == "somewhere"
    decodings = [(one.canvas_length, one.denoising_steps, one.block_length) for one in args.decodings(1, 1, 1)]
    assert decodings == [(128, 64, 32), (256, 128, 32), (512, 256, 32)]
    assert all(one.temperature == 0 and one.unmasking == "low_confidence" for one in args.decodings(1, 1, 1))
    assert [task.name for task, _ in evaluate.requested(args)] == ["gsm8k", "math500", "countdown", "sudoku"]


def test_d1_s_protocol_stands_beside_our_own():
    from trl_diffusion.tasks import TASKS

    score = evaluate.scorer(TASKS["gsm8k"], ["own", "d1"])
    scores = score("The answer is \\boxed{12}", {"answer": "12"})
    assert next(iter(scores)) == "accuracy" and scores["d1 accuracy"] == 1.0
    assert not any("d1" in name for name in evaluate.scorer(TASKS["gsm8k"], ["own"])("12", {"answer": "12"}))


TASK = """
task: local_word_problems
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 32
filter_list:
  - name: after the mark
    filter:
      - function: regex
        regex_pattern: "#### (-?[0-9]+)"
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
"""


@pytest.mark.thorough
def test_lm_eval_counts_as_this_recipe_does(alone, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    rows = tmp_path / "rows.jsonl"
    problems = load_word_problems("test", PROBLEMS)
    lines = [{"question": row["prompt"][0]["content"], "answer": row["answer"]} for row in problems]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks" / "words.yaml").write_text(TASK.format(rows=rows))
    command = [sys.executable, "-m", "trl_diffusion.evaluation.lm_eval", "--model", "trl_diffusion"]
    command += ["--model_args", f"pretrained={EMBEDDED_MODEL},canvas_length=32,denoising_steps={STEPS},block_length=8"]
    command += ["--tasks", "local_word_problems", "--include_path", str(tmp_path / "tasks"), "--apply_chat_template"]
    command += ["--batch_size", str(BATCH), "--output_path", str(tmp_path / "out"), "--log_samples", "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)
    assert run.returncode == 0, run.stderr[-4000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    result = json.loads(path.read_text())
    (ours,) = json.loads((alone[0] / "summary.json").read_text())
    theirs = result["results"]["local_word_problems"]["exact_match,after the mark"]
    assert theirs == ours["scores"]["accuracy"]["value"]
    assert result["config"]["weights"] == ours["settings"]["model"]["weights"]
    assert result["config"]["denoising_steps"] == STEPS
    (path,) = (tmp_path / "out").rglob("samples_*.jsonl")
    texts = [json.loads(line)["resps"][0][0] for line in path.read_text().splitlines()]
    samples = (alone[0] / CELL / "samples.jsonl").read_text().splitlines()
    assert texts == [json.loads(line)["completion"] for line in samples]
