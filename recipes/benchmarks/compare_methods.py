"""Compares methods at equal compute: the bundled model, its tasks, several seeds.

    python recipes/benchmarks/compare_methods.py
    python recipes/benchmarks/compare_methods.py --tasks countdown --arms diffu_grpo sapo_3 --seeds 0 1 --budget 5000

One forward unit is one forward pass of one row, prompt and whole canvas; a pass that computes a part of the columns
counts in proportion. A pass with gradient counts 3, old and reference log-probabilities 1 each, SAPO's
continuations by their own length. Every arm trains until it has spent the budget; the last update may exceed it. With
`--max_updates` every arm trains for that many updates instead.

Arms with the same seed see the same prompts in the same order and are compared in pairs. Each run is written to
`OUTPUT/runs/TASK/ARM/SEED.json` when it ends; started again, the script continues with the runs that are missing. It
ends with `summary.json`, `results.md` (the tables), and for each task a plot of accuracies and one of learning curves.

A new method joins by an entry in `ARMS`, in `comparison/arms.py`; a task with a generator is among the choices.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path

from comparison.arms import ARMS
from comparison.figures import accuracy, learning_curves
from comparison.run import Job, Length, run_all
from comparison.settings import SHORT, setting_of
from comparison.summary import families, markdown, summarise, tables
from rich.console import Console
from rich.table import Table

from trl_diffusion.tasks import TASKS


def main() -> None:
    generated = [name for name, task in TASKS.items() if task.generate is not None and setting_of(name) is SHORT]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["word_problems", "countdown"], choices=sorted(generated))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", type=float, default=16_000, help="forward units per run")
    parser.add_argument("--max_updates", type=int, help="updates per run, instead of the budget")
    parser.add_argument("--eval_size", type=int, default=256, help="held-out problems")
    parser.add_argument("--learning_rate", type=float, help="for all arms, instead of their own")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare_methods"))
    args = parser.parse_args()

    start = time.perf_counter()
    chosen = [(task, "base", 0) for task in args.tasks]
    chosen += [(task, arm, seed) for seed, task, arm in product(args.seeds, args.tasks, args.arms)]
    jobs = [Job(*each, args.learning_rate, args.output_dir / "runs" / each[0] / each[1]) for each in chosen]
    runs = run_all(jobs, Length(args.budget, args.eval_size, args.max_updates), args.workers)
    rows = summarise(runs)
    spent = f"{args.max_updates} updates" if args.max_updates else f"{args.budget:.0f} forward units"
    for (task, baselines), own in families(rows).items():
        for head, lines in tables(own, baselines):
            table = Table(*head, title=f"{task}: {spent} per run, seeds {args.seeds}")
            for line in lines:
                table.add_row(*line)
            Console(width=180).print(table)
    (args.output_dir / "summary.json").write_text(json.dumps(rows, indent=1))
    (args.output_dir / "results.md").write_text(markdown(rows))
    for task in args.tasks:
        of_task = {names: own for (name, names), own in families(rows).items() if name == task}
        panels = {f"compared with {' and '.join(names)}": own for names, own in of_task.items()}
        accuracy(panels, args.output_dir / f"{task}_accuracy.png")
        learning_curves(runs, task, args.output_dir / f"{task}.png")
    print(f"{time.perf_counter() - start:.0f} s; tables, plots and runs: {args.output_dir}")


if __name__ == "__main__":
    main()
