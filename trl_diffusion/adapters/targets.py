"""Translate and check the names of the layers that LoRA adapts.

PEFT complains only if *none* of the names matches. A recipe written for the hub's LLaDA (`attn_out`, `ff_proj`) or for
Llama would therefore silently adapt only some of the layers it names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.experts import expert_parameters
from trl_diffusion.validation import near

ALL_LINEAR = "all-linear"
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")


def native_lora_config(config: LoraConfig, model: DiffusionLM) -> LoraConfig:
    """Return a copy of a LoRA config whose layer names are the native class's, each one checked.

    Args:
        config: `target_modules` may hold native names (`q_proj`, `mlp.down_proj`, `model.layers.3.self_attn.o_proj`),
            the hub's (`attn_out`, `blocks.3.ff_out`), `"all-linear"`, or be a regular expression on whole native
            names. `"all-linear"` and names of block layers never mean the LM head. If neither `target_modules` nor
            `target_parameters` is given, it becomes `"all-linear"`. `exclude_modules`, `rank_pattern` and
            `alpha_pattern` take the same names. `target_parameters` holds endings of names of parameters; the merged
            weights of experts (`mlp.experts.gate_up_proj`) are adapted by this alone.
        model: the model to adapt; its weights are not read.

    Returns:
        The config for `get_peft_model`.

    Raises:
        ValueError: if a name matches no linear layer, or no parameter.
    """
    config = copy.deepcopy(config)
    layers = LinearLayers(model)
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = ALL_LINEAR
    if config.target_modules is not None:
        config.target_modules = layers.native_targets(config.target_modules)
    _check_parameters(config.target_parameters or [], model)
    if config.exclude_modules:
        config.exclude_modules = layers.native_targets(config.exclude_modules)
    for pattern in (config.rank_pattern or {}, config.alpha_pattern or {}):
        for name in [name for name in pattern if _PLAIN_NAME.fullmatch(name)]:
            pattern.update(dict.fromkeys(layers.native_targets([name]), pattern.pop(name)))
    return config


def _check_parameters(targets: Iterable[str], model: DiffusionLM) -> None:
    assert isinstance(model, PreTrainedModel)
    names = [name for name, _ in model.named_parameters()]
    for target in targets:
        if not any(_ends_with(name, target) for name in names):
            experts = sorted({f"mlp.experts.{key}" for _, _, key, _ in expert_parameters(model)})
            raise ValueError(
                f"LoRA target_parameters has {target!r}, which matches no parameter of {type(model).__name__}. "
                f"{'Its experts are ' + ', '.join(experts) if experts else 'It has no experts'}."
            )


class LinearLayers:
    """The linear layers of a native model, under their native names and under the hub's.

    Args:
        model: a native model, not yet adapted; may be a `meta_model`.
    """

    def __init__(self, model: DiffusionLM):
        assert isinstance(model, PreTrainedModel)
        head = model.get_output_embeddings()
        self.model_class = type(model)
        self.names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.head = next((name for name, module in model.named_modules() if module is head), None)
        self.hub_names = [model.hub_name(name) for name in self.names]

    def native_targets(self, targets: str | Iterable[str]) -> str | list[str]:
        """Return native names for PEFT's `target_modules`, see `native_lora_config`."""
        if isinstance(targets, str):
            if targets.lower() != ALL_LINEAR and not _PLAIN_NAME.fullmatch(targets):
                if not any(re.fullmatch(targets, name) for name in self.names):
                    raise self._no_match(targets)
                return targets
            targets = [targets]
        targets = sorted(targets)
        if any(target.lower() == ALL_LINEAR for target in targets):
            if len(targets) > 1:
                raise ValueError(f"{ALL_LINEAR!r} stands for itself, got {targets}. Leave the other names out.")
            return ALL_LINEAR
        return shortest_names({name for target in targets for name in self._matches(target)}, self.names)

    def _matches(self, target: str) -> list[str]:
        """Return the native names of the layers that a name means."""
        found = [
            name
            for name, hub in zip(self.names, self.hub_names, strict=True)
            # In LLaDA's checkpoints `ff_out` is the last name both of a layer in every block and of the LM head; alone
            # it means those of the blocks.
            if _ends_with(name, target) or (_ends_with(hub, target) and (name != self.head or "." in target))
        ]
        if not found:
            raise self._no_match(target)
        return found

    def _no_match(self, target: str) -> ValueError:
        native, hub = ([*dict.fromkeys(name.rpartition(".")[2] for name in names)] for names in self._blocks())
        others = [name for name in hub if name not in native]
        hint = near(target, [*native, *hub, ALL_LINEAR])
        hubs = f", the hub's names {', '.join(others)}" if others else ""
        return ValueError(
            f"LoRA target {target!r} matches no linear layer of {self.model_class.__name__}.{hint} Valid are "
            f"{', '.join(native)}{hubs}, longer endings of the layers' full names, and {ALL_LINEAR!r}."
        )

    def _blocks(self) -> tuple[list[str], list[str]]:
        """Return the names of all layers but the LM head, native and on the hub."""
        pairs = [pair for pair in zip(self.names, self.hub_names, strict=True) if pair[0] != self.head]
        return [name for name, _ in pairs], [hub for _, hub in pairs]


def shortest_names(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """Name a set of layers for PEFT's `target_modules`: by last names where all layers of that name are meant.

    Args:
        chosen: full names of the layers that are meant.
        names: full names of all layers.

    Returns:
        Sorted last names and full names that together match exactly the chosen layers.
    """
    chosen = set(chosen)
    left_out = {name.rpartition(".")[2] for name in names if name not in chosen}
    last = {name: name.rpartition(".")[2] for name in chosen}
    return sorted({name if last[name] in left_out else last[name] for name in chosen})


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
