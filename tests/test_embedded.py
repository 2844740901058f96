"""The checkpoint that ships with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion.evaluation import evaluate_accuracy
from trl_diffusion.models import LLaDAModelLM, SDARForCausalLM
from trl_diffusion.models.embedded import (
    EMBEDDED_MODEL,
    EMBEDDED_MODELS,
    EMBEDDED_PUZZLES_MODEL,
    EMBEDDED_SDAR_MODEL,
)
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.word_problems import correctness_reward, load_word_problems

GREEDY = SamplingConfig(32, 16, 8, temperature=0.0, unmasking="max_prob")
SETTINGS = {"batch_size": 128, "progress": False}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def is_right(text: str, row: dict) -> bool:
    return correctness_reward([text], [row["answer"]]) == [1.0]


def test_they_are_small():
    files = [path for folder in EMBEDDED_MODELS.values() for path in Path(folder).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000


def test_it_loads_as_the_native_class_with_its_facts(model, tokenizer):
    assert type(model) is LLaDAModelLM
    end, turn_end, mask = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|eot_id|>", "<|mask|>"])
    assert model.family.end_token_ids == (end, turn_end)
    assert model.family.tail_token_id == end == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert model.family.mask_token_id == mask == tokenizer.mask_token_id
    assert model.family.num_tokens == len(tokenizer) <= 512
    assert tokenizer.padding_side == "left" and tokenizer.bos_token == "<|startoftext|>"
    assert model.dtype == torch.float32


def test_chat_template_is_llada_s(tokenizer):
    messages = [{"role": "user", "content": " Hi? "}, {"role": "assistant", "content": "4"}]
    user = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    render = tokenizer.apply_chat_template
    assert render(messages[:1], tokenize=False, add_generation_prompt=True) == user + header
    assert render(messages, tokenize=False) == f"{user}{header}4<|eot_id|>"


@settings(max_examples=300, derandomize=True, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = _TOKENIZER
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


_TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def test_digits_are_split_one_by_one(tokenizer):
    assert tokenizer.tokenize("12 + 345") == ["1", "2", "Ġ+Ġ", "3", "4", "5"]


@pytest.mark.slow
def test_greedy_is_often_wrong_and_sampling_finds_the_right_answer(model, tokenizer):
    """What reinforcement learning needs: room above the greedy answer, and right answers among eight samples."""
    rows = load_word_problems("test", 128, seed=1)
    greedy = evaluate_accuracy(model, tokenizer, rows, is_right, decoding=GREEDY, **SETTINGS)
    assert 0.15 < greedy.value < 0.5
    prompts = rows.select(range(32))
    sampled = evaluate_accuracy(
        model,
        tokenizer,
        prompts,
        is_right,
        decoding=replace(GREEDY, temperature=1.0, unmasking="random"),
        completions_per_prompt=8,
        **SETTINGS,
    )
    assert 0.25 < sampled.value < 0.6


def test_evaluation_is_deterministic(model, tokenizer):
    rows = load_word_problems("test", 16, seed=2)
    sampling = {**SETTINGS, "decoding": replace(GREEDY, temperature=1.0), "completions_per_prompt": 2}
    counts = {evaluate_accuracy(model, tokenizer, rows, is_right, seed=3, **sampling).correct for _ in range(2)}
    assert len(counts) == 1


def test_the_block_causal_model_has_the_same_tokens_and_room_above_its_greedy_answers(model, tokenizer):
    network = AutoModelForCausalLM.from_pretrained(EMBEDDED_SDAR_MODEL).eval()
    assert type(network) is SDARForCausalLM and network.family.attention_block == 4
    files = [Path(folder) / "tokenizer.json" for folder in (EMBEDDED_MODEL, EMBEDDED_SDAR_MODEL)]
    assert files[0].read_bytes() == files[1].read_bytes()
    facts = ("mask_token_id", "num_tokens", "end_token_ids", "tail_token_id")
    assert [getattr(network.family, fact) for fact in facts] == [getattr(model.family, fact) for fact in facts]
    rows = load_word_problems("test", 64, seed=1)
    greedy = evaluate_accuracy(
        network, tokenizer, rows, is_right, decoding=replace(GREEDY, block_length=4), **SETTINGS
    )
    assert 0.25 < greedy.value < 0.75


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "greedy", "sampled"),
    [("sudoku_sweeps", (0.55, 0.85), (0.2, 0.45)), ("countdown_search", (0.2, 0.5), (0.05, 0.25))],
)
def test_the_puzzles_model_is_often_wrong_and_sampling_finds_right_answers(task, greedy, sampled):
    network = AutoModelForCausalLM.from_pretrained(EMBEDDED_PUZZLES_MODEL).eval()
    its_tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_PUZZLES_MODEL)
    rows = TASKS[task].generate("test", 48, 1)
    decoding = SamplingConfig(60, 30, 10, temperature=0.0, unmasking="max_prob")
    for temperature, (least, most) in ((0.0, greedy), (1.0, sampled)):
        found = evaluate_accuracy(
            network,
            its_tokenizer,
            rows,
            TASKS[task].is_correct,
            decoding=replace(decoding, temperature=temperature),
            completions_per_prompt=1 if temperature == 0 else 2,
            **SETTINGS,
        )
        assert least < found.value < most
