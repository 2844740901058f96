"""`trl-diffusion sample` as a user types it: its words and options, one answer, a conversation, saved files."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import tiny_model, tiny_sdar, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion.cli import sample
from trl_diffusion.models.embedded import EMBEDDED_MODEL, EMBEDDED_MODELS
from trl_diffusion.tasks.word_problems import load_word_problems

PROMPT = "Eva has 4 cards, gets 5 and loses 3. How many are left?"
ANSWER = "4 + 5 = 9\n9 - 3 = 6\n#### 6"


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("line", "model", "prompt"),
    [
        ([], None, None),
        (["What is 1/2 of 8?"], None, "What is 1/2 of 8?"),
        (["embedded_sdar"], "embedded_sdar", None),
        (["GSAI-ML/LLaDA-8B-Instruct"], "GSAI-ML/LLaDA-8B-Instruct", None),
        (["outputs/no/such/folder"], "outputs/no/such/folder", None),
        (["tests"], "tests", None),
        (["embedded", "Hello"], "embedded", "Hello"),
        (["embedded", "--seed", "3", "Hello"], "embedded", "Hello"),
        (["--model_name_or_path", "embedded", "Hello"], "embedded", "Hello"),
        (["--adapter", "A", "Hello"], None, "Hello"),
        (["org/base", "--adapter", "A", "Hello"], "org/base", "Hello"),
        (["--use_cpu", "Hello"], None, "Hello"),
        (["--use-cpu", "true", "Hello"], None, "Hello"),
        (["--save", "a.gif", "Hello", "--save", "b.HTML"], None, "Hello"),
        (["Hello", "--allow_other_base"], None, "Hello"),
        (["--seed", "3", "--", "--seed is an option?"], None, "--seed is an option?"),
        (["-3 + 5?"], None, "-3 + 5?"),
    ],
)
def test_words_are_model_and_prompt(line, model, prompt, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    request = sample.parse(line)
    assert (request.args.model_name_or_path, request.prompt) == (model, prompt)
    assert request.files == [Path(word) for word in line if word.endswith((".gif", ".HTML"))]
    assert request.args.use_cpu == any("cpu" in word for word in line)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["embedded", "What", "is"], "expected a model and a prompt at most.*quotes"),
        (["--model_name_or_path", "embedded", "tests", "Hello"], "expected a model and a prompt at most"),
        (["Hello", "--colour", "step"], "no option --colour"),
        (["--save", "a.gif"], "needs a prompt.*/save FILE"),
        (["Hello", "--save", "a.png"], r"saved as .gif or .html.*got 'a.png'"),
        (["Hello", "--color", "confidense"], "color must be one of step, confidence.*Did you mean 'confidence'"),
        (["Hello", "--delay", "-1"], "delay must be at least 0"),
        (["Hello", "--canvas_length", "0"], "canvas_length must be at least 1"),
        (["Hello", "--canvas_length", "250"], "canvas of 250 does not fit.*256 positions"),
        (["Hello", "--denoising_steps", "7", "--block_length", "8"], r"denoising_steps \(7\) must be a multiple"),
        (["a " * 300], "The prompt has .* tokens and the model 256 positions.*Shorten"),
        (["embedded", "Hello", "--adapter", EMBEDDED_MODEL], "holds no adapter"),
    ],
)
def test_bad_input_is_refused(line, problem, capsys):
    with pytest.raises((ValueError, SystemExit)) as stopped:
        sample.main(line)
    message = capsys.readouterr().err if stopped.type is SystemExit else str(stopped.value)
    assert re.search(problem, message.replace("\n", " ")), message


def test_help_lists_words_and_options(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    shown = capsys.readouterr().out
    assert "[MODEL] [PROMPT]" in shown and "--save FILE" in shown and "--canvas_length" in shown


def test_the_canvas_is_the_checkpoints_or_what_the_prompt_leaves():
    config = tiny_model(3).generation_config
    assert config.max_new_tokens is None
    small, large = tiny_model(3), tiny_model(3, max_position_embeddings=1000)
    assert sample.default_canvas(small, 10, None) == 54 and sample.default_canvas(large, 10, None) == 256
    large.generation_config.max_new_tokens = 40
    assert sample.default_canvas(large, 10, None) == 40 and sample.default_canvas(large, 970, None) == 30
    assert sample.default_canvas(tiny_sdar(3), 10, 4) == 52 and sample.default_canvas(tiny_sdar(3), 62, 4) == 1
    for folder in EMBEDDED_MODELS.values():
        assert json.loads((Path(folder) / "generation_config.json").read_text())["max_new_tokens"] == 32


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
    for options, settings in ([], {}), (["--canvas_length", "30"], {"max_new_tokens": 30}):
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
    monkeypatch.setattr(sample, "Console", lambda: console)
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
    assert first_answer in shown.out and shown.err.count("denoising steps") == 3
    for problem in ("no answer to keep yet", "no position is left to write", "There is no /sav;", "got 'a.png'"):
        assert problem in shown.out.replace("\n", " ")
    assert (tmp_path / "a.html").is_file()
