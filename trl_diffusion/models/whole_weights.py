"""Make loading fail if a checkpoint's weights are not those of the network.

transformers prints a table of missing and unexpected weights, gives the missing ones random values and continues.
Under ZeRO-3 it does not even look for unexpected ones.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import load_state_dict

NAMED = 8  # names of weights in an error


class WholeWeights:
    """Mixin of a `PreTrainedModel` that refuses checkpoints with missing or unexpected weights.

    Weights that other weights replace (a tied LM head) and the states of quantised ones count as present: transformers
    takes them out of the lists that are checked here. As in transformers, a family's class declares in
    `_keys_to_ignore_on_load_missing` and `_keys_to_ignore_on_load_unexpected` (regular expressions) which other
    weights its checkpoints may lack or have in addition. transformers refuses weights of other shapes; with
    `ignore_mismatched_sizes=True` they get random values, as the caller asked.
    """

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ):
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        # Under ZeRO-3 transformers fills the list of missing weights only, so names are compared here.
        if is_deepspeed_zero3_enabled() and not load_config.is_quantized:
            given = state_dict or {
                name for file in checkpoint_files for name in load_state_dict(file, map_location="meta")
            }
            loaded[0].unexpected_keys |= {model.native_name(name) for name in given} - model.state_dict().keys()
        return loaded

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any):
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        found = {"lacks": loading_info.missing_keys, "has in addition": loading_info.unexpected_keys}
        faults = [_listed(fault, names) for fault, names in found.items() if names]
        if faults:
            raise ValueError(
                f"{load_config.pretrained_model_name_or_path} does not have the weights of {type(model).__name__}: it "
                f"{'; it '.join(faults)}. Use a checkpoint of this architecture that was saved whole."
            )
        return loading_info


def _listed(fault: str, names: set[str]) -> str:
    """Describe weights by their count and names; those that differ in their layer alone as one, with `*` for it."""
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    more = f" and {len(kinds) - NAMED} other kinds" if len(kinds) > NAMED else ""
    return f"{fault} {len(names)}: {', '.join(kinds[:NAMED])}{more}"
