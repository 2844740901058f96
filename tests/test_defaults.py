"""Every method starts with its own defaults: a model, a reward and a data set are enough."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset
from methods import METHODS, PROMPTS, block_causal, full_attention, text_reward
from tiny import tiny_tokenizer

from trl_diffusion.trainers import DiPOTrainer

TRAINERS = list({method.trainer: method for method in METHODS})
DATA = Dataset.from_dict({"prompt": PROMPTS * 2})  # 16 prompts


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """TRL's default precision; transformers refuses it on a CPU unless `use_cpu` says that this is meant."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


def started(trainer_class, args, **kwargs):
    network = block_causal if trainer_class is DiPOTrainer else full_attention
    model = network(max_position_embeddings=512)  # canvases of 256 and more
    return trainer_class(model, text_reward, args, DATA, processing_class=tiny_tokenizer(), **kwargs)


def pretend_processes(monkeypatch, count: int) -> None:
    """The environment of one of several processes with a GPU each; on a CPU accelerate would wait for the others."""
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)


@pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda trainer: trainer._name)
def test_a_trainer_starts_without_a_config(trainer_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = started(trainer_class, None, eval_dataset=DATA).args
    assert args.per_device_train_batch_size % args.num_generations == 0
    assert args.generation_batch_size == args.per_device_train_batch_size


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda trainer: trainer._name)
def test_the_defaults_make_an_update(trainer_class, tmp_path):
    args = trainer_class.config_class(str(tmp_path))
    assert args.generation_batch_size % args.num_generations == 0
    args.max_steps, args.logging_steps, args.report_to, args.save_strategy, args.disable_tqdm = 1, 1, [], "no", True
    trainer = started(trainer_class, args)
    trainer.train()
    (norm,) = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert trainer.state.global_step == 1 and math.isfinite(norm) and norm > 0


@pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda trainer: trainer._name)
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_default_batches_have_whole_groups_on_several_processes(trainer_class, processes, tmp_path, monkeypatch):
    pretend_processes(monkeypatch, processes)
    args = trainer_class.config_class(str(tmp_path), eval_strategy="steps")
    for size in (args.per_device_train_batch_size, args.per_device_eval_batch_size):
        assert size % args.num_generations == 0


@pytest.mark.parametrize(("group", "batch"), [(2, 8), (3, 6), (4, 8), (6, 6), (8, 8), (10, 10), (16, 16)])
def test_the_default_batch_is_whole_groups_of_about_eight_completions(group, batch, tmp_path):
    config = TRAINERS[0].config_class
    args = config(str(tmp_path), num_generations=group)
    assert args.per_device_train_batch_size == args.per_device_eval_batch_size == batch
    assert config(str(tmp_path), num_generations=group, num_generations_eval=1).per_device_eval_batch_size == 8
    given = config(str(tmp_path), num_generations=group, per_device_train_batch_size=3 * group)
    assert given.per_device_train_batch_size == 3 * group


def test_a_given_batch_that_groups_do_not_fit_is_refused_on_several_processes(tmp_path, monkeypatch):
    pretend_processes(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"num_generations \(8\) must divide the rollout batch of 6 .*3 × 1 .* × 2"):
        TRAINERS[0].config_class(str(tmp_path), per_device_train_batch_size=3)
