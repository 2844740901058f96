"""Rollouts in the library's modes against the published schedule.

    python recipes/benchmarks/rollout.py                                        # two shapes for a CPU
    python recipes/benchmarks/rollout.py --shapes llada-8b sdar-8b --rows 8     # on CUDA

Random weights and prompts; no text ends, so every row fills its canvas. A denoising step of the published schedule
always costs the same, so a few are timed and the rollout is extrapolated (marked with a tilde); every other mode runs
whole. Block-causal rollouts of a LLaDA shape are those of an SDAR network with the same sizes.

Two batches of uneven rows show what else the exact modes save: texts that end after 1/B, 2/B … B/B of the blocks, and
prompts that are as much shorter (the published schedule pads them).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import arguments
import measure
import published
from measure import Measured, Mode, Part, Work
from networks import SHAPES, Shape, make_network

from trl_diffusion.models import family_of
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators, sample

YARDSTICKS = ("LLaDA/d1", "lean")
MODES = ("exact", "prefix", "dual", "block-causal")
UNEVEN = ("uneven texts", "uneven prompts")


class Rollouts:
    """One network and one batch of prompts, from which every mode draws.

    Args:
        shape: of the network.
        args: of the command line.
    """

    def __init__(self, shape: Shape, args: argparse.Namespace):
        self.model = make_network(shape, args.device, args.block, args.seed).eval()
        self.family, self.seed = family_of(self.model), args.seed
        generator = torch.Generator().manual_seed(args.seed)
        prompts = torch.randint(self.family.num_tokens, (args.rows, args.prompt), generator=generator)
        self.prompts = prompts.to(args.device)
        self.mask = torch.ones_like(self.prompts)
        self.config = SamplingConfig(
            canvas_length=args.canvas,
            denoising_steps=args.steps,
            block_length=args.block,
            temperature=args.temperature,
            unmasking=args.unmasking,
        )
        caches = (
            {"block-causal": "block"} if shape.block_causal else {"exact": "none", "prefix": "prefix", "dual": "dual"}
        )
        self.modes = {name: replace(self.config, cache=cache) for name, cache in caches.items() if name in args.modes}

    def plain(self, lean: bool, steps: int) -> Work:
        """Run the first `steps` steps of the published schedule."""
        canvas = self.published(self.config, lean, steps)
        return Work(steps * len(canvas), int((canvas != self.family.mask_token_id).sum()))

    def published(self, config: SamplingConfig, lean: bool, steps: int | None = None) -> torch.Tensor:
        generator = torch.Generator(self.prompts.device).manual_seed(self.seed)
        return published.rollout(self.model, self.prompts, self.mask, config, generator, lean, steps)

    def whole(self, config: SamplingConfig, kind: str = "") -> Work:
        """Run a rollout of the library."""
        mask, state = self.mask, None
        if kind == "uneven texts":
            state = CanvasState.empty(
                len(self.prompts), config.canvas_length, self.family.mask_token_id, self.prompts.device
            )
            for row, end in enumerate(self.shares(config.num_blocks)):
                state.canvas[row, end * config.block_length - 1] = self.family.tail_token_id
        if kind == "uneven prompts":
            columns = torch.arange(mask.size(1), 0, -1, device=mask.device)
            mask = (columns <= torch.tensor(self.shares(mask.size(1)), device=mask.device).unsqueeze(1)).long()
        trajectory = sample(self.model, self.prompts, mask, config, self.generators(), state=state)
        return Work(int(trajectory.row_forwards.sum()), int((trajectory.unmask_step >= 0).sum()))

    def shares(self, size: int) -> list[int]:
        """1/B, 2/B … B/B of a size, at least 1."""
        rows = len(self.prompts)
        return [max((row + 1) * size // rows, 1) for row in range(rows)]

    def generators(self):
        return row_generators(self.seed, rows=range(len(self.prompts)))

    def equal_greedy_tokens(self) -> dict[str, str]:
        """On a canvas of two blocks, written in two steps each: which share of the tokens a mode has in common with
        the published schedule, in either form. All but the approximate caches must have all."""
        canvas = 2 * self.config.block_length
        greedy: dict[str, Any] = dict(
            canvas_length=canvas, denoising_steps=4, temperature=0.0, unmasking="low_confidence"
        )
        equal = {}
        for yardstick in YARDSTICKS:
            plain = self.published(replace(self.config, **greedy), lean=yardstick == "lean")
            for name, config in self.modes.items():
                ours = sample(self.model, self.prompts, self.mask, replace(config, **greedy), self.generators())
                equal[f"{name}, {yardstick}"] = f"{int((ours.completion_ids == plain).sum())} of {plain.numel()}"
        return equal


def compare(networks: list[Rollouts], args: argparse.Namespace) -> list[Measured]:
    """Time every mode of every network; the first one also runs the published schedule."""
    times = args.steps / args.published_steps
    modes = [
        Mode(name, [Part(partial(networks[0].plain, name == "lean", args.published_steps), times)])
        for name in YARDSTICKS
    ]
    for network in networks:
        for name, config in network.modes.items():
            modes.append(Mode(name, [Part(partial(network.whole, config))]))
            if not config.approximate:
                modes += [Mode(f"{name}, {kind}", [Part(partial(network.whole, config, kind))]) for kind in UNEVEN]
    return measure.compare(modes, args.rounds, args.device)


def gains(results: list[Measured]) -> Table:
    """Return how much less time uneven rows take than full ones in the same mode."""
    by_name = {result.name: result for result in results}
    table = Table("mode", *(f"full rows ÷ {kind}" for kind in UNEVEN), title="Further gain of uneven rows")
    for name in (name for name in by_name if f"{name}, {UNEVEN[0]}" in by_name):
        ratios = [by_name[name].slower_than(by_name[f"{name}, {kind}"]) for kind in UNEVEN]
        table.add_row(name, *(f"{statistics.median(values):.2f}" for values in ratios))
    return table


def main() -> None:
    parser = arguments.parser(__doc__.splitlines()[0], "rollout")
    arguments.add_sampling(parser)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--unmasking", choices=("low_confidence", "random"), default="low_confidence")
    args = parser.parse_args()

    for name in args.shapes:
        shape = SHAPES[name]
        twins = (
            [shape]
            if shape.block_causal or "block-causal" not in args.modes
            else [shape, replace(shape, block_causal=True)]
        )
        networks = [Rollouts(each, args) for each in twins]
        peak = measure.matmul_peak(args.device, shape.dtype)
        equal = {mode: tokens for network in networks for mode, tokens in network.equal_greedy_tokens().items()}
        Console().print(f"{name}, greedy tokens equal to those of the published schedule: {equal}")
        results = compare(networks, args)
        uneven = [result for result in results if result.name.endswith(UNEVEN)]
        measure.report(
            f"{name}_{args.unmasking}",
            f"Rollout, {name}, {args.unmasking}",
            [result for result in results if result not in uneven],
            YARDSTICKS,
            peak,
            args,
            equal_greedy_tokens=equal,
            uneven=measure.summary(uneven, [], peak),
        )
        Console().print(gains(results))


if __name__ == "__main__":
    main()
