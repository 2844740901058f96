"""Count which layers of a model LoRA adapts.

Published recipes name layers that do not exist; PEFT ignores these names, and half of the model is not adapted.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from rich.table import Table
from torch import nn

from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.experts import expert_parameters

# Submodules that PEFT puts inside an adapted layer: they are parts of a layer, not layers.
PARTS = re.compile(r"\.(lora_\w+|base_layer|original_module|modules_to_save)\b")


@dataclass(frozen=True)
class LoraCoverage:
    """Counts of the linear layers of one kind: with an adapter, quantised, in all.

    Args:
        name: the last part of the layers' names, for example `q_proj`; `experts.down_proj` for the weights of all
            experts of a layer, which are one parameter.
        adapted: number of layers with an adapter, or trained whole (`modules_to_save`).
        total: number of layers of that name.
        quantised: number of layers whose weights bitsandbytes holds in 4 or 8 bits.
    """

    name: str
    adapted: int
    total: int
    quantised: int = 0


def lora_coverage(model: PeftModel) -> list[LoraCoverage]:
    """Count the adapted linear layers by name, the LM head and the merged weights of experts included.

    Args:
        model: a PEFT model.

    Returns:
        One entry per kind of linear layer, in the order in which the network uses them.
    """
    base = model.get_base_model()
    quantised_linear: tuple[type, ...] = ()
    if isinstance(base, DiffusionLM) and base.uses_bitsandbytes:
        from trl_diffusion.models.quantised_linear import QUANTISED_LINEAR  # bitsandbytes is optional

        quantised_linear = QUANTISED_LINEAR
    counts: dict[str, list[int]] = {}
    for name, module in base.named_modules():
        if isinstance(module, ParamWrapper):  # around a parameter, not a layer; counted below
            continue
        adapted = isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
        if not adapted and (not isinstance(module, nn.Linear) or PARTS.search(name)):
            continue
        weights = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        count = counts.setdefault(name.rpartition(".")[2], [0, 0, 0])
        count[0] += adapted
        count[1] += 1
        count[2] += isinstance(weights, quantised_linear)
    for name, adapted_, total in _expert_counts(base):
        counts[name] = [adapted_, total, 0]
    return [LoraCoverage(name, *count) for name, count in counts.items()]


def _expert_counts(base: nn.Module) -> list[tuple[str, int, int]]:
    """Count the merged weights of experts: (name, with an adapter, in all)."""
    total = Counter(f"experts.{key}" for _, _, key, _ in expert_parameters(base))
    wrapped = Counter(
        f"experts.{module.parameter_name}" for module in base.modules() if isinstance(module, ParamWrapper)
    )
    return [(name, wrapped[name], count) for name, count in total.items()]


def coverage_table(coverage: list[LoraCoverage]) -> Table:
    """Format the counts as a `rich` table, with a column of quantised layers if there are any."""
    quantised = any(row.quantised for row in coverage)
    table = Table("linear layer", "adapted", *["quantised"] * quantised, title="LoRA coverage")
    for row in coverage:
        cells = [f"{row.adapted} of {row.total}", f"{row.quantised} of {row.total}"]
        table.add_row(row.name, *cells[: 1 + quantised])
    return table
