"""What a user of TRL expects of a GRPO trainer, and what is refused before any rollout."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from methods import PROMPTS, method_named, text_reward
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import END, MASK, A, B, tiny_model, tiny_tokenizer
from trainer_helpers import parameters_of, score, view_of
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.evaluation import AccuracyCallback, Estimate
from trl_diffusion.likelihood import score_views
from trl_diffusion.models import family_of
from trl_diffusion.tokenization import encode_prompt
from trl_diffusion.trainers import AGRPOConfig, AGRPOTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_diffusion.trainers.sft import tokenize_dataset

BASE, AGRPO, DIFFU = (method_named(name) for name in ("trajectory_grpo", "agrpo", "diffu_grpo"))


def batch(size: int = 4) -> list[dict]:
    return [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(size)]


# ---------------------------------------------------------------- TRL's options keep working


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_every_loss_type_trains(loss_type, tmp_path):
    # a mean over the tokens of a view cannot be added up over steps, and `vespo` needs the ratio of whole sequences
    method, reduction = (DIFFU, {}) if loss_type == "vespo" else (BASE, {"step_reduction": "mean"})
    if loss_type in ("dr_grpo", "dapo", "luspo", "cispo"):
        reduction = {"step_reduction": "sum"}
    settings = dict(learning_rate=0.1, max_steps=2, num_iterations=2, logging_steps=1)
    trainer = method.make(tmp_path, loss_type=loss_type, **reduction | settings)
    before = parameters_of(trainer).clone()
    trainer.train()
    change = (parameters_of(trainer) - before).norm()
    assert torch.isfinite(change) and change > 1e-4
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    "settings",
    [
        {"delta": 1.5, "epsilon_high": 0.3},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.1},
        {"use_adaptive_entropy": True},
        {"off_policy_mask_threshold": 0.1},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"scale_rewards": "batch"},
        {"steps_per_generation": 4},
        {"generation_batch_size": 32},
        {"cast_lm_head_to_fp32": True},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_trl_settings_keep_working(settings, tmp_path):
    trains(BASE, tmp_path, **settings)


def test_sequence_level_ratios_where_a_view_scores_the_whole_text(tmp_path):
    trains(DIFFU, tmp_path, importance_sampling_level="sequence", loss_type="grpo")


def trains(method, tmp_path, **settings) -> None:
    trainer = method.make(tmp_path, learning_rate=0.1, max_steps=2, **settings)
    before = parameters_of(trainer).clone()
    trainer.train()
    assert trainer.state.global_step == 2
    assert torch.isfinite(parameters_of(trainer)).all() and not torch.equal(parameters_of(trainer), before)


def test_an_entropy_bonus_raises_entropy(tmp_path):
    trainer = BASE.make(
        tmp_path,
        entropy_coef=1.0,
        learning_rate=0.003,
        max_steps=6,
        reward=lambda completions, **_: [0.0] * len(completions),
    )
    ids = torch.tensor([[A, B, *[MASK] * 8]])
    positions = torch.arange(2, 10).unsqueeze(0)

    def entropy() -> float:
        with torch.no_grad():
            probabilities = trainer.model(input_ids=ids, positions=positions).logits.softmax(-1)
        return float(torch.special.entr(probabilities).sum(-1).mean())

    before = entropy()
    trainer.train()
    assert entropy() > before + 0.3


def test_metrics(tmp_path):
    trainer = AGRPO.make(tmp_path, max_steps=1, logging_steps=1)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "reward" in entry)
    for name in (
        "rewards/text_reward/mean",
        "completions/mean_length",
        "clip_ratio/region_mean",
        "entropy",
        "step_time",
    ):
        assert math.isfinite(entry[name])
    # canvas 8 in 4 steps: every step commits two tokens
    assert entry["rollout/tokens_per_forward"] == 2.0
    assert 2 <= entry["rollout/denoising_steps"] <= 4
    assert 0 < entry["rollout/eos_share"] < 1
    assert entry["rollout/seconds"] > 0


def test_step_time_is_logged_once_per_update(tmp_path, monkeypatch):
    trainer = AGRPO.make(tmp_path, max_steps=3, num_mc_samples=5, logging_steps=100)
    counts, log = [], trainer.log

    def spy(logs, start_time=None):
        counts.append(len(trainer._metrics["train"]["step_time"]))
        log(logs, start_time)

    monkeypatch.setattr(trainer, "log", spy)
    trainer.train()
    assert counts == [3]  # the one log at the end


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agrpo", "atpo", "diffu_grpo", "sapo"])
def test_forward_units_count_the_rows_of_every_forward(name, tmp_path):
    """A row costs 1, with gradient 3, on a shorter canvas in proportion; prompts of two words and canvases of 8."""
    trainer = method_named(name).make(tmp_path, num_iterations=2, max_steps=4, learning_rate=0.1, logging_steps=1)
    trainer.train_dataset = Dataset.from_dict({"prompt": ["a b", "b a", "a a", "b b"]})
    counted = Counter()

    def count(module, args, kwargs):
        kind = "learned" if torch.is_grad_enabled() else "scored" if kwargs.get("targets") is not None else "sampled"
        mask = kwargs["attention_mask"]  # None where nothing is hidden
        counted[kind] += (kwargs["input_ids"].numel() if mask is None else mask.sum().item()) / (2 + 8)

    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    views, rollouts = trainer.args.num_mc_samples, 2
    assert counted["learned"] == 4 * 16 * views  # updates × rows × views
    scored = {"agrpo": 0, "atpo": 0, "diffu_grpo": 2, "sapo": 2}[name]  # old and reference
    assert counted["scored"] == scored * 4 * 16 * views
    assert rollouts * 16 * 2 <= counted["sampled"]  # two to four steps per completion, and continuations
    expected = 3 * counted["learned"] + counted["scored"] + counted["sampled"]
    assert trainer.forward_units == pytest.approx(expected, rel=1e-6)
    logged = [entry["forward_units"] for entry in trainer.state.log_history if "forward_units" in entry]
    assert logged[-1] == trainer.forward_units and logged == sorted(set(logged)) and len(logged) == 4
    continued = [x["step_aware/forward_units"] for x in trainer.state.log_history if "step_aware/forward_units" in x]
    assert bool(continued) == (name == "sapo") and sum(continued) >= (name == "sapo")


def test_evaluation_draws_with_the_same_noise_and_leaves_training_alone(tmp_path):
    trainer = AGRPO.make(tmp_path, per_device_eval_batch_size=8)
    trainer.eval_dataset = Dataset.from_dict({"prompt": PROMPTS[:4]})
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"]
    assert first["eval_rollout/denoising_steps"] == second["eval_rollout/denoising_steps"]
    assert trainer._rollouts["train"] == 0 and math.isfinite(first["eval_loss"])


def test_reward_models(tmp_path):
    torch.manual_seed(0)
    judge = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=5,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_labels=1,
            pad_token_id=0,
        )
    )
    judge.config._name_or_path = "judge"
    trainer = AGRPOTrainer(
        tiny_model(seed=3),
        [judge, text_reward],
        BASE_ARGS(tmp_path, logging_steps=1),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
        reward_processing_classes=[tiny_tokenizer(), None],
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert math.isfinite(entry["rewards/judge/mean"]) and entry["rewards/judge/std"] > 0


def BASE_ARGS(output_dir, **settings) -> AGRPOConfig:
    return copy.copy(AGRPO.make(output_dir, **settings).args)


def test_iterable_datasets(tmp_path):
    def rows():
        for prompt in PROMPTS * 4:
            yield {"prompt": prompt}

    trainer = AGRPOTrainer(
        tiny_model(seed=3),
        text_reward,
        BASE_ARGS(tmp_path, max_steps=2),
        IterableDataset.from_generator(rows),
        processing_class=tiny_tokenizer(),
    )
    before = parameters_of(trainer).clone()
    trainer.train()
    assert trainer.state.global_step == 2 and not torch.equal(parameters_of(trainer), before)


def test_completions_are_logged(tmp_path):
    trainer = AGRPO.make(tmp_path, log_completions=True, num_completions_to_print=1, logging_steps=1)
    trainer.train()
    table = pd.read_parquet(next(Path(tmp_path, "completions").glob("*.parquet")))
    assert len(table) == 16 and {"prompt", "completion", "text_reward", "advantage"} <= set(table.columns)


def test_completions_are_shown_once(tmp_path, monkeypatch):
    """TRL prints them with every log: an empty table before the first rollout, the last one again at the end."""
    shown = []
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.print_prompt_completions_sample",
        lambda prompts, completions, *_, **__: shown.append(list(completions)),
    )
    trainer = AGRPO.make(tmp_path, log_completions=True, logging_steps=1, max_steps=2)
    held_out = Dataset.from_dict({"prompt": PROMPTS[:2]})
    accuracy = AccuracyCallback(trainer, held_out, lambda model, dataset: Estimate.of(1, 2), every=1)
    trainer.add_callback(accuracy)
    trainer.train()
    assert [len(completions) for completions in shown] == [16, 16] and shown[0] != shown[1]
    assert len(accuracy.history) == 3


def test_truncated_completions_can_be_left_out(tmp_path):
    trainer = AGRPO.make(tmp_path, mask_truncated_completions=True, max_completion_length=4, block_length=2)
    trainer.model.train()
    rows = trainer._generate_and_score_completions(batch(8))
    truncated = ~trainer.family.is_end(rows["completion_ids"]).any(1)
    assert truncated.any() and not truncated.all()
    assert (rows["completion_mask"].any(1) == ~truncated).all()
    targets = torch.stack([view_of(trainer, rows, 0, view).targets for view in range(3)], 1)
    assert not targets[truncated].any() and targets[~truncated].any()


def test_conversational_prompts_and_default_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = AGRPO.make(tmp_path)
    trainer.train_dataset = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]}
    )
    seen = []
    trainer.reward_funcs = [lambda completions, **_: seen.extend(completions) or [float(len(c)) for c in completions]]
    trainer.train()
    assert seen and all(completion[0]["role"] == "assistant" for completion in seen)


CLOSING = (
    "{% for message in messages %}{{ message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ header or 'b' }} {% endif %}"
)


def test_a_last_assistant_message_is_continued_in_rollouts_sft_and_evaluation_alike(tmp_path):
    trainer = AGRPO.make(tmp_path, chat_template_kwargs={"header": "b b"})
    tokenizer = trainer._tokenizer
    tokenizer.chat_template = CLOSING
    question = {"role": "user", "content": "a b"}
    begun, asked = [question, {"role": "assistant", "content": "a a"}], [question]
    trainer.model.train()
    rows = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in (begun, asked) for _ in range(4)])
    ids = [row[mask.bool()].tolist() for row, mask in zip(rows["prompt_ids"], rows["prompt_mask"], strict=True)]
    assert ids[0] == [A, B, END, B, B, A, A] and ids[4] == [A, B, END, B, B]
    data = Dataset.from_list([{"prompt": prompt, "completion": "b"} for prompt in (begun, asked)])
    tokenized = tokenize_dataset(data, tokenizer, trainer.family, 8)
    assert tokenized["prompt_ids"][:] == [[A, B, END, B, A, A], [A, B, END, B]]
    assert [encode_prompt(prompt, tokenizer) for prompt in (begun, asked)] == tokenized["prompt_ids"][:]


def test_a_beginning_that_is_no_text_is_refused(tmp_path):
    trainer = AGRPO.make(tmp_path)
    parts = [{"type": "text", "text": "a"}]
    with pytest.raises(ValueError, match="last message of a prompt is of the assistant, and its content is"):
        trainer._tokenize_prompts([[{"role": "user", "content": "a"}, {"role": "assistant", "content": parts}]])
    with pytest.raises(ValueError, match="has a part of type 'image'; only text is supported"):
        trainer._tokenize_prompts([[{"role": "user", "content": [*parts, {"type": "image"}]}]])


# ---------------------------------------------------------------- reference model and LoRA


def test_reference_of_an_unsaved_model_is_a_copy_of_it(tmp_path):
    model = tiny_model(seed=3)
    trainer = AGRPO.make(tmp_path, model=model, beta=0.1, loss_type="dr_grpo", learning_rate=0.3, max_steps=2)
    original = parameters_of(trainer).clone()
    trainer.train()
    reference = torch.cat([parameter.flatten() for parameter in trainer.ref_model.parameters()])
    torch.testing.assert_close(reference, original)
    assert not torch.equal(parameters_of(trainer), original)
    assert trainer.args.beta == trainer.beta == 0.1


def test_reference_logps_are_those_of_the_views(tmp_path):
    trainer = AGRPO.make(tmp_path, beta=0.1, loss_type="dr_grpo", num_mc_samples=16, num_iterations=2)
    trainer.model.train()
    rows = trainer._generate_and_score_completions(batch())
    assert rows["ref_per_token_logps"].shape == (8, 2, 16, 8)
    covered = torch.zeros_like(rows["completion_mask"], dtype=torch.bool)
    for update, view in product(range(2), range(16)):
        targets = view_of(trainer, rows, update, view).targets
        reference = rows["ref_per_token_logps"][:, update, view]
        # the reference is the policy
        torch.testing.assert_close(reference[targets], rows["old_per_token_logps"][targets], atol=1e-5, rtol=0)
        assert not reference[~targets].any()
        covered |= targets
    assert torch.equal(covered, rows["completion_mask"].bool())


@pytest.mark.slow
def test_lora_trains_the_adapter_and_takes_the_base_as_reference(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = AGRPO.make(
        tmp_path, peft_config=lora, beta=0.1, loss_type="dr_grpo", learning_rate=0.5, max_steps=3, logging_steps=1
    )
    base = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" not in name}
    trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in after.items())
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-6
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = PeftModel.from_pretrained(tiny_model(seed=3), tmp_path / "adapter").eval()
    ids = torch.tensor([[2, 3, 4, 4]])
    trainer.model.eval()
    torch.testing.assert_close(fresh(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["object", "path"])
def test_synchronised_reference(given, tmp_path):
    model = tiny_model(seed=3)
    model.save_pretrained(tmp_path / "model")
    trainer = AGRPO.make(
        tmp_path,
        model=model if given == "object" else str(tmp_path / "model"),
        beta=0.1,
        loss_type="dr_grpo",
        learning_rate=0.3,
        max_steps=2,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
    )
    trainer.train()
    reference = torch.cat([parameter.flatten() for parameter in trainer.ref_model.parameters()])
    torch.testing.assert_close(reference, parameters_of(trainer))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_ends_in_the_same_weights(stop, tmp_path):
    """8 prompts, 4 per rollout, μ = 2: 5 updates into 8 is the second epoch, in the middle of a buffer."""
    settings = dict(max_steps=8, num_iterations=2, learning_rate=0.2, optim="adamw_torch", lr_scheduler_type="cosine")
    whole = AGRPO.make(tmp_path / "whole", **settings)
    whole.train()
    first = AGRPO.make(tmp_path / "cut", save_strategy="steps", save_steps=stop, **settings)
    first.train()
    again = AGRPO.make(tmp_path / "again", **settings, model=tiny_model(seed=9))
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert again.state.global_step == 8
    assert torch.equal(parameters_of(again), parameters_of(whole))
    assert again.forward_units == whole.forward_units


def test_a_checkpoint_without_the_rollout_state_is_refused(tmp_path):
    trainer = AGRPO.make(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    os.remove(tmp_path / "checkpoint-1" / "rollout_state_0.pt")
    with pytest.raises(ValueError, match="has no rollout_state_0"):
        AGRPO.make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_model_card_cites_the_paper(tmp_path):
    trainer = AGRPO.make(tmp_path)
    trainer.create_model_card(dataset_name="words")
    card = Path(tmp_path, "README.md").read_text()
    assert "2510.04019" in card and "AGRPO" in card


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_vllm": True}, "use_vllm"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"temperature": 0.0}, "greedy completions"),
        ({"num_generations": 3}, r"num_generations \(3\) must divide the rollout batch of 16"),
        ({"block_length": 3}, "must divide the canvas"),
        ({"denoising_steps": 5}, "multiple of the number of blocks"),
        ({"top_p": 0.9}, "needs top_k"),
        ({"unmasking": "left_to_right"}, "unmasking must be one of"),
        ({"step_draws": "every"}, "step_draws must be one of"),
        ({"num_mc_samples": 0}, "num_mc_samples"),
        ({"step_draws": "entropy", "step_reduction": "mean", "loss_type": "bnpo"}, "step_draws='uniform'"),
        ({"step_draws": "entropy", "entropy_coef": 0.1}, "step_draws='uniform'"),
        ({"step_draws": "entropy", "top_entropy_quantile": 0.2}, "step_draws='uniform'"),
        ({"beta": 0.1, "top_entropy_quantile": 0.5}, "KL term must carry the weights"),
        (
            {"loss_type": "grpo"},
            "loss_type='grpo' divides each view .* Set step_reduction='mean', or a loss_type among",
        ),
        ({"loss_type": "bnpo"}, "loss_type='bnpo' divides each view by its own number of tokens"),
        ({"loss_type": "sapo"}, "loss_type='sapo' divides each view by its own number of tokens"),
        (
            {"loss_type": "vespo"},
            "TrajectoryGRPOConfig scores a part of the tokens per view, .* got loss_type='vespo'",
        ),
        (
            {"importance_sampling_level": "sequence"},
            "no sequence-level ratio; got importance_sampling_level='sequence'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        BASE.make(tmp_path, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tools", "environment_factory", "rollout_func"])
def test_several_turns_are_refused(name, tmp_path):
    args = BASE_ARGS(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        AGRPOTrainer(
            tiny_model(),
            text_reward,
            args,
            Dataset.from_dict({"prompt": PROMPTS}),
            None,
            tiny_tokenizer(),
            **{name: [print]},
        )


def make(tmp_path, model=None, reward=text_reward, data=None, args=None):
    data = {"prompt": PROMPTS} if data is None else data
    data = Dataset.from_dict(data) if isinstance(data, dict) else data
    return AGRPOTrainer(model or tiny_model(), reward, args or BASE_ARGS(tmp_path), data, None, tiny_tokenizer())


def test_a_model_that_is_no_diffusion_model_is_refused(tmp_path):
    stock = LlamaForCausalLM(
        LlamaConfig(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(TypeError, match="LlamaForCausalLM is not a diffusion language model"):
        make(tmp_path, model=stock)
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(TypeError, match="model_type 'llama', which is not a diffusion language model"):
        make(tmp_path, model=str(tmp_path / "stock"))


def test_a_checkpoint_that_names_a_stock_class_is_refused_before_it_is_built(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TypeError, match="names the stock class LlamaForCausalLM"):
        make(tmp_path, model=str(tmp_path))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear")])
def test_a_model_on_several_devices_is_refused(peft_config, tmp_path):
    model = tiny_model()
    model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "disk", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"layers lie on several devices \(cpu, disk\).*one process per GPU"):
        method_named("agrpo").make(tmp_path, model=model, peft_config=peft_config)
    model.hf_device_map = {"": "cpu"}
    method_named("agrpo").make(tmp_path, model=model, peft_config=peft_config)


def test_a_missing_mask_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no `mask_token_id`"):
        make(tmp_path, model=tiny_model(mask_token_id=None))


def test_missing_columns_are_refused(tmp_path):
    def correctness(completions, answer, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="no column 'prompt', which the trainer needs; its columns are question"):
        make(tmp_path, data={"question": PROMPTS})
    for reward in (correctness, functools.partial(correctness), StepAwareReward(correctness, success_threshold=1.0)):
        with pytest.raises(ValueError, match="no column 'answer', which the reward function correctness needs"):
            make(tmp_path, reward=reward)


def rows(count: int = len(PROMPTS), **columns) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS[:count], **{name: values[:count] for name, values in columns.items()}})


def stream(data: Dataset) -> IterableDataset:
    """A stream that does not know its columns."""
    return IterableDataset.from_generator(lambda: iter(data))


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_rows_than_a_rollout_batch_are_refused(count, streamed, tmp_path):
    """TRL's sampler drops what does not fill a batch: no update, and exit status 0. Four prompts fill one here."""
    data = stream(rows(count)) if streamed else rows(count)
    message = (
        rf"train_dataset has {count} rows?, and a rollout batch needs 4 prompts: generation_batch_size 16 \(.*÷.* 4"
    )
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data=data)
    enough = rows(4)
    trainer = make(tmp_path, data=stream(enough) if streamed else enough)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (DatasetDict(train=rows(), test=rows()), ValueError, r"several splits \(train, test\).*dataset\['train'\]"),
        ([{"prompt": "a b"}], TypeError, "must be a Dataset or an IterableDataset.*got list"),
        (None, TypeError, "got NoneType"),
        (rows(image=PROMPTS), ValueError, "has a column 'image', and images are not supported"),
        (stream(rows(images=PROMPTS)), ValueError, "has a column 'images', and images are not supported"),
        (
            stream(rows().rename_column("prompt", "question")),
            ValueError,
            "no column 'prompt', which the trainer needs",
        ),
        (rows(completions=PROMPTS), ValueError, "column 'completions', but TRL calls reward functions with"),
    ],
    ids=["splits", "list", "none", "image", "images in a stream", "no prompt in a stream", "TRL's own argument"],
)
def test_data_that_cannot_be_trained_on_is_refused(data, error, message, tmp_path):
    args = BASE_ARGS(tmp_path)
    with pytest.raises(error, match=f"^(train_dataset|The data set).*{message}"):
        AGRPOTrainer(tiny_model(), text_reward, args, data, None, tiny_tokenizer())


def needs_answer(completions, answer, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (rows(), {}, "eval_dataset has no column 'answer', which the reward function needs_answer needs"),
        ({"easy": rows(answer=PROMPTS), "hard": rows()}, {}, r"eval_dataset\['hard'\] has no column 'answer'"),
        (rows(0, answer=[]), {}, "eval_dataset has 0 rows"),
        (rows(answer=PROMPTS), {"per_device_eval_batch_size": 6}, r"per_device_eval_batch_size \(6\).*the 4 comp"),
        (
            rows(answer=PROMPTS),
            {"num_generations_eval": 3, "per_device_eval_batch_size": 8},
            r"per_device_eval_batch_size \(8\).*the 3 comp",
        ),
    ],
    ids=["column", "column of one of several", "rows", "batch size", "group size"],
)
def test_evaluations_that_cannot_work_are_refused(data, settings, message, tmp_path):
    args = BASE_ARGS(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        AGRPOTrainer(tiny_model(), needs_answer, args, rows(answer=PROMPTS), data, tiny_tokenizer())


def test_an_evaluation_of_cut_groups_is_refused_when_it_is_asked_for(tmp_path):
    trainer = AGRPO.make(tmp_path, per_device_eval_batch_size=6)
    with pytest.raises(ValueError, match=r"per_device_eval_batch_size \(6\)"):
        trainer.evaluate(rows())


class Judge:
    def __call__(self, completions):
        return [0.0] * len(completions)


def takes_no_columns(prompts, completions, completion_ids, trainer_state=None, log_extra=None, log_metric=None):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions: [0.0], "does not take answer, completion_ids, log_extra, log_metric, prompts, trainer"),
        (lambda: [0.0], "does not take answer, completion_ids, completions"),
        (takes_no_columns, "The reward function takes_no_columns does not take answer. TRL calls"),
        (functools.partial(takes_no_columns, log_metric=None), "takes_no_columns does not take answer. TRL calls"),
        (Judge(), "The reward function Judge does not take answer"),
        (StepAwareReward(takes_no_columns, success_threshold=1.0), "takes_no_columns does not take answer. TRL"),
        (lambda prompt, **_: [0.0], "is called 'prompt', and TRL calls it with `prompts`"),
    ],
    ids=["completions", "nothing", "no columns", "partial", "object", "step-aware", "prompt"],
)
def test_rewards_that_cannot_take_what_they_are_called_with_are_refused(reward, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, reward=reward, data=rows(answer=PROMPTS))


def test_rewards_that_take_all_by_name_and_decorated_ones_are_called(tmp_path):
    @functools.wraps(needs_answer)
    def filtered(completions, **kwargs):  # takes more than the function that it stands for
        return [float(len(text)) for text in completions]

    def named(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
        return [float(len(text)) for text in completions]

    make(tmp_path, reward=[filtered, named], data=rows(answer=PROMPTS)).train()


VIRTUAL = {
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 2,
    "num_attention_heads": 2,
    "token_dim": 16,
    "num_layers": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(**VIRTUAL),
        PromptEncoderConfig(encoder_hidden_size=8, **VIRTUAL),
        PrefixTuningConfig(**VIRTUAL),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_virtual_tokens_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match=f"type {config.peft_type.value} puts virtual tokens before the prompt"):
        AGRPO.make(tmp_path, peft_config=config)
    with pytest.raises(ValueError, match="puts virtual tokens before the prompt"):
        AGRPO.make(tmp_path, model=get_peft_model(tiny_model(), config))


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_loaded_for_inference_is_refused(beta, tmp_path):
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    settings = {"beta": beta, "loss_type": "dr_grpo"}
    with pytest.raises(ValueError, match=r"No parameter of the adapter can be trained.*is_trainable=True"):
        AGRPO.make(tmp_path, model=PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"), **settings)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)
    trainer = AGRPO.make(tmp_path, model=model, max_steps=2, learning_rate=0.5, **settings)
    before = {name: value.clone() for name, value in model.named_parameters() if ".default." in name}
    trainer.train()
    assert before and all(not torch.equal(value, model.get_parameter(name)) for name, value in before.items())


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No parameter of the model can be trained"):
        AGRPO.make(tmp_path, model=tiny_model().requires_grad_(False))
    with pytest.raises(ValueError, match="inference_mode=False"):
        AGRPO.make(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"], inference_mode=True))


def test_other_configs_are_refused(tmp_path):
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="args must be a AGRPOConfig, got GRPOConfig"):
        make(tmp_path, args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


class _Checkpointing(TrainerCallback):
    """Remembers how the first layer is checkpointed when training starts, before any rollout."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layer = next(module for module in model.modules() if isinstance(module, LlamaDecoderLayer))
        self.reentrant = layer._gradient_checkpointing_func.keywords["use_reentrant"]


@pytest.mark.slow
def test_checkpointing_that_trl_sets_after_the_config_was_made(tmp_path):
    """TRL 1.16 sets `use_reentrant` so for adapters under ZeRO-3; transformers 5.24 reads it under another name."""
    seen = _Checkpointing()

    def reentrant(config) -> bool:
        trainer = replace(AGRPO, config=config).make(tmp_path, gradient_checkpointing=True)
        trainer.add_callback(seen)
        trainer.train()
        return seen.reentrant

    def changed(**settings) -> AGRPOConfig:
        args = AGRPO.config(**settings)
        args.gradient_checkpointing_kwargs = {"use_reentrant": True}
        return args

    assert not reentrant(AGRPO.config) and reentrant(changed)


def test_lora_with_a_synchronised_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model"):
        AGRPO.make(tmp_path, peft_config=LoraConfig(), beta=0.1, loss_type="dr_grpo", sync_ref_model=True)


def test_paper_defaults():
    config = AGRPOConfig("unused", use_cpu=True, bf16=False)
    assert (config.max_completion_length, config.block_length, config.denoising_steps) == (384, 12, 128)
    assert (config.temperature, config.top_k, config.top_p, config.unmasking) == (0.6, 150, 0.99, "random")
    assert (config.num_generations, config.num_mc_samples, config.step_draws) == (8, 24, "entropy")
    assert (config.learning_rate, config.adam_beta2, config.weight_decay, config.max_grad_norm) == (
        5e-6,
        0.99,
        0.01,
        1.0,
    )
    assert (config.epsilon, config.beta, config.scale_rewards, config.num_iterations) == (0.2, 0.0, "none", 1)
    assert (config.step_scope, config.step_reduction, config.loss_type) == ("paper", "mean", "luspo")


def test_scoring_goes_through_the_wrapped_model(tmp_path):
    """The same numbers as the bare model's, with TRL's patches and PEFT around it."""
    trainer = AGRPO.make(tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    trainer.model.train()
    rows = trainer._generate_and_score_completions(batch())
    views = view_of(trainer, rows, 0, 0)
    bare = tiny_model(seed=3).eval()
    expected = score_views(
        bare, rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], views, trainer.temperature
    )
    torch.testing.assert_close(score(trainer, trainer.model, rows, views).logps, expected.logps, atol=1e-5, rtol=0)
    assert family_of(trainer.model) == family_of(bare)
    assert issubclass(AGRPOTrainer, DiffusionGRPOTrainer) and issubclass(AGRPOConfig, DiffusionGRPOConfig)
