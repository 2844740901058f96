"""Time rollouts and passes with gradient with the elementwise work of the layers fused, and with stock layers.

    python recipes/benchmarks/fused.py --shapes backbone-heavy --rounds 5
    python recipes/benchmarks/fused.py --shapes tiny --canvas 8 --steps 4 --rounds 1    # to try it

Random weights; the same network with stock layers and with `fuse_elementwise`, alternating in one process. Compiling
takes place before anything is timed. The script also prints how far the logits of the two are apart.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import arguments
import measure
from measure import Mode, Part, Work
from networks import SHAPES, Shape, make_network

from trl_diffusion.models.fused import fuse_elementwise
from trl_diffusion.sampling import SamplingConfig, row_generators, sample

STOCK = "stock layers"


class Passes:
    """Two networks with the same weights, one of them fused, and one batch.

    Args:
        shape: of the networks.
        args: of the command line.
    """

    def __init__(self, shape: Shape, args: argparse.Namespace):
        stock = make_network(shape, args.device, args.block, args.seed).eval()
        self.networks = {STOCK: stock, "fused": copy.deepcopy(stock)}
        fuse_elementwise(self.networks["fused"])
        generator = torch.Generator().manual_seed(args.seed)
        tokens = torch.randint(stock.config.num_tokens, (args.rows, args.prompt + args.canvas), generator=generator)
        self.tokens, self.prompt, self.seed = tokens.to(args.device), args.prompt, args.seed
        self.config = SamplingConfig(
            canvas_length=args.canvas, denoising_steps=args.steps, block_length=args.block, cache=args.cache
        )

    def rollout(self, name: str) -> Work:
        """Write a canvas for every prompt."""
        prompts = self.tokens[:, : self.prompt]
        generators = row_generators(self.seed, rows=range(len(prompts)))
        trajectory = sample(self.networks[name], prompts, torch.ones_like(prompts), self.config, generators)
        return Work(int(trajectory.row_forwards.sum()), int((trajectory.unmask_step >= 0).sum()))

    def scored(self, name: str) -> Work:
        """Score a quarter of the canvas, and compute gradients of all weights."""
        network = self.networks[name]
        network.zero_grad(set_to_none=True)
        length = self.tokens.size(1) - self.prompt
        positions = torch.arange(self.prompt, self.prompt + max(length // 4, 1), device=self.tokens.device)
        targets = self.tokens[:, positions]
        scores = network(input_ids=self.tokens, positions=positions.expand_as(targets), targets=targets)
        scores.log_probs.sum().backward()
        return Work(len(targets), targets.numel())

    @torch.no_grad()
    def apart(self) -> float:
        """Return the largest difference of the two networks' logits, relative to their largest logit."""
        first, second = (network(input_ids=self.tokens).logits.float() for network in self.networks.values())
        return float((first - second).abs().max() / first.abs().max())


def main() -> None:
    parser = arguments.parser(__doc__.splitlines()[0], "fused")
    arguments.add_sampling(parser)
    parser.add_argument("--cache", default="none", choices=["none", "prefix", "dual", "block"])
    args = parser.parse_args()
    for name in args.shapes:
        passes = Passes(SHAPES[name], args)
        table = Table("logits of fused and stock layers differ by", title=name)
        table.add_row(f"{passes.apart():.1g} of the largest")
        for kind, run in (("Rollouts", passes.rollout), ("Passes with gradient", passes.scored)):
            modes = [Mode(mode, [Part(partial(run, mode))]) for mode in passes.networks]
            for mode in passes.networks:
                run(mode)  # compiles
            results = measure.compare(modes, args.rounds, args.device)
            peak = measure.matmul_peak(args.device, SHAPES[name].dtype)
            file = f"fused_{kind.split()[0].lower()}_{name}"
            measure.report(file, f"{kind}, {name}", results, [STOCK], peak, args)
        Console().print(table)


if __name__ == "__main__":
    main()
