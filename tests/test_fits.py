"""What is checked at start of prompts, canvases and how a model is loaded: the same for every way to run it."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from methods import method_named, text_reward
from peft import LoraConfig
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_diffusion.evaluation import evaluate_accuracy
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.trainers import AGRPOConfig, AGRPOTrainer, SFTConfig, SFTTrainer

AGRPO = method_named("agrpo")
QUICK = dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no")


def with_prompts(folder, prompts: list[str], model=None, eval_prompts=None, **settings) -> AGRPOTrainer:
    """An AGRPO trainer of a model with 16 positions on canvases of 8."""
    return AGRPOTrainer(
        model or tiny_model(seed=3, max_position_embeddings=16),
        text_reward,
        AGRPO.make(folder, **settings).args,
        Dataset.from_dict({"prompt": prompts}),
        None if eval_prompts is None else Dataset.from_dict({"prompt": eval_prompts}),
        tiny_tokenizer(),
    )


# ------------------------------------------- positions


def test_a_trainer_names_prompts_that_do_not_fit(tmp_path):
    with_prompts(tmp_path, ["a b"] * 7 + ["a " * 8]).train()
    message = "canvas of 8 does not fit: the longest prompt of train_dataset has 9 tokens.*16 positions.*at most 7"
    with pytest.raises(ValueError, match=message):
        with_prompts(tmp_path, ["a b"] * 70 + ["a " * 9] + ["b"] * 70)
    with pytest.raises(ValueError, match="longest prompt of eval_dataset has 10 tokens"):
        with_prompts(tmp_path, ["a b"] * 8, eval_prompts=["a", "b " * 10], per_device_eval_batch_size=4)


def test_a_canvas_that_leaves_no_room_is_refused(tmp_path):
    settings = dict(max_completion_length=16, denoising_steps=4, block_length=4)
    with pytest.raises(ValueError, match=r"canvas of 16 does not fit: .* of any data set has 1 tokens"):
        with_prompts(tmp_path, ["a"] * 8, **settings)


def test_prompts_that_are_only_met_in_the_rollout(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a " * 9] * 8}).to_iterable_dataset()
    trainer = AGRPOTrainer(
        tiny_model(seed=3, max_position_embeddings=16),
        text_reward,
        AGRPO.make(tmp_path).args,
        rows,
        None,
        tiny_tokenizer(),
    )
    with pytest.raises(ValueError, match="longest prompt of this batch has 9 tokens"):
        trainer.train()


@pytest.mark.parametrize("held_out", [False, True])
def test_sft_names_prompts_that_do_not_fit(tmp_path, held_out):
    def rows(prompt: str) -> Dataset:
        return Dataset.from_dict({"prompt": ["a", prompt], "completion": ["b", "b"]})

    def make(prompt: str) -> SFTTrainer:
        return SFTTrainer(
            tiny_model(max_position_embeddings=16),
            SFTConfig(str(tmp_path), max_completion_length=8, max_steps=1, **QUICK),
            rows("a") if held_out else rows(prompt),
            rows(prompt) if held_out else None,
            tiny_tokenizer(),
        )

    make("a " * 8).train()
    with pytest.raises(ValueError, match=r"canvas of 8 does not fit.*has 9 tokens.*16 positions"):
        make("a " * 9)


def test_an_evaluation_names_prompts_that_do_not_fit_before_it_decodes():
    model, tokenizer = tiny_model(max_position_embeddings=16), tiny_tokenizer()
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("decoded"))
    rows = Dataset.from_dict({"prompt": ["a", "a " * 9]})
    with pytest.raises(ValueError, match=r"canvas of 8 does not fit.*has 9 tokens.*16 positions"):
        evaluate_accuracy(
            model, tokenizer, rows, lambda *_: True, decoding=SamplingConfig(8, 4, 4, temperature=0.0), batch_size=1
        )


def test_an_evaluation_does_not_take_the_checkpoint_s_sampling_settings():
    model, tokenizer = tiny_model(5, 10.0), tiny_tokenizer()
    rows = Dataset.from_dict({"prompt": ["a b", "b a"]})

    def texts(temperature: float) -> list[str]:
        seen: list[str] = []
        decoding = SamplingConfig(8, 4, 4, temperature, unmasking="max_prob")
        evaluate_accuracy(
            model,
            tokenizer,
            rows,
            lambda text, _: bool(seen.append(text)),
            decoding=decoding,
            completions_per_prompt=8,
        )
        return seen

    expected = texts(0.0), texts(1.2)
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, max_new_tokens=4)
    assert (texts(0.0), texts(1.2)) == expected
    assert len(set(expected[1])) > len(set(expected[0]))


# ------------------------------------------- how a model is loaded


def test_torch_dtype_is_refused(tmp_path):
    def sft(kwargs):
        rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
        args = SFTConfig(str(tmp_path), max_completion_length=8, model_init_kwargs=kwargs, **QUICK)
        return SFTTrainer(EMBEDDED_MODEL, args, rows)

    def agrpo(kwargs):
        args = AGRPOConfig(
            str(tmp_path),
            max_completion_length=32,
            denoising_steps=16,
            block_length=8,
            per_device_train_batch_size=8,
            num_generations=8,
            model_init_kwargs=kwargs,
            **QUICK,
        )
        return AGRPOTrainer(EMBEDDED_MODEL, text_reward, args, Dataset.from_dict({"prompt": ["a"] * 64}))

    for make in (sft, agrpo):
        for value in ("bfloat16", torch.bfloat16, "auto"):
            with pytest.raises(
                ValueError, match=r"model_init_kwargs has torch_dtype=.*(bfloat16|auto).*`dtype`.*float32"
            ):
                make({"torch_dtype": value})
        assert make({"dtype": "bfloat16"}).model.dtype == torch.bfloat16
        assert make(None).model.dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_eight_bits_are_pointed_out_at_start(tmp_path, caplog, bits):
    pytest.importorskip("bitsandbytes")
    args = AGRPO.make(tmp_path, max_completion_length=32, denoising_steps=16, block_length=8).args
    with caplog.at_level(logging.WARNING, "trl_diffusion.runtime.arguments"):
        AGRPOTrainer(
            EMBEDDED_MODEL,
            text_reward,
            args,
            Dataset.from_dict({"prompt": ["a"] * 8}),
            None,
            AutoTokenizer.from_pretrained(EMBEDDED_MODEL),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            quantization_config=BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4),
        )
    said = [record.message for record in caplog.records if "8 bits" in record.message]
    assert len(said) == (bits == 8)
    assert bits == 4 or "|log ratio| around 0.1" in said[0]


def test_eight_bits_compute_a_row_by_its_batch_and_four_do_not():
    """Why it is said."""
    pytest.importorskip("bitsandbytes")
    ids = torch.randint(6, 380, (8, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(8, 24).expand(8, -1)
    differences = {}
    for bits in (4, 8):
        quantised = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, quantization_config=quantised, dtype="float32")
        with torch.no_grad():
            together = model(ids, positions=positions, targets=ids[:, 8:]).log_probs[:1]
            alone = model(ids[:1], positions=positions[:1], targets=ids[:1, 8:]).log_probs
        differences[bits] = (together - alone).abs().max().item()
    assert differences[4] < 1e-4 and differences[8] > 1e-2
