"""Complete TRL's model card with the base, family and adapter of a diffusion language model, and how to sample."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel
from transformers import Trainer
from trl.trainer.utils import get_config_model_id

from trl_diffusion.adapters.coverage import lora_coverage
from trl_diffusion.models.embedded import EMBEDDED_MODELS
from trl_diffusion.runtime.recorded_decoding import record_decoding


def is_hub_id(name: str | None) -> bool:
    """Return whether a model or data set has a page on the Hub: an id with an owner, and no local file or folder."""
    if name is None or name.count("/") != 1 or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_id_of(base: str) -> str | None:
    """Return the id of a model on the Hub, also from a path into the Hub's local cache; `None` if it has none."""
    if is_hub_id(base):
        return base
    kind, *names = next((part.split("--", 2) for part in Path(base).parts if part.startswith("models--")), [""])
    return "/".join(names) if kind and len(names) == 2 else None


def card_arguments(trainer: Trainer, model_name: str | None, dataset_name: str | None) -> dict[str, Any]:
    """Return arguments for TRL's `create_model_card`: always a name, and a data set only if it is on the Hub."""
    hub_id = trainer.hub_model_id or trainer.args.hub_model_id
    name = model_name or (hub_id.split("/")[-1] if hub_id else Path(str(trainer.args.output_dir)).name)
    return {"model_name": name, "dataset_name": dataset_name if is_hub_id(dataset_name) else None}


def complete_card(trainer: Any, dataset_name: str | None, generation: dict[str, int]) -> None:
    """Correct and complete the card that TRL wrote into the output folder.

    Args:
        trainer: with `family`, `model`, `_name` and `_paper`.
        dataset_name: the data set, by its id on the Hub or a name of the user's.
        generation: arguments of `generate` that the model was trained with, for the example.
    """
    path = Path(trainer.args.output_dir) / "README.md"
    card = ModelCard.load(path)
    adapter = trainer.model.active_peft_config if isinstance(trainer.model, PeftModel) else None
    base = get_config_model_id(trainer.model.config)
    hub_id = hub_id_of(base)
    _correct_metadata(card, hub_id, adapter)
    page = _page(base, hub_id)
    paper = trainer._paper
    facts = _table(
        {
            "base model": page,
            "family": f"{trainer.family.name}, a diffusion language model",
            "weights": _weights(trainer.model, adapter),
            "method": trainer._name + (f", [{paper['id']}](https://arxiv.org/abs/{paper['id']})" if paper else ""),
            "data set": dataset_name or "not named",
        }
    )
    pushed_to = trainer.hub_model_id or Path(trainer.args.output_dir).name
    example = _example(base, hub_id, pushed_to, adapter is not None, generation)
    text = card.text
    for link in (None, base):  # TRL links to the base, and to a page named "None" if that is a folder
        text = text.replace(f"[{link}](https://huggingface.co/{link})", page)
    text = re.sub(
        "## Quick start\n.*?(?=## Training procedure)",
        lambda _: f"{facts}\n\n## Quick start\n\n{example}\n\n",
        text,
        flags=re.DOTALL,
    )
    card.text = text
    card.save(path)


def _correct_metadata(card: Any, hub_id: str | None, adapter: Any) -> None:
    """Name the base by its id on the Hub, or not at all without one, and mark adapters as such."""
    card.data.base_model = hub_id
    if adapter is not None:
        card.data.library_name = "peft"
        if hub_id is not None:
            card.data.base_model_relation = "adapter"
        if isinstance(adapter, LoraConfig):
            card.data.tags = sorted({*card.data.tags, "lora"})


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


class ModelCards:
    """Mixin before a trainer for the cards of its models: TRL's, completed, and PEFT's, without local paths.

    PEFT writes a card into every checkpoint and wherever `save_model` puts an adapter, and names the base by its path.
    """

    _dataset_name: str | None = None

    def card_generation(self) -> dict[str, int]:
        """Arguments of `generate` for the example in the model card."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its models are sampled.")

    def card_notes(self) -> str:
        """Return text for the end of the model card."""
        return ""

    def create_model_card(self: Any, model_name=None, dataset_name=None, tags=None):
        """TRL's card, completed; the name of the data set is kept for the cards of later checkpoints."""
        self._dataset_name = dataset_name or self._dataset_name
        super().create_model_card(**card_arguments(self, model_name, self._dataset_name), tags=tags)  # type: ignore[misc]
        if self.is_world_process_zero():
            complete_card(self, self._dataset_name, self.card_generation())
            with open(os.path.join(str(self.args.output_dir), "README.md"), "a") as card:
                card.write(self.card_notes())

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        record_decoding(output_dir or self.args.output_dir, self.card_generation())
        card = Path(output_dir or self.args.output_dir) / "README.md"
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel) and card.is_file():
            make_portable(card, get_config_model_id(self.model.config))


def make_portable(path: Path, base: str) -> None:
    """Name the base of an adapter by its id on the Hub in the card's metadata, or remove it if it has none.

    Args:
        path: path of the card, as PEFT wrote it.
        base: name or path of the base.
    """
    card, hub_id = ModelCard.load(path), hub_id_of(base)
    tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
    card.data.tags = sorted([*tags, f"base_model:adapter:{hub_id}"]) if hub_id else tags
    card.data.base_model = hub_id
    card.save(path)


def _page(base: str, hub_id: str | None) -> str:
    if hub_id is not None:
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    embedded = Path(base) in map(Path, EMBEDDED_MODELS.values())
    return f"`{Path(base).name}`, {'which comes with trl_diffusion' if embedded else 'a local model'}"


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


def _example(base: str, hub_id: str | None, trained: str, is_adapter: bool, generation: dict[str, int]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in generation.items())
    named = f'"{trained}"'
    embedded = {str(Path(path)): name for name, path in EMBEDDED_MODELS.items()}.get(str(Path(base)))
    loaded = f'"{hub_id or Path(base).name}"' if embedded is None else f'EMBEDDED_MODELS["{embedded}"]'
    hint = "  # a local model: the folder where you have it" if hub_id is None and embedded is None else ""
    lines = [
        "import trl_diffusion  # registers the model's class",
        *(["from peft import PeftModel"] if is_adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *(["from trl_diffusion.models.embedded import EMBEDDED_MODELS"] if is_adapter and embedded else []),
        "",
        *([f"base = {loaded}{hint}"] if is_adapter else []),
        f'model = AutoModelForCausalLM.from_pretrained({"base" if is_adapter else named}, dtype="auto")',
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
