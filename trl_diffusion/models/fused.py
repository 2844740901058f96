"""Elementwise work of the layers in single kernels: rotation of queries and keys, RMS norms, and the gate of the MLPs.

Run operation by operation, each of these reads and writes its tensors several times, and takes more of a pass than
its arithmetic does. `torch.compile` makes one kernel of each, on GPUs by Triton and on CPUs by a C++ compiler. Only
these functions are compiled, and not the network around them: layers, adapters, hooks and caches stay as they are, and
shapes may change from pass to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from trl_diffusion.models.layers import DiffusionAttention, rotated

# Stock classes whose forward is the one below; they differ in their names alone.
NORMS = (
    llama.LlamaRMSNorm,
    qwen2.Qwen2RMSNorm,
    qwen3.Qwen3RMSNorm,
    qwen3_moe.Qwen3MoeRMSNorm,
    glm4_moe.Glm4MoeRMSNorm,
)
MLPS = (llama.LlamaMLP, qwen2.Qwen2MLP, qwen3.Qwen3MLP, qwen3_moe.Qwen3MoeMLP, glm4_moe.Glm4MoeMLP)


def rms_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalise states [..., H] by their root mean square in float32, with the rounding of the stock classes."""
    exact = states.float()
    normalised = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normalised.to(states.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return SiLU(gate) · up."""
    return F.silu(gate) * up


@cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compile one of the functions here, once for all models; shapes may differ from call to call."""
    return torch.compile(function, dynamic=True)


class FusedNorm:
    """Computes an RMS norm in one kernel."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return compiled(rms_norm)(hidden_states, self.weight, self.variance_epsilon)


class FusedMLP:
    """Computes the gate of an MLP in one kernel."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(compiled(gated)(self.gate_proj(x), self.up_proj(x)))


# Each stock class with the other forward, under its own name, by which transformers initialises weights.
FUSED: dict[type, type] = {
    stock: type(stock.__name__, (mixin, stock), {})
    for mixin, stocks in ((FusedNorm, NORMS), (FusedMLP, MLPS))
    for stock in stocks
}


def fuse_elementwise(model: nn.Module) -> None:
    """Let a model compute its elementwise work in single kernels, equal to rounding; its weights stay as they are.

    Args:
        model: a native model, possibly inside PEFT.

    Raises:
        ValueError: if the kernels cannot be compiled here.
    """
    check_compiler(next(model.parameters()).device, "fuse_elementwise")
    for module in model.modules():
        if isinstance(module, DiffusionAttention):
            module.rotate = compiled(rotated)
        elif type(module) in NORMS or (type(module) in MLPS and isinstance(module.act_fn, SiLUActivation)):
            module.__class__ = FUSED[type(module)]


def check_compiler(device: torch.device, setting: str) -> None:
    """Compile one function for a device (on meta devices, which compute nothing, for the CPU).

    Args:
        device: to compile for; for a meta device, which computes nothing, it is the CPU.
        setting: that needs the compiler, for the message.

    Raises:
        ValueError: if it cannot be compiled.
    """
    states = torch.ones(2, 3, device="cpu" if device.type == "meta" else device)
    try:
        compiled(gated)(states, states)
    except RuntimeError as error:  # what torch raises for every fault of the compiler and its tools
        raise ValueError(
            f"{setting} compiles kernels for {device.type}, and torch.compile failed there: {error}. Install "
            f"Triton on a GPU, or a C++ compiler for the CPU; or leave {setting} out."
        ) from error
