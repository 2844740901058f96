"""Time rollouts whose steps run through a compiled network (`rollout_compile`), and through the network as it is.

    python recipes/benchmarks/compiled.py --shapes backbone-heavy --rounds 5
    python recipes/benchmarks/compiled.py --shapes tiny --canvas 8 --block 4 --steps 4 --rounds 1    # to try it

Random weights; with the `dual` cache, and with the exact cache of a block-causal network of the same sizes. Both ways
alternate in one process, and compiling takes place before anything is timed. The script also prints how many tokens
are equal, and by how much their log-probabilities differ.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import arguments
import measure
from measure import Mode, Part
from networks import SHAPES
from rollout import Rollouts

from trl_diffusion.sampling import SamplingConfig, Trajectory, sample

AS_IT_IS = "as it is"


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
    table = Table("", "tokens equal", "log-probabilities differ by at most")
    for name in args.shapes:
        shape, peak = SHAPES[name], measure.matmul_peak(args.device, SHAPES[name].dtype)
        for each in [shape] if shape.block_causal else [shape, replace(shape, block_causal=True)]:
            rollouts = Rollouts(each, args)
            ((cache, config),) = rollouts.modes.items()
            configs = {AS_IT_IS: config, "compiled": replace(config, rollout_compile=True)}
            plain, compiled = (drawn(rollouts, each) for each in configs.values())
            equal = plain.completion_ids == compiled.completion_ids
            differ = float((plain.logps - compiled.logps).abs()[equal].max())
            table.add_row(f"{name}, {cache}", f"{int(equal.sum())} of {equal.numel()}", f"{differ:.1g}")
            modes = [Mode(mode, [Part(partial(rollouts.whole, each))]) for mode, each in configs.items()]
            results = measure.compare(modes, args.rounds, args.device, compiles=True)
            measure.report(f"compiled_{cache}_{name}", f"Rollouts, {name}, {cache}", results, [AS_IT_IS], peak, args)
    Console().print(table)


if __name__ == "__main__":
    main()
