"""The core table: what the claims of the papers come to, on tasks in which their premises hold.

    python recipes/benchmarks/core_table.py
    python recipes/benchmarks/core_table.py --tasks chained_sums --arms roec_cm --seeds 20
    python recipes/benchmarks/core_table.py --tasks sudoku_sweeps --arms agrpo agrpo_curriculum roec_cm

The arms are those of `comparison/core.py`. It runs in three rounds, and skips every run that is on disk:

1. Learning rates: every arm at three rates, on seeds that are not used again, and at one more where the best is the
   lowest or the highest. `--learning_rates FILE` takes those of a file, by default the ones stored with the results,
   which were found with the default budget.
2. Every arm and its baselines with the first `--seeds` seeds. Arms of one seed see the same prompts in the same order.
3. More seeds, in steps of ten up to `--most_seeds`, for the pairs that are undecided: those whose 95 % interval holds
   0 and reaches beyond ± 1.5 points.

It ends with the tables, and with `core_table.json`, which holds every run in the folder of this length and of these
learning rates, without its learning curve. `claims.py --take` adds them to the stored results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

from comparison.core import (
    CORE,
    FIRST_RATES,
    ON_CHAINS,
    PUZZLES,
    RATE_OF,
    TASKS,
    TUNING_SEEDS,
    TUNING_TASK,
    Tuned,
    best_learning_rate,
    next_learning_rate,
)
from comparison.core_summary import Runs, a_run_a_line, core_tables, fewer_steps_table, undecided
from comparison.run import Job, Length, generated, is_of, keep, run_all
from comparison.summary import markdown_table
from rich.console import Console
from rich.table import Table

from trl_diffusion.tasks import TASKS as ALL_TASKS

STORED = Path(__file__).parent / "results" / "learning_rates.json"
MORE_SEEDS = 10


def tune(known: Tuned, tasks: Sequence[str], arms: Sequence[str], folder: Path, length: Length, workers: int) -> Tuned:
    """Measure the arms at the learning rates of the grid with the tuning seeds, as far as that is not known yet."""
    found = deepcopy(known)
    to_try = [*product(tasks, arms, FIRST_RATES)]
    while to_try:
        for task, arm, rate in to_try:
            found.setdefault(task, {}).setdefault(arm, {}).setdefault(f"{rate:g}", {})
        jobs = [
            Job(task, arm, seed, rate, folder / "tuning" / task / arm / f"{rate:g}", True)
            for seed, (task, arm, rate) in product(TUNING_SEEDS, to_try)
            if str(seed) not in found[task][arm][f"{rate:g}"]
        ]
        for run in run_all(jobs, length, workers):
            measured = found[run["task"]][run["arm"]][f"{run['learning_rate']:g}"]
            measured[str(run["seed"])] = 100 * run["sampled_accuracy"]
        beyond = {case: next_learning_rate(found, *case) for case in product(tasks, arms)}
        to_try = [(*case, rate) for case, rate in beyond.items() if rate is not None]
    return found


def with_baselines(arms: Sequence[str]) -> list[str]:
    """Return arms and the arms that they are compared with, in the order of the table."""
    wanted = set(arms) | {baseline for arm in arms for baseline in CORE[arm].baselines}
    return [arm for arm in CORE if arm in wanted]


def impossible(tasks: Sequence[str], arms: Sequence[str]) -> str | None:
    """Return an error message if arms train in the order of difficulty and a task's problems have none."""
    ordered = [arm for arm in arms if CORE[arm].curriculum is not None]
    without = [task for task in tasks if "difficulty" not in generated(ALL_TASKS[task], "train", 1, 0).column_names]
    if not (ordered and without):
        return None
    return f"{', '.join(ordered)}: trained in the order of difficulty; problems of {', '.join(without)} have none."


def parsed() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=[*TASKS, *PUZZLES])
    parser.add_argument("--arms", nargs="+", default=ON_CHAINS, choices=list(CORE))
    parser.add_argument("--seeds", type=int, default=20, help="seeds of every arm")
    parser.add_argument("--most_seeds", type=int, default=60, help="seeds of an undecided pair at most")
    parser.add_argument("--learning_rates", type=Path, default=STORED, help="missing arms are tuned")
    parser.add_argument("--stored", type=Path, help="a core_table.json, whose runs are taken and not repeated")
    parser.add_argument("--budget", type=float, default=Length.budget, help="forward units per run")
    parser.add_argument("--eval_size", type=int, default=Length.eval_size, help="held-out problems")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/core_table"))
    args = parser.parse_args()
    args.arms = with_baselines(args.arms)
    if message := impossible(args.tasks, args.arms):
        parser.error(message)
    for path in (args.learning_rates, args.stored):
        if path not in (None, STORED) and not path.is_file():
            parser.error(f"{path} is no file; without the option, the learning rates are those of {STORED}.")
    return args


def more_seeds(runs: Runs, most: int) -> dict[tuple[str, str], int]:
    """Return the seeds that arms of a task need next: those of undecided pairs, ten more than both have."""
    wanted: dict[tuple[str, str], int] = {}
    for pair in undecided(runs, most):
        for arm in (pair.arm, pair.baseline):
            wanted[pair.task, arm] = max(min(pair.seeds + MORE_SEEDS, most), wanted.get((pair.task, arm), 0))
    return wanted


def show_and_write(runs: Runs, folder: Path) -> None:
    """Print the tables, and write them to `results.md`."""
    text = []
    for title, head, lines in [*core_tables(runs), fewer_steps_table(runs)]:
        table = Table(*head, title=title)
        for line in lines:
            table.add_row(*line)
        Console(width=180).print(table)
        text += [f"### {title}\n", markdown_table(head, lines), ""]
    (folder / "results.md").write_text("\n".join(text))


def main() -> None:
    args, start = parsed(), time.perf_counter()
    length = Length(args.budget, args.eval_size)
    known = json.loads(args.learning_rates.read_text()) if args.learning_rates.exists() else {}
    own_rate = list(dict.fromkeys(RATE_OF.get(arm, arm) for arm in args.arms))
    tuning_tasks = list(dict.fromkeys(TUNING_TASK[task] for task in args.tasks))
    tuned = tune(known, tuning_tasks, own_rate, args.output_dir, length, args.workers)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "learning_rates.json").write_text(json.dumps(tuned, indent=1))

    def job(task: str, arm: str, seed: int) -> Job:
        return Job(task, arm, seed, best_learning_rate(tuned, task, arm), args.output_dir / "runs" / task / arm)

    def is_current(run: dict[str, Any]) -> bool:
        """Return whether a run has this length and the learning rate that is chosen now."""
        return is_of(run, job(run["task"], run["arm"], run["seed"]), length)

    for run in filter(is_current, json.loads(args.stored.read_text()) if args.stored is not None else []):
        keep(job(run["task"], run["arm"], run["seed"]), run)
    jobs = [job(task, "base", 0) for task in args.tasks]
    jobs += [job(task, arm, seed) for seed, task, arm in product(range(args.seeds), args.tasks, args.arms)]
    runs = Runs(run_all(jobs, length, args.workers))
    while wanted := more_seeds(runs, args.most_seeds):
        more = [job(*arm, seed) for arm, most in wanted.items() for seed in range(runs.seeds(*arm), most)]
        runs = Runs([*runs.all, *run_all(more, length, args.workers)])
    on_disk = [json.loads(path.read_text()) for path in sorted((args.output_dir / "runs").glob("*/*/*.json"))]
    (args.output_dir / "core_table.json").write_text(a_run_a_line(filter(is_current, on_disk)))
    show_and_write(runs, args.output_dir)
    print(f"{time.perf_counter() - start:.0f} s; tables and runs: {args.output_dir}")


if __name__ == "__main__":
    main()
