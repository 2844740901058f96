"""Time rollouts whose steps run through a compiled network (`rollout_compile`), and through the network as it is.

    OMP_NUM_THREADS=1 python recipes/benchmarks/compiled.py --shapes backbone-heavy --rounds 5
    python recipes/benchmarks/compiled.py --shapes tiny --canvas 8 --block 4 --steps 4 --rounds 1    # to try it

Random weights; with the `dual` cache, and with the exact cache of a block-causal network of the same sizes. Both ways
alternate in one process, and compiling takes place before anything is timed. On a CPU seconds are the processor's. The
script also prints how many tokens are equal, and by how much their log-probabilities differ.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import arguments
from networks import SHAPES
from rollout import Rollouts
from where import seconds

from trl_diffusion.sampling import SamplingConfig, Trajectory, sample


def drawn(rollouts: Rollouts, config: SamplingConfig) -> Trajectory:
    """Write the canvases of a batch."""
    return sample(rollouts.model, rollouts.prompts, rollouts.mask, config, rollouts.generators())


def main() -> None:
    parser = arguments.parser(__doc__.splitlines()[0], "compiled")
    arguments.add_sampling(parser)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--unmasking", choices=("low_confidence", "random"), default="low_confidence")
    args = parser.parse_args()
    args.modes = ("dual", "block-causal")
    table = Table("", "as it is, s", "compiled, s", "times as fast", "tokens equal", "log-probabilities differ by")
    for name in args.shapes:
        for shape in [SHAPES[name], replace(SHAPES[name], block_causal=True)]:
            rollouts = Rollouts(shape, args)
            ((cache, config),) = rollouts.modes.items()
            ways = [partial(drawn, rollouts, replace(config, rollout_compile=on)) for on in (False, True)]
            plain, compiled = (way() for way in ways)
            for _ in range(2):  # on CUDA a graph is recorded in the second rollout
                ways[1]()
            equal = plain.completion_ids == compiled.completion_ids
            differ = float((plain.logps - compiled.logps).abs()[equal].max())
            rounds = [[seconds(way, args.device) for way in ways] for _ in range(args.rounds)]
            ratios = [as_it_is / faster for as_it_is, faster in rounds]
            table.add_row(
                f"{name}, {cache}",
                *(f"{statistics.median(column):.3g}" for column in zip(*rounds, strict=True)),
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                f"{int(equal.sum())} of {equal.numel()}",
                f"{differ:.1g}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
