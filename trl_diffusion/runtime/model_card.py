"""Complete TRL's model card: base, family, adapter, method and settings, what was measured, and how to sample."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel
from transformers import Trainer
from trl.trainer.utils import get_config_model_id

from trl_diffusion import __version__
from trl_diffusion.adapters.coverage import lora_coverage
from trl_diffusion.runtime.card_example import bundled_name, example
from trl_diffusion.runtime.card_method import Source, citations, method_text
from trl_diffusion.runtime.card_settings import settings_section
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


def complete_card(trainer: Any, dataset_name: str | None, sections: Sequence[str]) -> None:
    """Correct and complete the card that TRL wrote into the output folder.

    Args:
        trainer: of this library.
        dataset_name: the data set, by its id on the Hub or a name of the user's.
        sections: texts in Markdown, put before the example.
    """
    folder = Path(trainer.args.output_dir)
    card = ModelCard.load(folder / "README.md")
    adapter = trainer.model.active_peft_config if isinstance(trainer.model, PeftModel) else None
    base = get_config_model_id(trainer.model.config)
    hub_id = hub_id_of(base)
    _correct_metadata(card, hub_id, adapter)
    page, others = _page(base, hub_id), trainer.card_sources()
    facts = _table(
        {
            "base model": page,
            "family": f"{trainer.family.name}, a diffusion language model",
            "weights": _weights(trainer.model, adapter),
            "method": method_text(trainer._name, trainer._paper, trainer.card_choices(), others),
            "data set": dataset_name or "not named",
        }
    )
    settings = settings_section(trainer.args, trainer.card_facts, trainer.state.global_step)
    text = card.text
    for link in (None, base):  # TRL links to the base, and to a page named "None" if that is a folder
        text = text.replace(f"[{link}](https://huggingface.co/{link})", page)
    parts = [facts, *sections, f"## Quick start\n\n{_example(trainer, adapter is not None, base, hub_id)}"]
    card.text = _with_sections(text, "\n\n".join(part for part in parts if part), settings, citations(others))
    card.save(folder / "README.md")


def _with_sections(text: str, beginning: str, settings: str, others: str) -> str:
    """Return TRL's text with our own parts where they belong: in place of its example, and inside two sections."""
    text = re.sub("## Quick start\n.*?(?=## Training procedure)", lambda _: f"{beginning}\n\n", text, flags=re.DOTALL)
    versions = "### Framework versions\n\n"
    text = text.replace(versions, f"{settings}\n\n{versions}- trl_diffusion: {__version__}\n", 1)
    return text.replace("Cite TRL as:", f"{others}Cite TRL as:", 1)


def _example(trainer: Any, is_adapter: bool, base: str, hub_id: str | None) -> str:
    """Return the example; a card that is not pushed names folders by their paths, so that it runs from anywhere."""
    pushed_to = trainer.hub_model_id
    trained = pushed_to or str(Path(trainer.args.output_dir).absolute())
    if not is_adapter:
        return example(trained, None, trainer.card_generation())
    if hub_id is not None or bundled_name(base):
        return example(trained, hub_id or base, trainer.card_generation())
    if pushed_to:
        remark = "  # a local model: the folder where you have it"
        return example(trained, Path(base).name, trainer.card_generation(), remark)
    return example(trained, str(Path(base).absolute()), trainer.card_generation())


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

    A trainer with a name of its own has a paper of its own, or none: without `_paper` it would cite that of the
    trainer it inherits. PEFT writes a card into every checkpoint and wherever `save_model` puts an adapter, and names
    the base by its path.
    """

    _paper: dict[str, str]
    _dataset_name: str | None = None
    _card_sections: Sequence[Callable[[], str]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_name" in vars(cls) and "_paper" not in vars(cls):
            cls._paper = {}

    def card_generation(self) -> dict[str, int]:
        """Arguments of `generate` for the example in the model card."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its models are sampled.")

    @cached_property
    def card_facts(self: Any) -> dict[str, str]:
        """The facts of the start-up report, made once, because every checkpoint has a card and they read all data."""
        return {} if self.train_dataset is None else self.figures(self.as_run()).facts

    def card_choices(self) -> dict[str, str]:
        """Return what the method is composed of, if it is composed for this run."""
        return {}

    def card_sources(self) -> list[Source]:
        """Return the papers of what the run uses in addition to its method's own."""
        return []

    def add_to_card(self, section: Callable[[], str]) -> None:
        """Add a section to the model card.

        Args:
            section: returns its text in Markdown, or an empty text, whenever a card is written.
        """
        self._card_sections = [*self._card_sections, section]

    def create_model_card(self: Any, model_name=None, dataset_name=None, tags=None):
        """TRL's card, completed; the name of the data set is kept for the cards of later checkpoints."""
        self._dataset_name = dataset_name or self._dataset_name
        super().create_model_card(**card_arguments(self, model_name, self._dataset_name), tags=tags)  # type: ignore[misc]
        if self.is_world_process_zero():
            complete_card(self, self._dataset_name, [section() for section in self._card_sections])

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if not self.args.should_save:  # under DeepSpeed and FSDP transformers comes here on every process
            return
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
    return f"`{Path(base).name}`, {'which comes with trl_diffusion' if bundled_name(base) else 'a local model'}"


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
