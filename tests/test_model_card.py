"""Model cards: metadata, what was measured, settings, papers, and an example that runs from any folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from methods import PROMPTS, Method, method_named, text_reward
from peft import LoraConfig, PeftModel
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_diffusion.trainers.coupled_grpo
from trl_diffusion.cli import train
from trl_diffusion.credit import leave_one_out
from trl_diffusion.evaluation.statistics import Estimate
from trl_diffusion.evaluation.training_report import accuracy_section, loss_section, save_curves
from trl_diffusion.likelihood import FullMask, MaskedViews, ReplayViews
from trl_diffusion.losses import SequenceRatio
from trl_diffusion.models import LLaDAModelLM
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.papers import FromPaper, parts_of
from trl_diffusion.runtime.card_method import sources_of_methods
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.trainers import (
    METHODS,
    AGRPOTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

AGRPO = method_named("agrpo")
DEEPSEEK = ("2402.03300", "shao2024deepseekmath", "DeepSeekMath")
SAMPLING = SamplingConfig(canvas_length=8, denoising_steps=4, block_length=4, temperature=0.9)


@pytest.fixture
def base(tmp_path) -> Path:
    """The four-word LLaDA in a folder."""
    tiny_model(seed=3).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sft(folder: Path, model=None, peft_config=None, **settings) -> SFTTrainer:
    args = SFTConfig(str(folder), max_completion_length=8, use_cpu=True, bf16=False, report_to=[], **settings)
    data = Dataset.from_dict({"prompt": ["a b"], "completion": ["b a"]})
    return SFTTrainer(model or tiny_model(), args, data, processing_class=tiny_tokenizer(), peft_config=peft_config)


def card_of(folder: Path) -> tuple[str, str]:
    """Metadata and text."""
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return metadata, text


def without_example(text: str) -> str:
    return re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)


def run_example(text: str, folder: Path, monkeypatch) -> dict:
    """What the card's example computes, run in another folder than the one of the model and its parents."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    values: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], values)
    return values


# ---------------------------------------------------------------- model, weights, data, example


def test_the_card_of_an_adapter_over_a_local_model(base, tmp_path, tmp_path_factory, monkeypatch):
    trainer = AGRPO.make(tmp_path / "run", model=AutoModelForCausalLM.from_pretrained(base), peft_config=LoraConfig())
    trainer.save_model()
    trainer.create_model_card(dataset_name="word_problems")
    metadata, text = card_of(tmp_path / "run")
    assert "library_name: peft" in metadata and "lora" in metadata
    assert "datasets" not in metadata and "base_model" not in metadata  # nothing the Hub could not link to
    for part in (
        "Model Card for run",
        "| base model | `base`, a local model |",
        "| family | llada, a diffusion language model |",
        "| weights | LoRA adapter (r 8, alpha 8) on `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, ",
        "| method | AGRPO, [2510.04019](https://arxiv.org/abs/2510.04019) |",
        "| data set | word_problems |",
        "@article{zhan2025simple",
    ):
        assert part in text, part
    assert "None" not in text and "pipeline" not in text and str(tmp_path) not in metadata + without_example(text)
    values = run_example(text, tmp_path_factory.mktemp("any") / "folder", monkeypatch)
    assert isinstance(values["model"], PeftModel)
    assert values["canvas"].size(1) == values["prompt"]["input_ids"].size(1) + trainer.args.max_completion_length
    # checkpoints write a card without saying the data set again
    trainer.create_model_card(model_name="other")
    assert "| data set | word_problems |" in card_of(tmp_path / "run")[1]


def test_a_card_that_is_pushed_names_no_local_folder(base, tmp_path):
    trainer = AGRPO.make(tmp_path / "run", model=AutoModelForCausalLM.from_pretrained(base), peft_config=LoraConfig())
    trainer.hub_model_id = "me/run"
    trainer.create_model_card()
    metadata, text = card_of(tmp_path / "run")
    assert str(tmp_path) not in metadata + text
    assert 'PeftModel.from_pretrained(model, "me/run")' in text
    assert 'base = "base"  # a local model: the folder where you have it' in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Instruct"),
        ("/cache/hub/models--GSAI-ML--LLaDA-8B-Instruct/snapshots/0a1b2c", "GSAI-ML/LLaDA-8B-Instruct"),
        ("/home/me/merged", None),
        ("/home/me/models--merged", None),
    ],
)
@pytest.mark.parametrize("method", ["agrpo", "sft"])
def test_cards_next_to_an_adapter_name_the_hubs_id_of_its_base(method, name, hub_id, tmp_path):
    """PEFT's own card names the path; the Hub refuses such metadata."""
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = name
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    if method == "sft":
        trainer = sft(tmp_path / "run", model=model, peft_config=LoraConfig(), **settings)
    else:
        trainer = AGRPO.make(tmp_path / "run", model=model, peft_config=LoraConfig(), **settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-1"):
        metadata = card_of(folder)[0]
        assert "library_name: peft" in metadata and "/home" not in metadata and "/cache" not in metadata
        for line in (f"base_model: {hub_id}\n", f"- base_model:adapter:{hub_id}\n"):
            assert (line in metadata) == (hub_id is not None)
    trainer.save_model()
    trainer.create_model_card()
    metadata, text = card_of(tmp_path / "run")
    assert (f"base_model: {hub_id}" in metadata) == (hub_id is not None) and "/home" not in without_example(text)
    page = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{Path(name).name}`, a local model"
    assert f"| base model | {page} |" in text


def test_the_example_for_a_bundled_base_runs_anywhere(tmp_path, tmp_path_factory, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    settings = {"max_completion_length": 32, "block_length": 8, "denoising_steps": 16}
    trainer = AGRPO.make(tmp_path / "run", model=model, peft_config=LoraConfig(), **settings)
    trainer.processing_class = trainer._tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    trainer.save_model()
    trainer.create_model_card()
    text = card_of(tmp_path / "run")[1]
    assert "| base model | `embedded`, which comes with trl_diffusion |" in text and EMBEDDED_MODEL not in text
    found = run_example(text, tmp_path_factory.mktemp("any") / "folder", monkeypatch)
    assert isinstance(found["model"], PeftModel) and found["canvas"].size(1) > 32


def test_the_card_of_a_whole_model_on_hub_data(base, tmp_path, tmp_path_factory, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config._name_or_path = "GSAI-ML/LLaDA-8B-Instruct"
    trainer = method_named("sapo").make(tmp_path / "run", model=model)
    trainer.save_model()
    trainer.create_model_card(dataset_name="openai/gsm8k")
    metadata, text = card_of(tmp_path / "run")
    for line in ("base_model: GSAI-ML/LLaDA-8B-Instruct", "datasets: openai/gsm8k", "library_name: transformers"):
        assert line in metadata
    assert "| weights | all weights, trained |" in text and "base_model_relation" not in metadata
    assert "[GSAI-ML/LLaDA-8B-Instruct](https://huggingface.co/GSAI-ML/LLaDA-8B-Instruct)" in text
    values = run_example(text, tmp_path_factory.mktemp("any") / "folder", monkeypatch)
    assert isinstance(values["model"], LLaDAModelLM)


def test_the_card_of_masked_sft(tmp_path):
    trainer = sft(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.create_model_card(dataset_name="openai/gsm8k")
    metadata, text = card_of(tmp_path)
    assert "datasets: openai/gsm8k" in metadata and "library_name: peft" in metadata
    assert "| method | masked SFT, [2504.12216]" in text and "on `q_proj` |" in text and "pipeline" not in text
    assert "| canvas | 8 positions, each masked with probability t ~ U(0.001, 1) |" in text


# ---------------------------------------------------------------- papers


def card_text(trainer) -> str:
    trainer.create_model_card()
    return card_of(Path(trainer.args.output_dir))[1]


def assert_cited(text: str, *, cited: tuple[str, ...], absent: tuple[str, ...] = ()) -> None:
    assert all(words in text for words in (*cited, "@software{vonwerra2020trl", "- TRL: ", "- trl_diffusion: "))
    assert not any(words in text for words in (*absent, *DEEPSEEK, "None"))


def test_step_aware_rewards_are_named_and_cited(tmp_path):
    text = card_text(method_named("sapo").make(tmp_path))
    sapo = "uses step-aware rewards (SAPO), [2510.01544](https://arxiv.org/abs/2510.01544)"
    assert f"| method | diffu-GRPO, [2504.12216](https://arxiv.org/abs/2504.12216); {sapo} |" in text
    assert_cited(text, cited=("@article{zhao2025d1", "Cite step-aware rewards (SAPO) as:", "@article{xie2025step"))
    assert text.index("xie2025step") < text.index("vonwerra2020trl")


def test_selected_steps_are_named_and_cited_whatever_the_method(tmp_path):
    atpo = card_text(method_named("atpo").make(tmp_path))
    assert_cited(atpo, cited=("| method | ATPO, [2511.15208]", "Cite ATPO as:", "@article{chen2025reasoning"))
    selected = AGRPO.make(tmp_path, step_selector="roec_cm", step_draws="uniform", step_reduction="mean")
    text = card_text(selected)
    assert "| method | AGRPO, [2510.04019](https://arxiv.org/abs/2510.04019); uses ATPO, [2511.15208](" in text
    assert_cited(text, cited=("@article{zhan2025simple", "@article{chen2025reasoning"))


def test_a_composed_method_names_its_choices_and_cites_where_they_are_from(tmp_path):
    method = Method("composed", DiffusionGRPOTrainer, DiffusionGRPOConfig, {"num_mc_samples": 8})
    choices = {"credit": leave_one_out, "likelihood": ReplayViews(SAMPLING), "loss": SequenceRatio(0.1, 0.2)}
    text = card_text(method.make(tmp_path, choices=choices))
    assert "| method | DiffusionGRPO; composed: credit `GroupCredit(centring=leave_one_out" in text
    assert "loss `SequenceRatio(low=0.1, high=0.2, beta=0.0)`; uses TraceRL, [2509.06949](" in text
    assert_cited(text, cited=("@article{ou2025principled", "Cite TraceRL as:"), absent=("introduced in",))
    # a choice that replaces one of a method's own
    text = card_text(method_named("wd1").make(tmp_path, choices={"loss": SequenceRatio()}))
    assert_cited(text, cited=("@article{tang2025wd1", "Cite ESPO as:", "Cite diffu-GRPO as:", "wd1, [2507.08838]"))


def test_a_method_without_a_paper_cites_nothing_that_it_inherits(tmp_path):
    class Mine(AGRPOTrainer):
        _name = "my method"

        def likelihood(self):
            return MaskedViews(FullMask(self.args.num_mc_samples))

    class Logged(AGRPOTrainer):
        """The same method with other logs."""

    arguments = {"args": AGRPO.config(**_settings(tmp_path)), "train_dataset": Dataset.from_dict({"prompt": PROMPTS})}
    arguments |= {"processing_class": tiny_tokenizer()}
    text = card_text(Mine(tiny_model(), text_reward, **arguments))
    assert "| method | my method; uses diffu-GRPO, [2504.12216]" in text
    assert_cited(
        text, cited=("trained with my method.", "@article{zhao2025d1"), absent=("zhan2025simple", "2510.04019")
    )
    text = card_text(Logged(tiny_model(), text_reward, **arguments))
    assert_cited(text, cited=("| method | AGRPO, [2510.04019]", "@article{zhan2025simple"))


def _settings(folder: Path) -> dict[str, Any]:
    common = {"output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 4, "report_to": []}
    return common | {"max_completion_length": 8, "block_length": 4, "denoising_steps": 4, "bf16": False}


def _parts(base: type = FromPaper) -> Iterator[type[FromPaper]]:
    for part in base.__subclasses__():
        yield part
        yield from _parts(part)


def test_the_papers_of_all_parts_have_a_citation_or_a_name_of_their_own():
    assert trl_diffusion.trainers.coupled_grpo.CoupledMasks in [*_parts()]
    known = sources_of_methods(DiffusionGRPOTrainer)
    assert {trainer._paper["id"] for trainer in METHODS.values()} <= known.keys()
    others = {part.__name__ for part in _parts() if part.paper is not None and part.paper not in known}
    assert others == {"InformedMasking"}
    nested = parts_of(MaskedViews(FullMask(2)))
    assert [type(part).__name__ for part in nested] == ["MaskedViews", "FullMask"]


# ---------------------------------------------------------------- settings


def test_settings_that_differ_from_the_defaults_are_listed(tmp_path):
    trainer = method_named("diffu_grpo").make(tmp_path, epsilon=0.3, learning_rate=3e-6, num_iterations=2, seed=7)
    text = card_text(trainer)
    for row in (
        "| canvas | 8 tokens in blocks of 4, 4 denoising steps, low_confidence unmasking |",
        "| drawn | at temperature 0.9 |",
        "| rollout | 4 prompts × 4 completions = 16 completions, 2 updates from each |",
        "| learning rate | 3e-06, constant, no warm-up, sgd, weight decay 0 |",
        "| updates made | 0 |",
        "| seed | 7 |",
    ):
        assert row in text, row
    others = re.search(r"Other settings that differ from the defaults of `DiffuGRPOConfig`: (.*)\.\n", text)
    assert others is not None and "`epsilon=0.3`" in others[1] and "seed" not in others[1]
    assert not re.search(r"batch_size|report_to|output_dir|beta=", others[1])


# ---------------------------------------------------------------- accuracy and curves


def test_the_section_on_accuracy(tmp_path):
    history = [(0, Estimate.of(5, 20)), (40, Estimate.of(4, 8)), (80, Estimate.of(15, 20))]
    decoding = SamplingConfig(32, 16, 8, temperature=0.0, unmasking="max_prob", cache="prefix", cache_refresh=2)
    text = accuracy_section(history, decoding, tmp_path, "reward")
    assert "| before training | 25.0 % | 11.2 – 46.9 | 20 |" in text
    assert "| after 80 updates | 75.0 % | 53.1 – 88.8 | 20 |" in text and "50.0 %" not in text
    assert (
        "Decoded greedily on a canvas of 32 tokens in blocks of 8, 16 denoising steps, max_prob unmasking, cache"
        in text
    )
    assert "curves.png" not in text
    save_curves(tmp_path, [{"step": 1, "reward": 0.5}, {"step": 2, "loss": 0.5}], history, "reward")
    assert "![Reward and held-out accuracy" in accuracy_section(history, decoding, tmp_path, "reward")
    assert accuracy_section([], decoding, tmp_path, "reward") == ""
    losses = [{"step": 0, "eval_loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 4, "eval_loss": 1.25}]
    assert "| 0 | 2.000 |\n| 4 | 1.250 |" in loss_section(losses)
    assert loss_section([{"step": 3, "loss": 1.0}]) == ""


@pytest.mark.slow
def test_the_command_line_writes_a_card_with_all_of_it(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """LoRA on the bundled model, with a checkpoint on the way."""
    monkeypatch.chdir(tmp_path)
    lora = "--use_peft true --lora_r 4 --lora_target_modules all-linear"
    small = "--max_steps 2 --logging_steps 1 --save_steps 1 --eval_size 8 --eval_every 1 --eval_size_between 4"
    batch = "--per_device_train_batch_size 8 --num_mc_samples 1 --disable_tqdm true --output_dir run"
    train.main(["agrpo", *lora.split(), *small.split(), *batch.split()])
    metadata, text = card_of(tmp_path / "run")
    shown = capsys.readouterr().out
    before, after = (re.search(rf"\| {name} [^|]*\| (\S+ %) \| .* \| 8 \|", text) for name in ("before", "after"))
    assert before is not None and after is not None
    assert f"{before[1]} of 8" in shown and f"{after[1]} of 8" in shown
    assert "![Reward and held-out accuracy over the updates](curves.png)" in text
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert "| data set | word_problems, generated problems |" in text and "| updates made | 2 |" in text
    assert text.index("## Held-out accuracy") < text.index("## Quick start") < text.index("### Settings")
    assert "library_name: peft" in metadata
    found = run_example(text, tmp_path_factory.mktemp("any") / "folder", monkeypatch)
    assert isinstance(found["model"], PeftModel)
    state = (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text()
    assert state.count('"eval_total": 8') + state.count('"eval_total": 4') == 2  # before, and after the first update


def test_processes_that_do_not_save_write_nothing_beside_the_weights(tmp_path, monkeypatch):
    """Under DeepSpeed and FSDP transformers calls `_save` on every process, and two would write one file at once."""
    trainer = AGRPO.make(tmp_path)
    trainer._save(str(tmp_path / "first"))
    assert (tmp_path / "first" / "generation_config.json").is_file()
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda args: False))
    written = []
    monkeypatch.setattr("trl_diffusion.runtime.model_card.record_decoding", lambda *given: written.append(given))
    monkeypatch.setattr("trl_diffusion.runtime.model_card.make_portable", lambda *given: written.append(given))
    trainer._save(str(tmp_path / "second"))
    assert written == []
