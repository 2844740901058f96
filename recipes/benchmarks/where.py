"""Measure where an exact rollout spends its time, and the speed of matrix products of its layers' shapes.

    OMP_NUM_THREADS=1 python recipes/benchmarks/where.py --shapes backbone-heavy --steps 16
    python recipes/benchmarks/where.py --shapes tiny --canvas 8 --block 4 --steps 4      # to try it

A profile of one rollout gives the time of each operator; those of the same kind are added up. Then the rollout, a
large product of matrices, and products of the shapes that the layers multiply are timed in turn. On a CPU these times
are the processor's, because other programs then count less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import arguments
import measure
from networks import SHAPES, Shape
from profiled import kernel_times
from rollout import Rollouts

PEAK, LARGE = "a large one", {"cpu": 2048, "cuda": 8192}
# By the first of these words that an operator's name holds.
KINDS = {
    "scaled_dot_product": "attention",
    "mm": "products of matrices",
    "silu": "SiLU",
    "rsqrt": "norms",
    "pow": "norms",
    "mean": "norms",
    "neg": "rotation",
    "cat": "rotation",
    "mul": "mul and add, of norms, rotation, gate and residuals",
    "add": "mul and add, of norms, rotation, gate and residuals",
    "copy_": "copies",
}


def shares(rollouts: Rollouts, device: torch.device) -> dict[str, float]:
    """Return the share of a rollout that each kind of operator takes."""
    _, operators = kernel_times(partial(rollouts.whole, rollouts.modes["exact"]), device, count=1000)
    found: Counter[str] = Counter()
    for operator in operators:
        kind = next((kind for word, kind in KINDS.items() if word in operator["name"]), "everything else")
        found[kind] += operator["share"]
    return dict(found.most_common())


def products(shape: Shape, args: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """Return the products of matrices to time, as (rows, inner size, columns)."""
    tokens, hidden, large = args.rows * (args.prompt + args.canvas), shape.hidden, LARGE[args.device.type]
    return {
        PEAK: (large, large, large),
        "queries, keys, values, output": (tokens, hidden, hidden),
        "gate and up": (tokens, hidden, 3 * hidden),
        "down": (tokens, 3 * hidden, hidden),
    }


def seconds(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Return the seconds of a run, the processor's on a CPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    measure.synchronise(device)
    start = clock()
    for _ in range(times):
        run()
    measure.synchronise(device)
    return (clock() - start) / times


def rate(sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP per second of a linear layer of these sizes."""
    rows, inner, columns = sizes
    states, weight = (torch.randn(length, inner, device=device).to(dtype) for length in (rows, columns))
    flop = 2 * rows * inner * columns
    run = partial(torch.nn.functional.linear, states, weight)
    run()
    return flop / seconds(run, device, times=max(int(1e10 / flop), 1))


def spread(values: Sequence[float]) -> str:
    """Return the median in percent, with the smallest and the largest."""
    return f"{100 * statistics.median(values):.0f} % ({100 * min(values):.0f}–{100 * max(values):.0f})"


def main() -> None:
    parser = arguments.parser(__doc__.splitlines()[0], "where")
    arguments.add_sampling(parser)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--unmasking", choices=("low_confidence", "random"), default="random")
    args = parser.parse_args()
    args.modes = ("exact",)
    for name in args.shapes:
        shape, rollouts = SHAPES[name], Rollouts(SHAPES[name], args)
        write = partial(rollouts.whole, rollouts.modes["exact"])
        _, flop = measure.count_flop(write)
        table = Table("", "of the rollout", title=name)
        for kind, share in shares(rollouts, args.device).items():
            table.add_row(kind, f"{100 * share:.1f} %")
        reached: dict[str, list[float]] = {"the rollout": []}
        for _ in range(args.rounds):
            rates = {what: rate(sizes, args.device, shape.dtype) for what, sizes in products(shape, args).items()}
            rates["the rollout"] = flop / seconds(write, args.device)
            for what, value in rates.items():
                reached.setdefault(what, []).append(value / rates[PEAK])
        other = Table(
            "", "rows × inner × columns", "of the peak", title=f"{name}, peak {rates[PEAK] / 1e12:.3g} TFLOP/s"
        )
        for what, values in reached.items():
            sizes = " × ".join(map(str, products(shape, args).get(what, ())))
            other.add_row(what, sizes, spread(values))
        for made in (table, other):
            Console().print(made)


if __name__ == "__main__":
    main()
