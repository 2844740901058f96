r"""Measures the premises of the methods' claims on the tasks of the core table, and stores them.

    OMP_NUM_THREADS=2 python recipes/benchmarks/premises.py
    OMP_NUM_THREADS=2 python recipes/benchmarks/premises.py --tasks word_problems

The results that the documentation shows are made by

    python recipes/benchmarks/premises.py --output recipes/benchmarks/results/premises.json
    python recipes/benchmarks/premises.py --tasks sudoku_sweeps countdown_search \
        --output recipes/benchmarks/results/premises_puzzles.json

A premise is what must hold for a claim to have a chance: for example that failed completions are more uncertain than
successful ones, or that a few steps hold most of the gradient. Completions are drawn as in training, 8 of each
held-out problem. It prints a table and writes the numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from comparison import premises
from comparison.core import TASKS as CORE_TASKS
from comparison.premises_table import premises_table
from comparison.run import generated
from comparison.settings import setting_of
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS

UNMASKING = ("max_prob", "random")
COMPLETIONS_PER_PROMPT, CHOSEN_STEPS = 8, 4
MASK_SHARES, MASK_DRAWS = (0.125, 0.25, 0.5, 0.75, 1.0), 16


def measure(
    task_name: str, unmasking: str, problems: int, completions: int, continuations: int, seed: int
) -> dict[str, Any]:
    """Measure all premises of a task.

    Args:
        task_name: the task, whose setting says which model.
        unmasking: how positions are chosen in rollouts.
        problems: held-out problems, 8 completions each.
        completions: how many of them have gradients and masks measured, and of how many prompts at most a right and a
            failed one are continued.
        continuations: N, of each of these at each block.
        seed: of all random streams.
    """
    setting, task = setting_of(task_name), TASKS[task_name]
    model = AutoModelForCausalLM.from_pretrained(setting.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(setting.model, padding_side="left")
    rollouts = SamplingConfig(
        setting.canvas_length,
        setting.denoising_steps,
        setting.block_length,
        unmasking=unmasking,
        record_signals=True,
    )
    rows = generated(task, "test", problems, seed)
    batch = premises.roll_out(model, tokenizer, task, rows, COMPLETIONS_PER_PROMPT, rollouts, seed)
    some = torch.arange(len(batch.rows))[:: max(1, len(batch.rows) // completions)][:completions]
    right, failed = premises.right_and_failed(batch, completions)
    return {
        **premises.outcomes(batch),
        "uncertain_postponed": premises.uncertain_postponed(batch),
        "auc": premises.signal_auc(batch),
        "gradient_share": premises.gradient_shares(batch, premises.gradient_norms(batch, some), some, CHOSEN_STEPS),
        "continuations": {
            "right": premises.continuation_success(batch, right, continuations, seed),
            "failed": premises.continuation_success(batch, failed, continuations, seed),
        },
        "elbo_deviation": premises.elbo_deviation(batch, some, MASK_SHARES, MASK_DRAWS, seed),
        "cosine": premises.surrogate_cosines(batch, MASK_DRAWS, seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    generating = [name for name, task in TASKS.items() if task.generate is not None]
    parser.add_argument("--tasks", nargs="+", default=CORE_TASKS, choices=generating)
    parser.add_argument("--problems", type=int, default=64, help="held-out problems, 8 completions each")
    parser.add_argument("--completions", type=int, default=32, help="with gradients and masks; prompts that continue")
    parser.add_argument("--continuations", type=int, default=32, help="of each completion at each block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/premises.json"))
    args = parser.parse_args()
    start, sizes = time.perf_counter(), (args.problems, args.completions, args.continuations, args.seed)
    cases = [(task, unmasking) for task in args.tasks for unmasking in UNMASKING]
    found = {f"{task}, {rule}": measure(task, rule, *sizes) for task, rule in track(cases, description="premises")}
    head, lines = premises_table(found)
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    Console(width=160).print(table)
    setting = {name: getattr(args, name) for name in ("problems", "completions", "continuations", "seed")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"setting": setting, **found}, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s; {args.output}")


if __name__ == "__main__":
    main()
