"""4-bit layers (QLoRA, 2305.14314) that compute on the CPU with the weights they hold.

bitsandbytes 0.50 has two faults on CPUs. Its dequantisation starts a new block of 64 values with every row, so a
layer whose input size is no multiple of 64 silently computes with other weights. And on CPUs with AVX512-BF16 a layer
in evaluation mode repacks its weight in place with coarser scales: sampling and scoring would use another network than
the update does, and the frozen weights would drift with every change of the mode.
"""

from __future__ import annotations

import copy

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

QUANTISED_LINEAR = (Linear4bit, Linear8bitLt)


class ExactLinear4bit(Linear4bit):
    """Dequantises its weight on a CPU as it was quantised, in blocks that run across rows, in every mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.dequantised().to(dtype), bias).to(x.dtype)

    def dequantised(self) -> torch.Tensor:
        """Return the weight [out, in] that the 4-bit codes stand for."""
        # As one long row, so that blocks of 64 values run across rows, as they did when the weight was quantised.
        one_row = copy.copy(self.weight.quant_state)  # type: ignore[attr-defined]  # it is a Params4bit
        one_row.shape = torch.Size([1, self.out_features * self.in_features])
        return dequantize_4bit(self.weight.data, one_row).view(self.out_features, self.in_features)


def make_exact(model: nn.Module) -> None:
    """Turn the 4-bit layers of a model into `ExactLinear4bit`; no weight is copied or changed."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = ExactLinear4bit
