"""Masked SFT: the objective, the noise, and what training does to the weights."""

from __future__ import annotations

import os
from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from methods import method_named
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from trl_diffusion.models import LLaDAConfig, LLaDAModelLM
from trl_diffusion.models.embedded import EMBEDDED_MODEL, EMBEDDED_SDAR_MODEL
from trl_diffusion.runtime.sft_report import scored_positions, sft_report, update_cost
from trl_diffusion.sampling import row_generators
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import sft
from trl_diffusion.trainers.base import sft_model
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


@pytest.mark.parametrize("unscored", [(), ((0, 0), (1, 1), (1, 2))])
def test_loss_is_cross_entropy_over_t_by_hand(unscored):
    """Unscored positions are shown whatever the noise says, and leave the divisor."""
    model = tiny_model().eval()
    prompt, mask = torch.tensor([[1, 5, 6], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    answer = torch.tensor([[7, 8, 2, 1], [9, 2, 1, 1]])
    masked = torch.tensor([[True, False, True, False], [False, True, True, True]])
    level = torch.tensor([0.4, 0.8])

    scored = torch.ones_like(masked)
    for position in unscored:
        scored[position] = False

    loss = masked_loss(model, prompt, mask, answer, masked, level, model.family, scored if unscored else None)

    masked &= scored
    expected = 0.0
    for row in range(2):
        ids = torch.cat([prompt[row], torch.where(masked[row], model.config.mask_token_id, answer[row])])
        attention = torch.cat([mask[row], torch.ones(4, dtype=torch.long)])
        logits = model(input_ids=ids[None], attention_mask=attention[None]).logits[0, 3:].float()
        logits[:, model.config.mask_token_id] = -torch.inf
        cross_entropy = -logits.log_softmax(-1)[range(4), answer[row]]
        expected = expected + (cross_entropy * masked[row]).sum() / level[row] / scored[row].sum()
    torch.testing.assert_close(loss, expected / 2, rtol=1e-6, atol=1e-6)


def test_what_is_unscored_is_shown_and_has_no_part_in_the_loss(tmp_path, tokenizer):
    rows = [{"prompt": "1+2", "completion": "1+2=3"}] * 4
    marked = Dataset.from_list([{**row, "unscored": [[2, 3]]} for row in rows])
    other = Dataset.from_list([{**row, "completion": "1+4=3", "unscored": [[2, 3]]} for row in rows])
    seen = {}
    for name, data in {"marked": marked, "other": other, "scored": Dataset.from_list(rows)}.items():
        model = tiny_model(tokenizer)
        trainer = SFTTrainer(model, config(tmp_path, max_steps=1), data, processing_class=tokenizer)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        seen[name] = trainer.compute_loss(trainer.model, inputs).item()
        assert inputs["scored"].all() == (name == "scored")
    # another token there is read by the network, so the loss differs; without the column it is scored, and differs too
    assert len(set(seen.values())) == 3


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
    with pytest.raises(ValueError, match="one assistant message"):
        row = {"prompt": ROWS[0]["prompt"], "completion": [*ROWS[0]["prompt"], *ROWS[0]["completion"]]}
        tokenize_dataset(Dataset.from_list([row]), tokenizer, family, 4)
    parts = [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}]
    with pytest.raises(ValueError, match="content of a message must be a string"):
        tokenize_dataset(Dataset.from_list([{"prompt": parts, "completion": "4"}]), tokenizer, family, 4)


def test_a_prompt_that_begins_the_answer_is_continued(tokenizer):
    begun = [*ROWS[0]["prompt"], {"role": "assistant", "content": "<reasoning>"}]
    rows = Dataset.from_list([{"prompt": begun, "completion": "4"}])
    ids = tokenize_dataset(rows, tokenizer, tiny_model(tokenizer).family, CANVAS)[0]["prompt_ids"]
    assert tokenizer.decode(ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n<reasoning>")


# ---------------------------------------------------------------- what is refused at the start

DATA = Dataset.from_list(ROWS)


def trainer_on(path, tokenizer, data=DATA, model=None, peft_config=None, eval_dataset=None, **settings) -> SFTTrainer:
    model = tiny_model(tokenizer) if model is None else model
    args = config(path, **settings)
    return SFTTrainer(model, args, data, eval_dataset, processing_class=tokenizer, peft_config=peft_config)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (DatasetDict(train=DATA), r"train_dataset has several splits \(train\)"),
        (ROWS, "train_dataset must be a Dataset"),
        (DATA.to_iterable_dataset(), "train_dataset is a stream"),
        (DATA.select([]), "train_dataset has 0 rows"),
        (DATA.remove_columns("completion"), "train_dataset has no column 'completion'"),
        (DATA.add_column("image", [0] * len(DATA)), "column 'image', and images are not supported"),
        (Dataset.from_list([*ROWS, {"prompt": ROWS[0]["prompt"]}]), "1 of 13 rows .* no completion; .* row 12"),
    ],
    ids=["splits", "list", "stream", "no rows", "no column", "images", "no text"],
)
def test_what_is_no_data_set_of_texts_is_refused(data, problem, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_model, "create_model_from_path", None)  # before the model is loaded
    with pytest.raises((ValueError, TypeError), match=problem):
        trainer_on(tmp_path, tokenizer, data, model=EMBEDDED_MODEL)
    if not isinstance(data, DatasetDict):  # several sets are evaluated by name
        with pytest.raises((ValueError, TypeError), match=problem.replace("train_dataset", "eval_dataset")):
            trainer_on(tmp_path, tokenizer, eval_dataset=data)
        with pytest.raises((ValueError, TypeError), match=problem.replace("train_dataset", r"eval_dataset\['b'\]")):
            trainer_on(tmp_path, tokenizer, eval_dataset={"a": DATA, "b": data})


def test_rows_that_make_no_batch_are_refused(tokenizer, tmp_path):
    few = DATA.select(range(3))
    with pytest.raises(ValueError, match=r"has 3 rows, and dataloader_drop_last=True .* fewer than 4"):
        trainer_on(tmp_path, tokenizer, few, per_device_train_batch_size=4, dataloader_drop_last=True)
    trainer = trainer_on(tmp_path, tokenizer, few, per_device_train_batch_size=4, max_steps=1)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()  # without, the last batch is smaller
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_a_prompt_that_leaves_no_room_for_the_canvas_is_refused(tokenizer, tmp_path):
    long = Dataset.from_list([{"prompt": "1" * 48, "completion": "2"}, {"prompt": "1" * 49, "completion": "2"}])
    with pytest.raises(ValueError, match="longest prompt of the data set has 49 tokens, and the model has 64"):
        trainer_on(tmp_path, tokenizer, long)
    with pytest.raises(ValueError, match="has 49 tokens"):
        trainer_on(tmp_path, tokenizer, eval_dataset=long)
    trainer_on(tmp_path, tokenizer, long.select([0]), max_steps=1).train()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"min_noise_level": 0.0}, "min_noise_level must lie in"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"nonfinite_update": "none"}, "nonfinite_update must be one of raise, skip"),
        ({"label_smoothing_factor": 0.1}, "does not support `label_smoothing_factor`"),
        ({"use_liger_kernel": True}, "does not support `use_liger_kernel`"),
        ({"hub_token": "hf_x"}, "does not support `hub_token`: it would be saved in training_args.bin"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        config(tmp_path, **settings)


def test_processes_that_would_each_train_alone_are_refused(tokenizer, tmp_path, monkeypatch):
    args = config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher sets it, and accelerate has not noticed
    with pytest.raises(RuntimeError, match="2 processes were launched, but each believes to be one of 1"):
        SFTTrainer(tiny_model(tokenizer), args, DATA, processing_class=tokenizer)


def test_models_and_adapters_that_cannot_be_trained_are_refused(tokenizer, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(tiny_model(tokenizer), lora).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_model(tokenizer), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer_on(tmp_path, tokenizer, model=frozen)
    model = tiny_model(tokenizer).requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the model can be trained"):
        trainer_on(tmp_path, tokenizer, model=model)
    with pytest.raises(ValueError, match="The model has an adapter already"):
        trainer_on(tmp_path, tokenizer, model=frozen, peft_config=lora)
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING puts virtual tokens"):
        trainer_on(tmp_path, tokenizer, peft_config=prompt_tuning)
    with pytest.raises(ValueError, match="model_init_kwargs would be ignored"):
        trainer_on(tmp_path, tokenizer, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="model_init_kwargs has torch_dtype='bfloat16', now called `dtype`"):
        trainer_on(tmp_path, tokenizer, model=EMBEDDED_MODEL, model_init_kwargs={"torch_dtype": "bfloat16"})
    with pytest.raises(TypeError, match="args must be an SFTConfig, got TrainingArguments"):
        SFTTrainer(tiny_model(tokenizer), TrainingArguments(str(tmp_path), use_cpu=True), DATA)


# ---------------------------------------------------------------- the start


def test_adapters_over_sharded_weights_are_checkpointed_reentrantly(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_model, "_shards_weights", lambda args: True)  # as under ZeRO-3
    adapter = LoraConfig(target_modules="all-linear")
    args = trainer_on(tmp_path, tokenizer, peft_config=adapter, gradient_checkpointing=True).args
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert args.activation_checkpointing_kwargs == {"use_reentrant": True}  # what transformers 5.24 reads


def lora_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("trainer_class", ["sft", "agrpo"])
def test_the_seed_alone_decides_how_an_adapter_starts(trainer_class, tokenizer, tmp_path):
    lora, adapters = LoraConfig(r=4, target_modules=["q_proj"]), []
    for seed, state in ((5, 0), (5, 1), (6, 1)):
        torch.manual_seed(state)  # as other code, or another way of loading, would leave it
        if trainer_class == "sft":
            trainer = trainer_on(tmp_path, tokenizer, peft_config=lora, seed=seed)
        else:
            trainer = method_named("agrpo").make(tmp_path, peft_config=lora, seed=seed)
        adapters.append(lora_weights(trainer))
    first, second, other = adapters
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_a_model_given_by_name_is_loaded_as_trl_does(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path / "bfloat16")
    for arguments, dtype in ((None, torch.float32), ('{"dtype": "bfloat16"}', torch.bfloat16)):
        args = config(tmp_path, max_completion_length=32, model_init_kwargs=arguments)
        trainer = SFTTrainer(str(tmp_path / "bfloat16"), args, DATA)
        assert trainer.model.dtype == dtype and trainer.processing_class.mask_token == "<|mask|>"


@pytest.mark.slow
def test_an_adapter_is_trained_further_by_its_folder(tokenizer, tmp_path):
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    first = trainer_on(tmp_path / "adapter", tokenizer, model=str(tmp_path / "base"), peft_config=lora)
    first.train()
    first.save_model()
    second = trainer_on(tmp_path / "further", tokenizer, model=str(tmp_path / "adapter"))
    before, trained = lora_weights(second), lora_weights(first)
    assert before.keys() == trained.keys() and all(torch.equal(before[name], trained[name]) for name in before)
    second.train()
    assert any(not torch.equal(value, before[name]) for name, value in lora_weights(second).items())


@pytest.mark.parametrize("given", ["config", "model"])
def test_adapters_learn_under_gradient_checkpointing(given, tokenizer, tmp_path):
    lora, model = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tiny_model(tokenizer)
    how = {"model": get_peft_model(model, lora)} if given == "model" else {"model": model, "peft_config": lora}
    trainer = trainer_on(tmp_path, tokenizer, gradient_checkpointing=True, **how)
    before = lora_weights(trainer)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in lora_weights(trainer).items())


@pytest.mark.slow
def test_rows_without_a_prompt_are_trained_on(tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt": "", "completion": "12"}, {"prompt": "", "completion": "3"}])
    trainer = trainer_on(tmp_path, tokenizer, rows, max_steps=30, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


# ---------------------------------------------------------------- guards


def break_loss(monkeypatch, update: int) -> None:
    """Make the loss of an update NaN; one micro-batch an update."""
    whole, calls = sft.masked_loss, []

    def masked_loss(*args):
        calls.append(None)
        return whole(*args) * (float("nan") if len(calls) == update else 1.0)

    monkeypatch.setattr(sft, "masked_loss", masked_loss)


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer, tmp_path, monkeypatch):
    trainer = trainer_on(tmp_path, tokenizer)
    break_loss(monkeypatch, update=3)
    with pytest.raises(FloatingPointError, match="Update 3: not finite: the loss and the gradient norm"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(value.isfinite().all() for value in trainer.model.parameters())


def test_an_update_that_is_not_finite_can_be_skipped(tokenizer, tmp_path, monkeypatch):
    trainer = trainer_on(tmp_path, tokenizer, nonfinite_update="skip")
    break_loss(monkeypatch, update=3)
    seen = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.model.lm_head.weight.detach().clone())

    trainer.add_callback(Record())
    trainer.train()
    first, second, third, fourth = seen
    assert torch.equal(second, third)
    assert not torch.equal(first, second) and not torch.equal(third, fourth) and fourth.isfinite().all()
    skipped = [entry["guards/skipped_updates"] for entry in trainer.state.log_history if "loss" in entry]
    assert skipped == [0.0, 0.0, 1.0, 0.0]


# ---------------------------------------------------------------- the start-up report


def report_of(trainer) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(sft_report(trainer.as_run()))
    return console.export_text()


def test_the_report_says_what_will_be_done(tokenizer, tmp_path, capsys):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    settings = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 5, "disable_tqdm": False}
    trainer = trainer_on(tmp_path, tokenizer, peft_config=lora, gradient_accumulation_steps=2, **settings)
    text = report_of(trainer)
    for fact in (
        "masked SFT, arXiv 2504.12216",
        "16 positions, each masked with probability t ~ U(0.001, 1)",
        "12 rows; prompts of",
        "5 per device × 2 micro-batches × 1 process = 10 rows",
        "6 updates = 3 epochs",
        "nonfinite_update=raise",
        "LoRA, rank 4",
        "2 of 2",  # coverage
    ):
        assert fact in text, fact
    trainer.train()
    assert "masked SFT" in capsys.readouterr().out and trainer.state.global_step == 6


@pytest.mark.slow
@pytest.mark.parametrize("network", [EMBEDDED_MODEL, EMBEDDED_SDAR_MODEL], ids=["full attention", "block-causal"])
def test_the_report_costs_an_update_as_it_is_counted(network, tmp_path, monkeypatch):
    # the counter knows matrix products, not the CPU's fused attention
    model = AutoModelForCausalLM.from_pretrained(network, attn_implementation="eager")
    data = load_word_problems("train", 4, 0)
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = SFTTrainer(model, config(tmp_path, max_completion_length=32, **settings), data)

    def half_of_the_canvas(*key, rows, length, min_noise_level):
        return torch.arange(length).remainder(2).bool().expand(len(rows), -1), torch.full((len(rows),), 0.5)

    monkeypatch.setattr(sft, "draw_noise", half_of_the_canvas)  # as it is on average, with one row a micro-batch
    forward_units, flop = update_cost(trainer.as_run())
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    assert counter.get_total_flops() == pytest.approx(flop, rel=2e-3)
    prompt = sum(map(len, trainer.train_dataset["prompt_ids"])) / 4
    assert forward_units == pytest.approx(12 if network == EMBEDDED_MODEL else 12 * (1 + 32 / (32 + prompt)))


def test_the_report_costs_the_masks_of_a_batch_as_they_are_drawn(tmp_path):
    masked, _ = draw_noise(0, rows=range(6000), length=32, min_noise_level=0.25)
    for rows in (1, 3):
        fullest = masked.sum(1).view(-1, rows).max(1).values.float().mean().item()
        args = config(tmp_path, per_device_train_batch_size=rows, max_completion_length=32, min_noise_level=0.25)
        assert scored_positions(args) == pytest.approx(fullest, rel=0.02)


# ---------------------------------------------------------------- training


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_skipped_updates_are_remembered_in_a_checkpoint(tokenizer, tmp_path, monkeypatch):
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 4, "nonfinite_update": "skip"}

    def logged(path, checkpoint=None) -> dict[str, float]:
        trainer = trainer_on(path, tokenizer, save_strategy="steps", **settings)
        trainer.train(checkpoint)
        return next(entry for entry in trainer.state.log_history if "loss" in entry)

    with monkeypatch.context() as patch:
        break_loss(patch, update=1)
        whole = logged(tmp_path)
    assert whole["guards/skipped_updates"] == 1 / 4
    assert logged(tmp_path, str(tmp_path / "checkpoint-2"))["guards/skipped_updates"] == 1 / 4
