"""A2D: what its `config.json` leaves out comes from the user and the tokenizer, and both kinds sample and score."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from datasets import Dataset
from model_helpers import MASK, random_weights, write_checkpoint, write_tokenizer
from safetensors.torch import load_file
from tiny import MASK as TINY_MASK
from tiny import TAIL, coded_prompts, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_diffusion.cli import train
from trl_diffusion.evaluation.loading import load_model
from trl_diffusion.likelihood import score_views, trajectory_views
from trl_diffusion.models import A2DQwen2LMHeadModel, A2DQwen3Config, A2DQwen3LMHeadModel, family_of
from trl_diffusion.models.meta_model import meta_model
from trl_diffusion.models.published import published_config
from trl_diffusion.sampling import SamplingConfig, row_generators, sample
from trl_diffusion.tasks import TASKS
from trl_diffusion.trainers import DiffuGRPOConfig, DiffuGRPOTrainer

CLASSES = {"a2d-qwen3": A2DQwen3LMHeadModel, "a2d-qwen2": A2DQwen2LMHeadModel}
LEFT_OUT = ("block_size", "mask_token_id")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": None,
    "chat_template": TEMPLATE,
    "eos_token": "<|im_end|>",
    "mask_token": "<|mask|>",
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def checkpoint(folder, family="a2d-qwen3", tokenizer=TOKENIZER, **config):
    """A checkpoint as the hub has it: tied embeddings, and neither block size nor mask token in its config."""
    if tokenizer is not None:
        write_tokenizer(folder, SPECIAL, tokenizer, tokenizer_json=True, vocabulary_files=True)
    weights = random_weights(family, tied=True)
    return write_checkpoint(folder, family, weights, LEFT_OUT, tie_word_embeddings=True, **config)


def enlarged(folder, family="a2d-qwen3"):
    """The same with a row of the embedding for every token of the tokenizer, and some that have none."""
    model = CLASSES[family].config_class.from_pretrained(checkpoint(folder, family), block_size=0)
    model.vocab_size, model.block_size, model.mask_token_id = 300, None, None
    model.eos_token_id, model.num_tokens = 281, None  # <|im_end|>
    torch.manual_seed(0)
    CLASSES[family](model).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in (*LEFT_OUT, "num_tokens")})
    )
    return folder


@pytest.mark.parametrize("family", list(CLASSES))
def test_the_block_comes_from_the_user_and_the_mask_from_the_tokenizer(tmp_path, family):
    path = enlarged(tmp_path, family)
    for block, known in ((0, None), (4, 4)):
        model = AutoModelForCausalLM.from_pretrained(path, block_size=block)
        assert type(model) is CLASSES[family] and model.lm_head.weight is model.model.embed_tokens.weight
        facts = family_of(model)
        assert (facts.mask_token_id, facts.num_tokens, facts.attention_block) == (282, 283, known)
        assert (facts.end_token_ids, facts.logit_shift) == ((281,), 0)
        model.save_pretrained(tmp_path / f"saved{block}")
        # nothing is asked for again, also without the tokenizer
        assert family_of(AutoModelForCausalLM.from_pretrained(tmp_path / f"saved{block}")) == facts
        weights = load_file(tmp_path / f"saved{block}" / "model.safetensors")
        stored = load_file(path / "model.safetensors")
        assert weights.keys() == stored.keys() and all(torch.equal(weights[name], stored[name]) for name in stored)


@pytest.mark.parametrize("load", [AutoConfig, A2DQwen3Config, A2DQwen3LMHeadModel])
def test_every_way_of_loading_reads_the_tokenizer(tmp_path, load):
    loaded = load.from_pretrained(enlarged(tmp_path))
    config = getattr(loaded, "config", loaded)
    assert (config.mask_token_id, config.num_tokens, config.block_size) == (282, 283, None)


def test_what_a_user_or_config_says_is_taken(tmp_path):
    path = enlarged(tmp_path)
    assert AutoConfig.from_pretrained(path, mask_token_id=7).mask_token_id == 7
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"mask_token_id": 9, "num_tokens": 290}))
    config = AutoConfig.from_pretrained(path)
    assert (config.mask_token_id, config.num_tokens) == (9, 290)


def test_a_checkpoint_of_which_nobody_says_the_block_is_refused(tmp_path):
    path = enlarged(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    for use in (lambda: family_of(model), lambda: model(input_ids=torch.zeros(1, 3, dtype=torch.long))):
        with pytest.raises(ValueError, match=r"does not say what a token sees.*Give block_size=0 for full attention"):
            use()
    with pytest.raises(ValueError, match=r"as a command's --block_size"):
        load_model(str(path))
    assert load_model(str(path), block_size=0)[0].attention_block is None
    assert meta_model(str(path)).lm_head is not None  # its layers do not depend on it


@pytest.mark.parametrize("tokenizer", [None, {**TOKENIZER, "mask_token": None}], ids=["no tokenizer", "no mask"])
def test_a_mask_token_is_not_guessed(tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path, tokenizer=tokenizer), block_size=0)
    with pytest.raises(ValueError, match=r"has no `mask_token_id`.*as an argument of from_pretrained"):
        family_of(model)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, block_size=0, mask_token_id=MASK)
    assert family_of(model).mask_token_id == MASK


def test_weights_of_a_neighbouring_family_are_refused(tmp_path):
    for family, other in (("a2d-qwen3", "a2d-qwen2"), ("a2d-qwen2", "a2d-qwen3")):
        path = write_checkpoint(tmp_path / family, family, random_weights(other))
        with pytest.raises(ValueError, match=f"does not have the weights of {CLASSES[family].__name__}"):
            AutoModelForCausalLM.from_pretrained(path)


def test_flex_attention_has_no_blocks(tmp_path):
    checkpoint(tmp_path)
    with pytest.raises(ValueError, match="runs with attn_implementation 'eager' or 'sdpa'; got 'flex_attention'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, block_size=4, attn_implementation="flex_attention")


def test_the_tokenizer_loads_and_thinking_can_be_turned_off(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(tmp_path))
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert (tokenizer.mask_token, tokenizer.pad_token, tokenizer.eos_token) == (SPECIAL[3], SPECIAL[0], SPECIAL[2])
    turns = [{"role": "user", "content": "two"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_texts_end_and_fill_as_the_published_vocabulary_says():
    """Qwen3-0.6B's config ends texts with <|im_end|>; the canvas behind it is filled with <|endoftext|>."""
    config = published_config("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1")
    with torch.device("meta"):
        family = A2DQwen3LMHeadModel(config).family
    assert (family.end_token_ids, family.tail_token_id) == ((151643, 151645), 151643)
    assert (family.mask_token_id, family.num_tokens, family.attention_block) == (151669, 151670, 32)


# ------------------------------------------- rollouts and their scores

CANVAS, ROWS = 12, 16


def network(family: str, block: int):
    settings = {"head_dim": 8} if family == "a2d-qwen3" else {}
    return tiny_model(5, 10.0, CLASSES[family], block_size=block, **settings).eval()


@pytest.mark.parametrize(("family", "block"), list(product(CLASSES, (0, 4))))
@torch.no_grad()
def test_rollouts_are_scored_as_they_were_sampled(family, block):
    model, (prompts, mask) = network(family, block), coded_prompts(ROWS)
    config = SamplingConfig(CANVAS, 6, 4, 1.3)
    trajectory = sample(model, prompts, mask, config, row_generators(0, rows=range(ROWS)))
    total = torch.zeros(ROWS, CANVAS)
    for step in range(config.denoising_steps):
        steps = torch.full((ROWS,), step)
        views = trajectory_views(trajectory.completion_ids, trajectory.unmask_step, steps, TINY_MASK)
        total += score_views(model, prompts, mask, trajectory.completion_ids, views, config.temperature).logps
    assert (total != 0).sum() > 50
    torch.testing.assert_close(total, trajectory.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", list(CLASSES))
@torch.no_grad()
def test_the_block_cache_changes_nothing(family):
    model, (prompts, mask) = network(family, 4), coded_prompts(ROWS)
    runs = [
        sample(
            model, prompts, mask, SamplingConfig(CANVAS, 6, 4, 1.3, cache=cache), row_generators(0, rows=range(ROWS))
        )
        for cache in ("none", "block")
    ]
    assert torch.equal(runs[0].completion_ids, runs[1].completion_ids)
    torch.testing.assert_close(runs[0].logps, runs[1].logps, atol=1e-5, rtol=1e-5)


def test_a_trainer_takes_block_and_mask_from_its_arguments(tmp_path):
    model = network("a2d-qwen3", 0)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    left_out = {key: value for key, value in config.items() if key not in (*LEFT_OUT, "num_tokens")}
    (tmp_path / "model" / "config.json").write_text(json.dumps(left_out))

    def trainer(**settings):
        args = DiffuGRPOConfig(
            str(tmp_path / "run"),
            max_completion_length=8,
            denoising_steps=4,
            block_length=4,
            per_device_train_batch_size=8,
            num_generations=4,
            num_iterations=1,
            max_steps=1,
            use_cpu=True,
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
            learning_rate=1e-2,
            **settings,
        )
        return DiffuGRPOTrainer(
            str(tmp_path / "model"),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["a b", "b a a", "a", "b"]}),
        )

    with pytest.raises(ValueError, match="Give block_size=0"):
        trainer()
    trained = trainer(model_init_kwargs={"block_size": 0})
    assert (trained.family.mask_token_id, trained.family.attention_block) == (TINY_MASK, None)
    trained.train()
    trained.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert family_of(again) == trained.family and again.family.tail_token_id == TAIL
    assert AutoConfig.from_pretrained(tmp_path / "saved").block_size == 0


def length_reward(completions, **kwargs) -> list[float]:
    """A random network solves no problem, so that equations alone would teach it nothing."""
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.slow
def test_the_recipe_trains_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The config of the recipe, on a checkpoint of its architecture with small layers, and a shorter canvas."""
    task = replace(TASKS["countdown"], rewards=(length_reward, TASKS["countdown"].rewards[1]))
    monkeypatch.setitem(TASKS, "countdown", task)
    path = enlarged(tmp_path / "a2d")
    short = "--max_completion_length 8 --block_length 8 --denoising_steps 4 --num_mc_samples 2"
    small = f"{short} --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --save_steps 1 --eval_size 4"
    command = (
        f"agrpo --config a2d_qwen3/countdown_agrpo --model_name_or_path {path} --dataset_path embedded {small} "
        f"--use_cpu --bf16 false --eval_every 0 --disable_tqdm true --logging_steps 1"
    ).split()
    for steps, folder in ((2, "whole"), (1, "parts")):
        train.main([*command, "--max_steps", str(steps), "--output_dir", str(tmp_path / folder)])
    train.main(
        [*command, "--max_steps", "2", "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "true"]
    )
    whole, parts = (
        load_file(tmp_path / folder / "checkpoint-2" / "model.safetensors") for folder in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    first = load_file(path / "model.safetensors")
    assert any(not torch.equal(first[name], whole[name]) for name in whole)
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (saved["block_size"], saved["mask_token_id"], saved["model_type"]) == (0, 282, "a2d-qwen3")
