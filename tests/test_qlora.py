"""QLoRA on the CPU: 4-bit layers that compute exactly, adapters that small steps move, and what the reference is."""

from __future__ import annotations

import copy
import io
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from methods import PROMPTS, method_named, text_reward
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from trainer_helpers import logps_of, rollout_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_diffusion.adapters.coverage import LoraCoverage, coverage_table, lora_coverage
from trl_diffusion.cli.train import TrainArguments
from trl_diffusion.evaluation import evaluate_accuracy
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.models.quantised_linear import ExactLinear4bit
from trl_diffusion.models.scoring_head import ScoringHead
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks.gsm8k import correctness_reward, format_reward
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import AGRPOConfig, AGRPOTrainer

pytestmark = pytest.mark.slow

bnb = pytest.importorskip("bitsandbytes")

AGRPO = method_named("agrpo")
CONFIGS = Path(__file__).parent.parent / "trl_diffusion" / "configs"
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The four-word model in a folder: its layers have 16 and 24 inputs, no multiples of bitsandbytes' block of 64."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def quantised(base) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=copy.deepcopy(NF4), dtype="float32")


def logits_of(model, mode: str = "eval") -> torch.Tensor:
    with torch.no_grad():
        return model.train(mode == "train")(input_ids=torch.tensor([[2, 3, 4, 4], [3, 3, 2, 4]])).logits


def frozen(model) -> dict[str, torch.Tensor]:
    """Everything that the base holds, scales of the 4-bit codes included."""
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}


def make(folder, model, **settings):
    """An AGRPO trainer whose base is quantised."""
    args = AGRPO.make(folder, **{"loss_type": "dr_grpo"} | settings).args
    lora = LoraConfig(r=4, target_modules="all-linear") if isinstance(model, str) else None
    return AGRPOTrainer(
        model,
        text_reward,
        args,
        Dataset.from_dict({"prompt": PROMPTS}),
        None,
        tiny_tokenizer(),
        peft_config=lora,
        quantization_config=copy.deepcopy(NF4) if isinstance(model, str) else None,
    )


# ---------------------------------------------------------------- 4-bit layers


def weight_by_hand(layer) -> torch.Tensor:
    """Code by code: 4-bit codes in blocks of 64 over all rows, scales in 8 bits around their mean."""
    state = layer.weight.quant_state
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    bytes_ = layer.weight.data.flatten()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).flatten().long()
    values = state.code[codes] * (scales + state.offset).repeat_interleave(64)[: len(codes)]
    return values.view(layer.out_features, layer.in_features)


def test_four_bit_layers_compute_with_the_weights_they_hold(base):
    plain = dict(AutoModelForCausalLM.from_pretrained(base).named_modules())
    layers = {n: m for n, m in quantised(base).named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert type(layer) is ExactLinear4bit
        weight = layer.dequantised()
        torch.testing.assert_close(weight, weight_by_hand(layer), atol=1e-6, rtol=1e-5)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-6, rtol=1e-5)
        # NF4 costs about a tenth of the weights' size
        assert (weight - plain[name].weight).norm() < 0.15 * plain[name].weight.norm()


def test_the_mode_changes_neither_logits_nor_weights(base):
    model = quantised(base)
    before, training = frozen(model), logits_of(model, "train")
    for mode in ("eval", "train", "eval"):
        assert torch.equal(logits_of(model, mode), training)
    after = frozen(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- training


def test_qlora_moves_the_adapter_and_nothing_else(base, tmp_path):
    trainer = make(tmp_path, str(base), max_steps=2, learning_rate=0.1, logging_steps=1)
    model = trainer.model
    assert lora_coverage(model) == [
        *(LoraCoverage(name, 2, 2, quantised=2) for name in LINEAR),
        LoraCoverage("lm_head", 0, 1, quantised=0),
    ]
    inner = model.get_base_model()
    assert type(inner.lm_head) is ScoringHead and type(inner.model.embed_tokens) is nn.Embedding
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(coverage_table(lora_coverage(model)))
    assert any(line.count("2 of 2") == 2 and "down_proj" in line for line in console.export_text().splitlines())

    before, start = frozen(model), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = frozen(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("absmax" in name for name in before)
    assert start.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    moved = [name for name, value in model.named_parameters() if name in start and not torch.equal(value, start[name])]
    assert len(moved) == len(start)
    ratios = [entry["rollout/max_abs_log_ratio"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(ratios) < 1e-5  # the rollout, drawn in evaluation mode, came from the network that learns


def test_steps_of_a_small_learning_rate_move_every_adapter_matrix(base, tmp_path):
    """TRL casts the adapter to bfloat16, where a step of 5e-6 is lost on most weights."""
    # the A matrices have no gradient before the first step has moved the B matrices
    trainer = make(tmp_path, str(base), max_steps=2, learning_rate=5e-6, optim="adamw_torch")
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if "lora_A" in name}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        if name in start:
            assert value.dtype == torch.float32
            still = (value == start[name]).float().mean()
            in_bfloat16 = (value.bfloat16() == start[name].bfloat16()).float().mean()
            assert still < 0.1 < 0.8 < in_bfloat16, name


def test_an_adapter_that_is_trained_further_is_not_rounded(base, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(quantised(base), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    given = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in given.values())
    trainer = make(tmp_path, model)
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in given.items())


# ---------------------------------------------------------------- reference model


def reference_and_others(trainer, *models: nn.Module) -> list[torch.Tensor]:
    """Log-probabilities of the targets of one rollout: the trainer's reference, its policy, and the given models."""
    rows = rollout_of(trainer, "a b", "b a")
    others = [logps_of(trainer, model, rows) for model in (trainer.model, *models)]
    return [rows["ref_per_token_logps"], *others]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_under_qlora_the_reference_is_the_quantised_base(base, tmp_path):
    trainer = make(tmp_path, str(base), beta=0.1, max_steps=3, learning_rate=0.5)
    trainer.train()
    reference, policy, quantised_base, plain = reference_and_others(
        trainer, quantised(base), AutoModelForCausalLM.from_pretrained(base)
    )
    assert torch.equal(reference, quantised_base)
    assert distance(reference, policy) > 1e-3 and distance(reference, plain) > 1e-3


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    "load", [quantised, AutoModelForCausalLM.from_pretrained], ids=["quantised", "full precision"]
)
def test_the_reference_of_a_given_adapter_is_the_model_as_it_was_given(load, trained, base, tmp_path):
    """For a fresh adapter that is the base; an adapter from, say, SFT is where the policy starts, as in TRL."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=not trained)
    model = get_peft_model(load(base), config)
    given = copy.deepcopy(model)
    trainer = make(tmp_path, model, beta=0.1, max_steps=3, learning_rate=0.5)
    trainer.train()
    reference, policy, as_given, plain = reference_and_others(trainer, given, load(base))
    assert distance(reference, as_given) < 1e-6
    assert distance(reference, policy) > 1e-3
    assert (distance(reference, plain) > 1e-3) == trained


@pytest.mark.parametrize("others", [[], ["default"]], ids=["alone", "with another"])
def test_the_reference_of_an_adapter_with_a_name_is_that_adapter(others, base, tmp_path):
    """TRL copies the one called "default"."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name="policy")
    for name in others:
        model.add_adapter(name, config)
    given = copy.deepcopy(model)
    trainer = make(tmp_path, model, beta=0.1, max_steps=3, learning_rate=0.5, save_strategy="steps", save_steps=2)
    before = {name: value.clone() for name, value in model.named_parameters() if ".policy." not in name}
    trainer.train()
    reference, policy, as_given = reference_and_others(trainer, given)
    assert distance(reference, as_given) < 1e-6 and distance(reference, policy) > 1e-3
    assert any(".ref." in name for name in before)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
    resumed = make(tmp_path / "resumed", copy.deepcopy(given), beta=0.1, max_steps=3, learning_rate=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = resumed.model.get_parameter
    assert all(torch.equal(value, again(name)) for name, value in model.named_parameters())


# ---------------------------------------------------------------- through the recipe


def parsed(config: str):
    """Training, model, quantisation and adapter arguments of a recipe's config."""
    parser = TrlParser((TrainArguments, AGRPOConfig, ModelConfig))
    _, training, model = parser.parse_args_and_config(
        ["--config", str(CONFIGS / config), "--use_cpu", "--bf16", "false"]
    )
    return training, model, get_quantization_config(model), get_peft_config(model)


def test_the_config_for_llada_8b_is_agrpos_over_a_double_quantised_base():
    training, _, quantisation, lora = parsed("llada_8b/gsm8k_agrpo_qlora.yaml")
    plain = parsed("llada_8b/gsm8k_agrpo.yaml")
    assert (quantisation.bnb_4bit_quant_type, quantisation.bnb_4bit_use_double_quant) == ("nf4", True)
    assert quantisation.bnb_4bit_compute_dtype == torch.bfloat16
    settings, plain_settings = training.to_dict(), plain[0].to_dict()
    assert {name for name in settings if settings[name] != plain_settings[name]} == {"output_dir"}
    assert lora == plain[3] and plain[2] is None


@pytest.mark.thorough
def test_qlora_learns_on_the_embedded_model(tmp_path):
    """A short run with the embedded config's adapter and learning rate; the docs have the whole runs."""
    training, _, quantisation, lora = parsed("embedded/gsm8k_agrpo_qlora.yaml")
    training.max_steps, training.num_mc_samples, training.output_dir = 12, 2, str(tmp_path)
    training.disable_tqdm, training.save_strategy, training.learning_rate = True, "no", 2e-3
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left")
    trainer = AGRPOTrainer(
        EMBEDDED_MODEL,
        [correctness_reward, format_reward],
        training,
        load_word_problems("train", 512, 0),
        None,
        tokenizer,
        peft_config=lora,
        quantization_config=quantisation,
    )
    measure = partial(
        evaluate_accuracy,
        tokenizer=tokenizer,
        correct=lambda text, row: correctness_reward([text], answer=[row["answer"]]) == [1.0],
        decoding=SamplingConfig(32, 16, 8, temperature=0.0, unmasking="max_prob"),
        batch_size=96,
    )
    held_out = load_word_problems("test", 96, 0)
    before = measure(trainer.model, dataset=held_out).value
    weights = frozen(trainer.model)
    trainer.train()
    assert measure(trainer.model, dataset=held_out).value > before + 0.1
    after = frozen(trainer.model)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    # on the base that was never quantised the adapter works as well
    trainer.save_model()
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL), tmp_path)
    assert measure(full.eval(), dataset=held_out).value > before + 0.1
