"""`trl-diffusion sample` as a user types it: its words and options, one answer, a conversation, saved files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documentation import ROOT, blocks_of, commands
from launching import HANG
from PIL import Image, ImageChops, ImageStat
from rich.console import Console
from tiny import tiny_model, tiny_sdar, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion.cli import sample
from trl_diffusion.models.embedded import EMBEDDED_MODEL, EMBEDDED_MODELS
from trl_diffusion.runtime.recorded_decoding import record_decoding
from trl_diffusion.tasks.word_problems import load_word_problems

PROMPT = "Eva has 4 cards, gets 5 and loses 3. How many are left?"
ANSWER = "4 + 5 = 9\n9 - 3 = 6\n#### 6"


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("line", "model", "prompt"),
    [
        ([], "embedded", None),
        (["What is 1/2 of 8?"], "embedded", "What is 1/2 of 8?"),
        (["embedded_sdar"], "embedded_sdar", None),
        (["GSAI-ML/LLaDA-8B-Instruct"], "GSAI-ML/LLaDA-8B-Instruct", None),
        (["outputs/no/such/folder"], "outputs/no/such/folder", None),
        (["tests"], "tests", None),
        (["embedded", "Hello"], "embedded", "Hello"),
        (["embedded", "--seed", "3", "Hello"], "embedded", "Hello"),
        (["--model_name_or_path", "embedded", "Hello"], "embedded", "Hello"),
        (["--adapter", "A", "Hello"], None, "Hello"),
        (["org/base", "--adapter", "A", "Hello"], "org/base", "Hello"),
        (["--use_cpu", "Hello"], "embedded", "Hello"),
        (["--use-cpu", "true", "Hello"], "embedded", "Hello"),
        (["--save", "a.gif", "Hello", "--save", "b.HTML"], "embedded", "Hello"),
        (["Hello", "--allow_other_base"], "embedded", "Hello"),
        (["--seed", "3", "--", "--seed is an option?"], "embedded", "--seed is an option?"),
        (["-3 + 5?"], "embedded", "-3 + 5?"),
    ],
)
def test_words_are_model_and_prompt(line, model, prompt, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = sample.parse(line)
    assert (args.model_name_or_path, args.prompt) == (model, prompt)
    assert args.save == [word for word in line if word.endswith((".gif", ".HTML"))]
    assert args.use_cpu == any("cpu" in word for word in line)
    assert args.seed == (3 if "--seed" in line else 0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["embedded", "What", "is"], "Expected a model and a prompt at most.*quotes"),
        (["--model_name_or_path", "embedded", "tests", "Hello"], "Expected a model and a prompt at most"),
        (["embeded", "Hello"], "no model 'embeded'.*Did you mean 'embedded'"),
        (["Hello", "--colour", "step"], "no option --colour. Did you mean '--color'"),
        (["Hello", "--adapter", "--seed", "3"], "argument --adapter: expected one argument"),
        (["--save", "a.gif"], "needs a prompt.*/save FILE"),
        (["Hello", "--save", "a.png"], r"saved as .gif or .html.*got 'a.png'"),
        (["Hello", "--color", "confidense"], "color must be one of step, confidence.*Did you mean 'confidence'"),
        (["Hello", "--delay", "-1"], "delay must be at least 0"),
        (["Hello", "--canvas_length", "0"], "canvas_length must be at least 1"),
        (["Hello", "--canvas_length", "250"], "canvas of 250 does not fit.*256 positions"),
        (["Hello", "--denoising_steps", "7", "--block_length", "8"], r"denoising_steps \(7\) must be a multiple"),
        (["a " * 300], "canvas of 32 does not fit.* tokens, and the model has 256 positions"),
        (["embedded", "Hello", "--adapter", EMBEDDED_MODEL], "adapter"),
    ],
)
def test_bad_input_is_refused(line, problem):
    with pytest.raises((ValueError, OSError), match=problem):
        sample.main(line)


def planned(model, folder: Path, **settings) -> tuple[int, int, int, int]:
    """Length of the canvas; canvas, block and steps of the sampler; for a prompt of 10 tokens."""
    length, config = sample.SampleArguments(model_name_or_path=str(folder), **settings).plan(model, 10)
    return length, config.canvas_length, config.block_length, config.denoising_steps


def test_canvas_blocks_and_steps(tmp_path):
    """As the model has room, as it was trained, or as the user says; what is not said follows from what is."""
    small, large = tiny_model(3), tiny_model(3, max_position_embeddings=1000)
    assert planned(large, tmp_path) == (256, 256, 32, 128) and planned(small, tmp_path) == (32, 32, 32, 16)
    assert planned(tiny_sdar(3), tmp_path) == (52, 52, 4, 26)
    assert planned(large, tmp_path, canvas_length=40) == (40, 64, 32, 32)
    assert planned(large, tmp_path, block_length=64, denoising_steps=8) == (256, 256, 64, 8)
    record_decoding(tmp_path, {"max_new_tokens": 24, "block_length": 8, "denoising_steps": 6})
    assert planned(large, tmp_path) == (24, 24, 8, 6)
    assert planned(large, tmp_path, block_length=12) == (24, 24, 12, 12)
    assert planned(large, tmp_path, denoising_steps=24) == (24, 24, 8, 24)
    assert planned(large, tmp_path, canvas_length=40) == (40, 64, 32, 32)
    bundled = sample.parse(["embedded_sdar"])
    assert (bundled.canvas_length, bundled.block_length) == (32, 4)
    bundled = sample.parse(["embedded_chains"])
    assert (bundled.canvas_length, bundled.block_length, bundled.denoising_steps) == (45, 5, 27)


# ---------------------------------------------------------------- one answer


def test_the_text_alone_goes_where_there_is_no_terminal(capsys):
    sample.main([PROMPT, "--block_length", "8", "--denoising_steps", "32"])
    shown = capsys.readouterr()
    assert shown.out == f"{ANSWER}\n" and shown.err.endswith("16 denoising steps\n")


@pytest.mark.parametrize("name", ["embedded", "embedded_sdar"])
def test_an_answer_is_that_of_generate(name, capsys):
    """By default, and on a canvas that is no multiple of its blocks."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODELS[name])
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODELS[name])
    messages = load_word_problems("test", 1)[0]["prompt"]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    for options, length in ([], 32), (["--canvas_length", "30"], 30):
        settings = {"max_new_tokens": length}
        sample.main([name, messages[0]["content"], *options])
        (ids,) = model.generate(**inputs, **settings)
        expected = tokenizer.decode(ids[inputs["input_ids"].size(1) :], skip_special_tokens=True)
        assert capsys.readouterr().out == f"{expected}\n" and expected


def test_a_seed_draws_another_answer_and_the_same_again(capsys):
    answers = []
    for seed in ("0", "1", "0"):
        sample.main([PROMPT, "--temperature", "3", "--seed", seed])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[2] != answers[1]


def test_a_model_without_a_chat_template_continues_a_text(tmp_path, capsys):
    model, tokenizer = tiny_model(3), tiny_tokenizer()
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sample.main([str(tmp_path), "a b b", "--canvas_length", "8"])
    ids = model.eval().generate(tokenizer("a b b", return_tensors="pt")["input_ids"], max_new_tokens=8)
    assert capsys.readouterr().out == f"{tokenizer.decode(ids[0, 3:], skip_special_tokens=True)}\n"
    with pytest.raises(ValueError, match="no chat template, so it takes no --system"):
        sample.main([str(tmp_path), "a b", "--system", "b"])
    with pytest.raises(ValueError, match="no chat template, so it holds no conversation"):
        sample.main([str(tmp_path)])


def terminal(monkeypatch) -> io.StringIO:
    """Let the command believe that it writes to a terminal; returns what it writes."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="truecolor", width=70)
    monkeypatch.setattr(sample, "Console", lambda **_: console)
    return shown


def test_a_terminal_shows_the_canvas(monkeypatch, capsys):
    shown = terminal(monkeypatch)
    sample.main([PROMPT, "--delay", "0", "--color", "confidence", "--block_length", "8"])
    drawn = shown.getvalue()
    assert "░░░░░░░░" in drawn and "8 of 8 steps" in drawn and "confidence 0" in drawn and "48;2;" in drawn
    assert capsys.readouterr().out == ""


def test_answers_are_saved(tmp_path, capsys):
    files = [tmp_path / "new" / "a.gif", tmp_path / "a.html"]
    sample.main([PROMPT, "--system", "Be <brief>.", *(word for file in files for word in ("--save", str(file)))])
    said = capsys.readouterr().err
    assert all(f"Saved: {file}\n" in said for file in files)
    page = files[1].read_text("utf-8")
    data = json.loads(page.partition('id="denoising">')[2].partition("</script>")[0])
    assert data["prompt"] == f"system: Be <brief>.\nuser: {PROMPT}"
    assert data["caption"] == "embedded, canvas 32, 16 steps, block 32, max_prob, greedy"
    with Image.open(files[0]) as image:
        assert image.n_frames == len(data["frames"]) == 17


@pytest.mark.slow
def test_nothing_else_is_written_to_stdout():
    """By a new process, into which DeepSpeed is imported; it writes a warning to stdout."""
    command = [sys.executable, "-m", "trl_diffusion", "sample", PROMPT, "--use_cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert (result.returncode, result.stdout) == (0, f"{ANSWER}\n"), result.stderr


# ---------------------------------------------------------------- a conversation


def test_a_conversation(monkeypatch, capsys, tmp_path):
    """Each answer has the turns before it; the commands work, and what cannot be answered is forgotten."""
    too_long = "x " * 300
    lines = [
        "/save a.gif",
        PROMPT,
        "",
        too_long,
        "And now?",
        "/clear",
        "/sav a.gif",
        "Make 13 from 2, 3, 5.",
        f"/save {tmp_path / 'a.html'}",
        "/save a.png",
        "/exit",
        "never read",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    asked, encode = [], sample.encode_prompt

    def record(messages, tokenizer):
        asked.append([message["content"] for message in messages])
        return encode(messages, tokenizer)

    monkeypatch.setattr(sample, "encode_prompt", record)
    sample.main(["--system", "Count."])
    shown = capsys.readouterr()
    first_answer = asked[1][2]
    assert asked == [
        ["Count.", PROMPT],
        ["Count.", PROMPT, first_answer, too_long.strip()],
        ["Count.", PROMPT, first_answer, "And now?"],
        ["Count.", "Make 13 from 2, 3, 5."],
    ]
    assert (
        shown.out.startswith(f"{first_answer}\n")
        and "/clear" not in shown.out
        and shown.err.count("denoising steps") == 3
    )
    for problem in ("no answer to keep yet", "canvas of 32 does not fit", "There is no /sav;", "got 'a.png'"):
        assert problem in shown.err.replace("\n", " ")
    assert (tmp_path / "a.html").is_file()


# ---------------------------------------------------------------- the animation of the documentation


def test_the_animation_is_made_by_the_command_beside_it(tmp_path):
    (command,) = [
        words
        for block in blocks_of(ROOT / "docs" / "pages" / "viewing.md")
        if block.language == "bash"
        for words in commands(block.code)
        if "docs/pages/images/denoising.gif" in words
    ]
    made, shown = tmp_path / "made.gif", ROOT / "docs" / "pages" / "images" / "denoising.gif"
    sample.main([str(made) if word.endswith(".gif") else word for word in command[2:]])
    with Image.open(made) as new, Image.open(shown) as old:
        assert (new.n_frames, new.size) == (old.n_frames, old.size) and new.n_frames == 17
        for number in range(new.n_frames):
            new.seek(number), old.seek(number)
            assert new.info["duration"] == old.info["duration"]
            difference = ImageChops.difference(new.convert("RGB"), old.convert("RGB"))
            assert max(ImageStat.Stat(difference).mean) < 1  # fonts and palettes may differ a little
    assert shown.stat().st_size <= 400_000
