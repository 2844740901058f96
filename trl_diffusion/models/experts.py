"""Mixtures of experts: routers in float32, and expert weights that the hub stores one by one and the network merged.

transformers keeps the weights of all experts of a layer in two parameters, `gate_up_proj` [experts, 2 · width, hidden]
and `down_proj` [experts, hidden, width]. `from_pretrained` merges the hub's weights and `save_pretrained` splits them
again, bit for bit. What is here does the same for a plain `load_state_dict`, with which transformers' Trainer resumes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trl_diffusion.models.diffusion_lm import DiffusionLM

# A weight of one expert on the hub.
_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")


class Float32Router:
    """Router that computes in float32 whatever the dtype of the model, also under autocast.

    Near ties between experts are decided by the last digits, and in bfloat16 there are exact ties.
    """

    weight: nn.Parameter  # [experts, hidden]
    top_k: int
    norm_topk_prob: bool

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose experts by the softmax of their scores.

        Args:
            hidden_states: [..., H].

        Returns:
            (scores of all experts, float32 [N, experts]; weights of the chosen, float32 [N, k]; the chosen [N, k]).
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            states = hidden_states.reshape(-1, hidden_states.size(-1)).float()
            logits = nn.functional.linear(states, self.weight.float())
            weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
            if self.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen


class MixtureLM(DiffusionLM):
    """Mixin before a stock `…ForCausalLM` with experts: its routers, and its weights under both names."""

    mixture_class: Any  # the stock class of a layer's mixture
    router_class: type  # with `Float32Router` before the stock class

    def __init__(self, config: Any):
        super().__init__(config)
        for layer in self.model.layers:
            if isinstance(layer.mlp, self.mixture_class):
                layer.mlp.gate.__class__ = self.router_class
        self.register_load_state_dict_pre_hook(_merge_experts)  # type: ignore[attr-defined]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the file of the class, which is in the stock class's.
        return True

    @staticmethod
    def native_name(name: str) -> str:
        """Return the network's name of a weight of the hub: that of the parameter that an expert is part of."""
        return merged_name(name)


def merged_name(name: str) -> str:
    """Return the name of the parameter that an expert's weight is a part of; other names stay as they are."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return name
    return f"{found['experts']}.{'down_proj' if found['part'] == 'down' else 'gate_up_proj'}"


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield the merged weights of experts, alone or inside PEFT.

    Args:
        model: a native model.

    Yields:
        (name of the module that holds them; the module; name of the parameter in it; the parameter).
    """
    for name, module in model.named_modules():
        if name.removesuffix(".base_layer").removesuffix(".base_layer").endswith(".mlp.experts"):
            for key, parameter in module.named_parameters(recurse=False):
                yield name, module, key, parameter


def _merge_experts(module: Any, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Replace the weights of single experts in a state dict by merged ones.

    A file of a sharded checkpoint may hold some experts of a layer and the next file the others, so what is not given
    stays as it is.
    """
    for name in [name for name in state_dict if name.startswith(prefix)]:
        found = _EXPERT.fullmatch(name[len(prefix) :])
        if found is None:
            continue
        merged = merged_name(name)
        if merged not in state_dict:
            state_dict[merged] = module.get_parameter(merged[len(prefix) :]).detach().clone()
        expert = state_dict[merged][int(found["number"])]
        if found["part"] != "down":
            expert = expert.chunk(2)[found["part"] == "up"]
        expert.copy_(state_dict.pop(name))
