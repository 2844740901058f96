"""Scoring noised completions: targets gathered before the LM head, against full logits and their log-softmax.

    python recipes/benchmarks/scoring.py                                # two shapes for a CPU
    python recipes/benchmarks/scoring.py --shapes llada-8b              # on CUDA

Random weights. Without gradient as for old and reference log-probabilities, and with the gradient of a LoRA.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parent))
import arguments
import measure
import published
from measure import Mode, Part, Work
from networks import SHAPES, lora, make_network

from trl_diffusion.likelihood import Views, score_views
from trl_diffusion.models import family_of

FULL = "full logits"


class Scoring:
    """One network, one batch of completions and a view that hides a share of every canvas.

    Args:
        model: a native diffusion language model inside PEFT.
        share: of the canvas that is hidden and scored.
        args: of the command line.
    """

    def __init__(self, model, share: float, args: argparse.Namespace):
        self.model, family = model, family_of(model)
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(family.num_tokens, (args.rows, args.prompt + args.canvas), generator=generator)
        self.prompts, self.completions = ids.to(args.device).split([args.prompt, args.canvas], dim=1)
        self.mask = torch.ones_like(self.prompts)
        order = torch.rand(self.completions.shape, generator=generator).argsort(1).to(args.device)
        targets = order < round(share * args.canvas)
        self.views = Views(self.completions.masked_fill(targets, family.mask_token_id), targets)

    def full(self) -> torch.Tensor:
        logps = published.score(self.model, self.prompts, self.mask, self.views.canvas, self.completions)
        return logps * self.views.targets

    def gathered(self) -> torch.Tensor:
        return score_views(self.model, self.prompts, self.mask, self.completions, self.views).logps

    def run(self, score, gradient: bool) -> Work:
        """Score one view of every row."""
        with torch.set_grad_enabled(gradient):
            logps = score()
        if gradient:
            logps.sum().backward()
            self.model.zero_grad()
        return Work(len(logps), int(self.views.targets.sum()))

    def modes(self, gradient: bool) -> list[Mode]:
        ways = {FULL: self.full, "gathered": self.gathered}
        return [Mode(name, [Part(partial(self.run, score, gradient))]) for name, score in ways.items()]


def main() -> None:
    parser = arguments.parser(__doc__.splitlines()[0], "scoring")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.25, 1.0], help="shares of the canvas")
    parser.add_argument("--block", type=int, default=32, help="positions per block, for block-causal attention")
    arguments.add_compile(parser)
    args = parser.parse_args()

    for name in args.shapes:
        network = make_network(SHAPES[name], args.device, args.block, args.seed)
        if args.compile:
            network.model.compile()
        model = get_peft_model(network, lora())
        peak = measure.matmul_peak(args.device, SHAPES[name].dtype)
        for share in args.targets:
            scoring = Scoring(model, share, args)
            for gradient in (False, True):
                results = measure.compare(scoring.modes(gradient), args.rounds, args.device, args.compile)
                kind = "with gradient" if gradient else "without gradient"
                measure.report(
                    f"{name}_{share:g}_{kind.replace(' ', '_')}",
                    f"Scoring {100 * share:g} % of the canvas {kind}, {name}",
                    results,
                    [FULL],
                    peak,
                    args,
                )


if __name__ == "__main__":
    main()
