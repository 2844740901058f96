"""Rollouts with LoRA: computed by its layers, merged into their weights, or cast once under autocast.

    python recipes/benchmarks/adapters.py --shapes backbone-heavy --rounds 5        # float32
    python recipes/benchmarks/adapters.py --shapes backbone-heavy --autocast        # bfloat16
    python recipes/benchmarks/adapters.py --shapes tiny --kept                      # what bfloat16 weights keep of it

Random weights, LoRA of rank 64 on all linear layers but the head, as AGRPO has it. A merged rollout includes merging
and restoring. All modes draw with the same noise; the script counts the tokens that they have in common with LoRA
computed by its layers, and prints how far their log-probabilities are apart. With `--autocast` the base is in bfloat16
and the adapter in float32, as PEFT makes them.

`--kept` asks what is left of an adapter that is merged into bfloat16 weights. Adam moves every number of LoRA's second
matrix by about the learning rate in an update, so after n updates it holds n · 5e-6 with random signs at most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import arguments
import measure
from measure import Mode, Part, Work
from networks import SHAPES, Shape, lora, make_network

from trl_diffusion.adapters.merging import cast_adapter, merged_adapter, merged_bytes
from trl_diffusion.sampling import SamplingConfig, Trajectory, row_generators, sample

LEARNING_RATE = 5e-6
UPDATES = (1, 10, 100, 1000)
AS_TRAINED = "LoRA"


class Rollouts:
    """One network with an adapter, and one batch of prompts.

    Args:
        shape: of the network.
        args: of the command line.
    """

    def __init__(self, shape: Shape, args: argparse.Namespace):
        if args.autocast:
            shape = replace(shape, dtype=torch.bfloat16)
        network = make_network(shape, args.device, args.block, args.seed)
        with args.device:
            self.model = get_peft_model(network, lora()).eval()
        learn(self.model, args.updates, args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        prompts = torch.randint(network.config.num_tokens, (args.rows, args.prompt), generator=generator)
        self.prompts, self.seed, self.autocast = prompts.to(args.device), args.seed, args.autocast
        self.config = SamplingConfig(
            canvas_length=args.canvas, denoising_steps=args.steps, block_length=args.block, cache=args.cache
        )
        modes: dict[str, Callable[[], AbstractContextManager]] = {
            "no adapter": self.model.disable_adapter,
            AS_TRAINED: nullcontext,
            "LoRA, merged": partial(merged_adapter, self.model),
        }
        if args.autocast:
            modes["LoRA, cast once"] = partial(cast_adapter, self.model, torch.bfloat16)
        self.modes = modes

    def draw(self, name: str) -> Trajectory:
        """Run a rollout in a mode."""
        with ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast(self.prompts.device.type, torch.bfloat16))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.modes[name]())
            generators = row_generators(self.seed, rows=range(len(self.prompts)))
            return sample(self.model, self.prompts, torch.ones_like(self.prompts), self.config, generators)

    def work(self, name: str) -> Work:
        trajectory = self.draw(name)
        return Work(int(trajectory.row_forwards.sum()), int((trajectory.unmask_step >= 0).sum()))


@torch.no_grad()
def learn(model: torch.nn.Module, updates: int, seed: int) -> None:
    """Give LoRA's second matrices what they can hold after some updates with Adam."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            signs = torch.randint(2, weight.shape, generator=generator) * 2.0 - 1.0
            weight.copy_(updates * LEARNING_RATE * signs)


def compared(rollouts: Rollouts) -> Table:
    """Return how each mode's tokens and log-probabilities differ from those of LoRA computed by its layers."""
    table = Table("mode", "tokens in common", "largest difference of their log-probabilities", title="Against LoRA")
    expected = rollouts.draw(AS_TRAINED)
    for name in rollouts.modes:
        drawn = rollouts.draw(name)
        same = drawn.completion_ids == expected.completion_ids
        rows = same.all(1)  # of the others, later tokens were drawn on another canvas
        apart = (drawn.logps - expected.logps)[rows].abs()
        difference = f"{apart.max():.2g} (in {int(rows.sum())} equal rows)" if rows.any() else "no row is equal"
        table.add_row(name, f"{int(same.sum())} of {same.numel()}", difference)
    return table


@torch.no_grad()
def kept_in_bfloat16(shape: Shape, args: argparse.Namespace) -> Table:
    """Return which share of the adapter's change of the weights is left when it is merged into bfloat16 weights.

    It is the change that is made, projected on the change that was meant: 1 where nothing is lost.
    """
    table = Table("updates at 5e-6", "bfloat16 weights", "float32 weights", title="Share of the adapter that is left")
    model = get_peft_model(make_network(shape, args.device, args.block, args.seed), lora())
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for updates in UPDATES:
        learn(model, updates, args.seed)
        shares = {}
        for dtype in (torch.bfloat16, torch.float32):
            made = meant = 0.0
            for layer in adapted:
                weight, delta = layer.get_base_layer().weight.to(dtype), layer.get_delta_weight("default")
                change = (weight.float() + delta).to(dtype).float() - weight.float()
                made += float((change * delta).sum())
                meant += float((delta * delta).sum())
            shares[dtype] = made / meant
        table.add_row(str(updates), *(f"{100 * share:.1f} %" for share in shares.values()))
    return table


def main() -> None:
    parser = arguments.parser(__doc__.splitlines()[0], "adapters")
    arguments.add_sampling(parser)
    parser.add_argument("--cache", default="none", choices=["none", "prefix", "dual", "block"])
    parser.add_argument("--updates", type=int, default=100, help="updates that the adapter has learnt in")
    parser.add_argument(
        "--autocast", action="store_true", help="compute in bfloat16 by autocast, with bfloat16 weights"
    )
    parser.add_argument("--kept", action="store_true", help="only compute what bfloat16 weights keep of an adapter")
    args = parser.parse_args()
    for name in args.shapes:
        if args.kept:
            Console().print(kept_in_bfloat16(SHAPES[name], args))
            continue
        rollouts = Rollouts(SHAPES[name], args)
        modes = [Mode(mode, [Part(partial(rollouts.work, mode))]) for mode in rollouts.modes]
        results = measure.compare(modes, args.rounds, args.device)
        peak = measure.matmul_peak(args.device, SHAPES[name].dtype)
        merging = merge_seconds(rollouts, args)
        measure.report(
            f"adapters_{name}", f"Rollouts with LoRA, {name}", results, [AS_TRAINED], peak, args, merge_seconds=merging
        )
        copied = merged_bytes(rollouts.model) / 2**20
        print(f"Merging and restoring takes {merging:.3f} s and a copy of {copied:.1f} MiB.")
        Console(width=120).print(compared(rollouts))


def merge_seconds(rollouts: Rollouts, args: argparse.Namespace) -> float:
    """Return the median time of merging and restoring alone."""

    def merge() -> None:
        with merged_adapter(rollouts.model):
            pass

    return statistics.median(measure.time_and_peak(merge, args.device)[0] for _ in range(max(args.rounds, 3)))


if __name__ == "__main__":
    main()
