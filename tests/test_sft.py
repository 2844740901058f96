"""Masked SFT: the objective, the noise, and what training does to the weights."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from trl_diffusion.models import LLaDAConfig, LLaDAModelLM
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.sampling import row_generators
from trl_diffusion.trainers.sft import SFTConfig, SFTTrainer, draw_noise, masked_loss, tokenize_dataset

CANVAS = 16
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{a} and {b}?"}],
        "completion": [{"role": "assistant", "content": f"{a + b}"}],
    }
    for a in range(2, 5)
    for b in range(2, 6)
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def tiny_model(tokenizer=None, vocabulary: int = 12) -> LLaDAModelLM:
    size = vocabulary if tokenizer is None else len(tokenizer)
    torch.manual_seed(0)
    return LLaDAModelLM(
        LLaDAConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            mask_token_id=size - 1 if tokenizer is None else tokenizer.mask_token_id,
            eos_token_id=1,
            pad_token_id=1,
            end_token_ids=[1, 2],
        )
    )


def config(path, **changes) -> SFTConfig:
    defaults = {
        "output_dir": str(path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "max_completion_length": CANVAS,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return SFTConfig(**{**defaults, **changes})


def test_loss_is_cross_entropy_over_t_by_hand():
    model = tiny_model().eval()
    prompt, mask = torch.tensor([[1, 5, 6], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    answer = torch.tensor([[7, 8, 2, 1], [9, 2, 1, 1]])
    masked = torch.tensor([[True, False, True, False], [False, True, True, True]])
    level = torch.tensor([0.4, 0.8])

    loss = masked_loss(model, prompt, mask, answer, masked, level, model.family)

    expected = 0.0
    for row in range(2):
        ids = torch.cat([prompt[row], torch.where(masked[row], model.config.mask_token_id, answer[row])])
        attention = torch.cat([mask[row], torch.ones(4, dtype=torch.long)])
        logits = model(input_ids=ids[None], attention_mask=attention[None]).logits[0, 3:].float()
        logits[:, model.config.mask_token_id] = -torch.inf
        cross_entropy = -logits.log_softmax(-1)[range(4), answer[row]]
        expected = expected + (cross_entropy * masked[row]).sum() / level[row] / 4
    torch.testing.assert_close(loss, expected / 2, rtol=1e-6, atol=1e-6)


def test_expected_loss_at_a_level_equals_the_enumeration():
    """E over masks at fixed t = Σ over masks of t^k (1-t)^(L-k) · Σ CE / t / L, for L = 3."""
    model, t, length = tiny_model().eval(), 0.3, 3
    prompt, answer = torch.tensor([[4, 5]]), torch.tensor([[7, 2, 1]])

    def loss_of(pattern) -> float:
        masked = torch.tensor([pattern])
        with torch.no_grad():
            level = torch.tensor([t])
            return masked_loss(model, prompt, torch.ones_like(prompt), answer, masked, level, model.family).item()

    patterns = list(product([False, True], repeat=length))
    losses = {pattern: loss_of(pattern) for pattern in patterns}
    enumerated = sum(t ** sum(p) * (1 - t) ** (length - sum(p)) * losses[p] for p in patterns)
    draws = [tuple((generator.random(length) < t).tolist()) for generator in row_generators(0, rows=range(20_000))]
    samples = np.array([losses[draw] for draw in draws])
    error = samples.std() / len(samples) ** 0.5
    assert abs(samples.mean() - enumerated) < 4 * error
    # Without the weight 1/t the expectation is another one: the test can tell.
    assert abs(t * samples.mean() - enumerated) > 20 * error


def test_noise_has_the_stated_distribution_and_its_own_streams():
    masked, level = draw_noise(3, 0, 7, rows=range(20_000), length=8, min_noise_level=0.25)
    assert level.min() >= 0.25 and level.max() <= 1
    assert level.mean().item() == pytest.approx(0.625, abs=0.005)
    residual = (masked.float() - level.unsqueeze(1)).mean(0)
    assert residual.abs().max() < 0.02  # every position is masked with probability t

    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    again, _ = draw_noise(3, 0, 7, rows=[11, 5], length=8, min_noise_level=0.25)
    assert torch.equal(again, masked[[11, 5]])  # of its row, not of the batch
    other, _ = draw_noise(3, 0, 8, rows=range(100), length=8, min_noise_level=0.25)
    assert not torch.equal(other, masked[:100])
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def test_answers_get_the_turn_end_and_a_trained_tail(tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    trainer = SFTTrainer(model, config(tmp_path), Dataset.from_list(ROWS), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    eot, end = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|endoftext|>"])
    for ids in batch["completion_ids"].tolist():
        stop = ids.index(eot)
        assert len(ids) == CANVAS and set(ids[stop + 1 :]) == {end} and end not in ids[:stop]
    assert (batch["prompt_mask"][:, -1] == 1).all()
    header = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    assert (batch["prompt_ids"] == header).sum(1).tolist() == [2, 2]


def test_strings_and_messages_give_the_same_completion(tokenizer):
    family = tiny_model(tokenizer).family
    messages = tokenize_dataset(Dataset.from_list(ROWS[:1]), tokenizer, family, CANVAS)
    strings = Dataset.from_list([{"prompt": "2 and 2?", "completion": "4"}])
    assert tokenize_dataset(strings, tokenizer, family, CANVAS)["completion_ids"] == messages["completion_ids"]


def test_what_does_not_fit_is_refused(tokenizer):
    family = tiny_model(tokenizer).family
    with pytest.raises(ValueError, match=r"1 of 2 completions.*max_completion_length=4.*longest needs 6"):
        rows = [{"prompt": "1", "completion": "12345"}, {"prompt": "1", "completion": "123"}]
        tokenize_dataset(Dataset.from_list(rows), tokenizer, family, 4)
    with pytest.raises(ValueError, match=r"\['completion'\] missing, found \['prompt', 'text'\]"):
        tokenize_dataset(Dataset.from_list([{"prompt": "1", "text": "2"}]), tokenizer, family, 4)
    with pytest.raises(ValueError, match="one assistant message"):
        row = {"prompt": ROWS[0]["prompt"], "completion": [*ROWS[0]["prompt"], *ROWS[0]["completion"]]}
        tokenize_dataset(Dataset.from_list([row]), tokenizer, family, 4)
    with pytest.raises(ValueError, match="min_noise_level"):
        config("unused", min_noise_level=0.0)


@pytest.mark.parametrize(
    ("peft_config", "share"),
    # An adapter leaves the random embedding and head as they are, which keep the loss up.
    [(None, 0.9), (LoraConfig(r=4, target_modules="all-linear"), 1.0)],
    ids=["full", "lora"],
)
def test_training_moves_the_parameters_and_lowers_the_loss(tokenizer, tmp_path, peft_config, share):
    model = tiny_model(tokenizer)
    data = Dataset.from_list(ROWS)
    args = config(tmp_path, max_steps=60, per_device_train_batch_size=4)
    trainer = SFTTrainer(model, args, data, eval_dataset=data, processing_class=tokenizer, peft_config=peft_config)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    first = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == first  # evaluation noise is fixed
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < share * first
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name


def test_accumulation_gives_the_update_of_the_whole_batch(tokenizer, tmp_path):
    weights = []
    for batch, accumulation in ((4, 1), (2, 2)):
        model = tiny_model(tokenizer)
        args = config(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
        )
        SFTTrainer(model, args, Dataset.from_list(ROWS), processing_class=tokenizer).train()
        weights.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_resuming_equals_not_stopping(tokenizer, tmp_path):
    data = Dataset.from_list(ROWS)

    def trainer(steps: int) -> SFTTrainer:
        args = config(tmp_path, max_steps=8, save_strategy="steps", save_steps=steps, lr_scheduler_type="constant")
        return SFTTrainer(tiny_model(tokenizer), args, data, processing_class=tokenizer)

    whole = trainer(4)
    whole.train()
    resumed = trainer(100)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, left), right in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name
