"""The command `trl-diffusion`: its sub-commands, short errors, help, names of files, and launches."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from launching import HANG, free_port, run

from trl_diffusion.cli import app, evaluate, launching, train
from trl_diffusion.cli.errors import short_message, without_debug
from trl_diffusion.cli.names import ACCELERATE_CONFIGS, CONFIGS, config_file, packaged
from trl_diffusion.cli.parsing import Parser, with_config_path
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.runtime.recorded_decoding import record_decoding, recorded_decoding
from trl_diffusion.trainers import METHODS
from trl_diffusion.validation import near


def errors_of(capsys, *arguments: str) -> str:
    """What a command prints that ends with an error, without the line about `--debug`."""
    assert app.main(arguments) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    error, hint = captured.err.rstrip("\n").split("\n")
    assert hint == "(--debug shows where it was raised.)"
    return error


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "There is no command 'trian'. Did you mean 'train'?"),
        ("train agpro", "got 'agpro'. Did you mean 'agrpo'?"),
        ("train", "no method was given: trl-diffusion train METHOD, with one of agrpo, "),
        ("train agrpo --task countdwn", "got 'countdwn'. Did you mean 'countdown'?"),
        ("train agrpo --learing_rate 1", "has no option --learing_rate. Did you mean '--learning_rate'?"),
        ("train agrpo --max_steps ten", "argument --max_steps/--max-steps: invalid int value: 'ten'"),
        ("train agrpo --max_step 3", "has no option --max_step. Did you mean '--max_steps'?"),  # no abbreviations
        ("train agrpo 3", "does not know what '3' is: options begin with `--`"),
        ("train agrpo --config llada_8b/gsm8k_agrp", "There is no file llada_8b/gsm8k_agrp, .* mean 'llada_8b/gsm8k_"),
        ("train agrpo --config gsm8k_agrpo", "Did you mean 'embedded/gsm8k_agrpo'?"),
        ("train agrpo --config", "--config needs the name"),
        ("train agrpo --accelerate_config zero8", "There is no file zero8, .*Did you mean 'zero3'?"),
        ("train agrpo --model_name_or_path embeded", "There is no model 'embeded': .*Did you mean 'embedded'?"),
        ("train agrpo --dataset_path cuontdown=embedded", "got 'cuontdown'. Did you mean 'countdown'?"),
        ("train agrpo --dataset_path none.jsonl", "No GSM8K file at none.jsonl"),
        ("train agrpo --config llada_8b/gsm8k_espo", "the method is agrpo in METHOD and espo in .*gsm8k_espo.yaml"),
        ("train agrpo --block_length 7 --use_cpu", "block_length .7. must divide the canvas length"),
        ("train sft --dataset_path none.jsonl --use_cpu", "No SFT file at none.jsonl"),
        ("evaluate embeded", "Did you mean 'embedded'?"),
        ("evaluate --tasks sudoko=embedded", "got 'sudoko'. Did you mean 'sudoku'?"),
        ("rescore none", "none has no task|No task in the file name"),
        ("export-adapter none out", "none"),
    ],
)
def test_mistakes_are_answered_in_two_lines(command, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search(message, errors_of(capsys, *command.split()))


def test_keys_of_a_yaml_file_and_files_that_are_none(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("max_step: 3\n")
    message = errors_of(capsys, "train", "agrpo", "--config", str(file), "--use_cpu")
    assert f"the file {file} has no setting max_step. Did you mean 'max_steps'?" in message
    file.write_text("max_steps: [3\n")
    assert "is no YAML" in errors_of(capsys, "train", "sft", "--config", str(file))


def test_a_file_of_nearly_that_name_is_suggested(tmp_path, capsys):
    (tmp_path / "problems.jsonl").write_text("")
    message = errors_of(capsys, "train", "agrpo", "--dataset_path", str(tmp_path / "problem.jsonl"))
    assert "Did you mean 'problems.jsonl'?" in message


def test_debug_lets_errors_through_and_leaves_the_option_of_transformers_alone():
    with pytest.raises(ValueError, match="agpro"):
        app.main(["train", "agpro", "--debug"])
    assert without_debug(["a", "--debug", "--b"]) == (["a", "--b"], True)
    assert without_debug(["--debug", "underflow_overflow"]) == (["--debug", "underflow_overflow"], False)


def test_what_a_user_cannot_mend_keeps_its_traceback(monkeypatch, capsys):
    def broken(*arguments):
        raise KeyError("key")

    monkeypatch.setattr(train, "main", broken)
    with pytest.raises(KeyError):
        app.main(["train", "agrpo"])
    try:
        raise RuntimeError("CUDA error")
    except RuntimeError as error:
        assert short_message(error) is None


@pytest.mark.parametrize("writes", ["python", "torch"])
def test_a_full_disk_is_said_as_such(writes):
    """`/dev/full` is a disk that is always full."""
    import torch

    with pytest.raises((OSError, RuntimeError)) as full:
        if writes == "torch":
            torch.save(torch.zeros(1_000_000), "/dev/full")
        else:
            with open("/dev/full", "w") as file:
                file.write("x" * 10_000)
    assert writes == "torch" or full.value.errno == errno.ENOSPC  # type: ignore[union-attr]
    message = short_message(full.value)  # type: ignore[arg-type]
    assert message is not None and message.startswith("the disk is full") and "--save_total_limit" in message


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m trl_diffusion methods | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=HANG)
    assert result.stdout.startswith("agrpo") and "Error" not in result.stderr


# ---------------------------------------------------------------- help and lists


@pytest.mark.parametrize("command", ["train --help", "evaluate -h", "analyze --help", "train sft -h"])
def test_help_fits_on_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with suppress(SystemExit):
        app.main(command.split())
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) <= 50 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_a_method_has_its_own_settings_and_its_defaults(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.main([method, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    shown = {line.split()[0].removeprefix("--"): line.split()[1] for line in lines if line.startswith("  --")}
    config = METHODS[method].config_class
    assert shown["num_generations"] == str(config.num_generations)
    assert {*train.own_settings(config)} <= {*shown} and len(train.own_settings(config)) > 0


def test_all_options_are_a_flag_away(capsys):
    with pytest.raises(SystemExit):
        app.main(["train", "espo", "--help-all"])
    assert "--adam_epsilon" in capsys.readouterr().out


def test_usage_version_and_lists(capsys):
    assert app.main([]) == app.main(["--help"]) == app.main(["--version"]) == app.main(["env"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in app.COMMANDS) and "transformers: " in output
    assert app.main(["methods"]) == app.main(["tasks"]) == 0
    output = capsys.readouterr().out
    for name, trainer in METHODS.items():
        assert name in output and trainer._paper["id"] in output
    assert "llada_8b/gsm8k_agrpo" in output and "openai/gsm8k" in output


# ---------------------------------------------------------------- names


def test_every_configuration_of_the_package_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (CONFIGS, ACCELERATE_CONFIGS):
        names = packaged(folder)
        assert len(names) > 10
        for name in names:
            assert config_file(name, folder) == config_file(f"{name}.yaml", folder) == folder / f"{name}.yaml"
    (tmp_path / "llada_8b").mkdir()
    own = tmp_path / "llada_8b" / "sft.yaml"
    own.write_text("{}")
    assert config_file("llada_8b/sft.yaml").resolve() == own  # a file of the user's comes first


def test_of_two_configurations_the_last_one_counts():
    words = ["--config", "embedded/sft", "--seed", "1", "--config=embedded/gsm8k_agrpo"]
    assert with_config_path(words) == ["--config", str(CONFIGS / "embedded" / "gsm8k_agrpo.yaml"), "--seed", "1"]


def test_suggestions():
    assert near("difu_grpo", METHODS) == " Did you mean 'diffu_grpo'?" and near("zzz", METHODS) == ""


# ---------------------------------------------------------------- launches


def test_launch_options_go_to_accelerate_and_the_rest_to_the_command(monkeypatch):
    started = []
    monkeypatch.setattr(launching, "_accelerate", lambda words: started.append(words) or 0)
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    words = ["--seed", "3", "--accelerate_config", "zero2", "--num_processes", "4", "--max_steps=2"]
    assert launching.launch(["train"], ["agrpo", *words]) == (["agrpo", "--seed", "3", "--max_steps=2"], 0)
    (command,) = started
    assert command[:1] == ["--config_file"] and command[2:4] == ["--num_processes", "4"]
    assert command[4:] == ["-m", "trl_diffusion", "train", "agrpo", "--seed", "3", "--max_steps=2"]
    assert launching.launch(["train"], ["agrpo"]) == (["agrpo"], None)  # here is no GPU, so nothing is launched

    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 8)
    assert launching.launch(["train"], ["agrpo"]) == (["agrpo"], 0)
    assert "multi_gpu.yaml" in started[-1][1] and started[-1][2:4] == ["--num_processes", "8"]
    assert launching.launch(["train"], ["agrpo", "--use_cpu"]) == (["agrpo", "--use_cpu"], None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launching.launch(["train"], ["agrpo"]) == (["agrpo"], None)  # already in one of the processes
    with pytest.raises(ValueError, match="a launcher has started this one already"):
        launching.launch(["train"], ["--num_processes", "2"])


def test_files_that_an_accelerate_config_names_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in packaged(ACCELERATE_CONFIGS):
        settings = yaml.safe_load(launching._resolved(name, tmp_path).read_text()).get("deepspeed_config") or {}
        for key in ("deepspeed_config_file", "deepspeed_hostfile"):
            assert key not in settings or Path(settings[key]).is_file()


@pytest.mark.slow
def test_two_processes_train_from_an_empty_folder(tmp_path):
    command = [sys.executable, "-m", "trl_diffusion", "train", "agrpo", "--accelerate_config", "cpu_ddp"]
    command += ["--main_process_port", str(free_port()), "--dataset_size", "64", "--eval_size", "4"]
    command += ["--max_steps", "1", "--per_device_train_batch_size", "16"]
    code, output = run(command, tmp_path, cwd=tmp_path, PYTHONPATH=str(CONFIGS.parents[1]))
    assert code == 0, output[-3000:]
    assert "AGRPO, 1 update, " in output and (tmp_path / "outputs" / "gsm8k_agrpo" / "README.md").is_file()


# ---------------------------------------------------------------- evaluation on the canvas of training


def test_the_canvas_of_training_is_kept_beside_the_weights(tmp_path):
    assert recorded_decoding(str(tmp_path)) is None and recorded_decoding(EMBEDDED_MODEL) is None
    record_decoding(tmp_path, {"max_new_tokens": 24, "block_length": 8, "denoising_steps": 12})
    assert recorded_decoding(str(tmp_path)) == {"canvas_length": 24, "block_length": 8, "denoising_steps": 12}
    record_decoding(tmp_path, {"max_new_tokens": 32, "block_length": 8, "denoising_steps": 16})
    assert recorded_decoding(str(tmp_path)) == {"canvas_length": 32, "block_length": 8, "denoising_steps": 16}


def test_defaults_of_evaluation():
    args = evaluate.EvaluateArguments()
    trained = {"canvas_length": 24, "block_length": 8, "denoising_steps": 12}
    (decoding,) = args.decodings(**trained)
    assert (decoding.canvas_length, decoding.block_length, decoding.denoising_steps) == (24, 8, 12)
    args = evaluate.EvaluateArguments(canvas_lengths=[16, 32], block_length=4)
    assert [(each.canvas_length, each.block_length, each.denoising_steps) for each in args.decodings(**trained)] == [
        (16, 4, 8),
        (32, 4, 16),
    ]
    args = evaluate.EvaluateArguments(denoising_steps=[6, 24])
    assert [(each.canvas_length, each.denoising_steps) for each in args.decodings(**trained)] == [(24, 6), (24, 24)]


@pytest.mark.parametrize(
    ("positions", "prompt", "block", "expected"),
    [
        (4096, 200, None, (256, 32, 128)),
        (256, 100, None, (128, 32, 64)),
        (256, 230, None, (16, 16, 8)),
        (256, 230, 4, (24, 4, 12)),
        (10, 9, None, (1, 1, 1)),
    ],
)
def test_a_canvas_that_fits(positions, prompt, block, expected):
    assert tuple(evaluate.canvas_that_fits(positions, prompt, block).values()) == expected
    with pytest.raises(ValueError, match="256 positions"):
        evaluate.canvas_that_fits(256, 256, None)


@pytest.mark.slow
def test_an_adapter_is_evaluated_with_default_arguments(tmp_path, capsys):
    small = ["--use_cpu", "--max_steps", "1", "--eval_size", "2", "--dataset_size", "64"]
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear", "--per_device_train_batch_size", "8"]
    assert app.main(["train", "agrpo", *small, *lora, "--output_dir", str(tmp_path / "adapter")]) == 0
    given = ["--adapter", str(tmp_path / "adapter"), "--limit", "2", "--output_dir", str(tmp_path / "out")]
    assert app.main(["evaluate", *given, "--tasks", "word_problems=embedded"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["word_problems-canvas32-steps16"]


def test_parsers_never_abbreviate():
    parser = Parser([evaluate.EvaluateArguments], "trl-diffusion evaluate")
    with pytest.raises(ValueError, match="no option --batch"):
        parser.parse(["--batch", "3"])
