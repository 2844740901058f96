"""What TRL's model card does not say of a diffusion language model: base, family, adapter, and how to sample."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel
from trl.trainer.utils import get_config_model_id

from trl_diffusion.models.lora import lora_coverage

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer


def is_hub_id(name: str | None) -> bool:
    """Whether a model or data set has a page on the Hub: an id with its owner, and no file or folder here."""
    if name is None or name.count("/") != 1 or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def card_arguments(trainer: _BaseTrainer, model_name: str | None, dataset_name: str | None) -> dict[str, Any]:
    """Arguments for TRL's `create_model_card`: a name in any case, and a data set only if the Hub can link to it."""
    hub_id = trainer.hub_model_id or trainer.args.hub_model_id
    name = model_name or (hub_id.split("/")[-1] if hub_id else Path(str(trainer.args.output_dir)).name)
    return {"model_name": name, "dataset_name": dataset_name if is_hub_id(dataset_name) else None}


def complete_card(trainer: Any, dataset_name: str | None, generation: dict[str, int]) -> None:
    """Correct and complete the card that TRL wrote into the output folder.

    Args:
        trainer: with `family`, `model`, `_name` and `_paper`.
        dataset_name: as the user calls it, on the Hub or not.
        generation: arguments of `generate` that belong to the model's training, for the example.
    """
    path = Path(trainer.args.output_dir) / "README.md"
    card = ModelCard.load(path)
    adapter = trainer.model.active_peft_config if isinstance(trainer.model, PeftModel) else None
    base = get_config_model_id(trainer.model.config)
    if adapter is not None:
        card.data.library_name = "peft"
        if is_hub_id(base):
            card.data.base_model_relation = "adapter"
        if isinstance(adapter, LoraConfig):
            card.data.tags = sorted({*card.data.tags, "lora"})
    page = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"`{Path(base).name}`, a local model"
    paper = trainer._paper
    rows = {
        "base model": page,
        "family": f"{trainer.family.name}, a diffusion language model",
        "weights": _weights(trainer.model, adapter),
        "method": trainer._name + (f", [{paper['id']}](https://arxiv.org/abs/{paper['id']})" if paper else ""),
        "data set": dataset_name or "not named",
    }
    facts = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    pushed_to = trainer.hub_model_id or Path(trainer.args.output_dir).name
    example = _example(base if is_hub_id(base) else Path(base).name, pushed_to, adapter is not None, generation)
    text = card.text.replace("[None](https://huggingface.co/None)", page)
    text = re.sub(
        "## Quick start\n.*?(?=## Training procedure)",
        lambda _: f"{facts}\n\n## Quick start\n\n{example}\n\n",
        text,
        flags=re.DOTALL,
    )
    card.text = text
    card.save(path)


def _weights(model: Any, adapter: Any) -> str:
    if adapter is None:
        return "all weights, trained"
    kind = adapter.peft_type.value
    if isinstance(adapter, LoraConfig):
        layers = [row for row in lora_coverage(model) if row.adapted]
        counts = ["" if row.adapted == row.total else f" ({row.adapted} of {row.total})" for row in layers]
        targets = ", ".join(f"`{row.name}`{count}" for row, count in zip(layers, counts, strict=True))
        kind = f"LoRA adapter (r {adapter.r}, alpha {adapter.lora_alpha}) on {targets}"
    quantised = model.get_base_model().uses_bitsandbytes
    return kind + (", trained over a base quantised by bitsandbytes (QLoRA)" if quantised else "")


def _example(base: str, trained: str, is_adapter: bool, generation: dict[str, int]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in generation.items())
    load = f'model = AutoModelForCausalLM.from_pretrained("{base if is_adapter else trained}", dtype="auto")'
    lines = [
        "import trl_diffusion  # registers the model's class",
        *(["from peft import PeftModel"] if is_adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        load,
        *([f'model = PeftModel.from_pretrained(model, "{trained}")'] if is_adapter else []),
        f'tokenizer = AutoTokenizer.from_pretrained("{trained}", padding_side="left")',
        'messages = [{"role": "user", "content": "Tom has 7 pens and gets 5 more. How many pens now?"}]',
        "prompt = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        f'canvas = model.generate(input_ids=prompt["input_ids"], {arguments})',
        'print(tokenizer.decode(canvas[0, prompt["input_ids"].size(1) :], skip_special_tokens=True))',
    ]
    return "\n".join(["```python", *lines, "```"])
