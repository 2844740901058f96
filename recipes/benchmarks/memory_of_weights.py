"""Memory of a large model's weights, gradients and optimizer on one process, by how it is trained and sharded.

    python recipes/benchmarks/memory_of_weights.py --shape llada-8b --processes 8

Nothing is allocated: the model is built without weights, and the figures are those of the start-up report
(`trl_diffusion.runtime.cost.policy_memory`). Activations, logits, the rollout batch and a separate reference model
come in addition.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from networks import SHAPES, lora, make_network
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from trl_diffusion.runtime.cost import parameter_count, policy_memory
from trl_diffusion.runtime.run import TrainingRun
from trl_diffusion.trainers import AGRPOConfig

# Name, DeepSpeed's stage, whether DeepSpeed keeps the optimizer's state.
SHARDINGS = (("one GPU, or DDP", 0, False), ("ZeRO-1", 1, True), ("ZeRO-2", 2, True), ("ZeRO-3", 3, True))
WAYS = ("QLoRA", "LoRA", "full")


def trained_model(shape: str, way: str) -> nn.Module:
    """Return the network of a shape without weights, with AGRPO's LoRA unless all weights are trained.

    Args:
        shape: a name in `SHAPES`.
        way: one of `WAYS`; with QLoRA the linear layers of the base have half a byte per weight.
    """
    model = make_network(SHAPES[shape], torch.device("meta"), block=4)
    if way == "full":
        return model
    adapted = get_peft_model(model, lora())
    if way == "QLoRA":
        for name, layer in adapted.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(".base_layer"):
                packed = torch.empty(layer.weight.numel() // 2, dtype=torch.uint8, device="meta")
                layer.weight = nn.Parameter(packed, requires_grad=False)
    return adapted


def memory_in_gib(model: nn.Module, processes: int, stage: int, deepspeed: bool) -> float:
    """Return the memory of one process in GiB."""
    args = AGRPOConfig("outputs", bf16=False)
    run = TrainingRun("", {}, args, None, model, processes, stage, deepspeed, "bf16", False)  # type: ignore[arg-type]
    alone = replace(run, processes=1) if stage == 0 else run
    return policy_memory(alone).total / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llada-8b")
    parser.add_argument("--processes", type=int, default=8)
    args = parser.parse_args()
    table = Table("", "trained", *(name for name, _, _ in SHARDINGS), title=f"{args.shape}, GiB per process")
    for way in WAYS:
        model = trained_model(args.shape, way)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        sizes = [memory_in_gib(model, args.processes, stage, deepspeed) for _, stage, deepspeed in SHARDINGS]
        table.add_row(way, f"{trained:,}", *(f"{size:.1f}" for size in sizes))
    Console().print(table)
    print(f"{parameter_count(trained_model(args.shape, 'full')):,} parameters; ZeRO on {args.processes} processes.")


if __name__ == "__main__":
    main()
