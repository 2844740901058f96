"""Compare methods at equal compute: the embedded model, its tasks, several seeds.

    python recipes/benchmarks/compare_methods.py
    python recipes/benchmarks/compare_methods.py --tasks countdown --arms diffu_grpo sapo_3 --seeds 0 1 --budget 5000

One forward unit is one forward pass of one row, prompt and whole canvas; a pass that computes a part of the columns
counts in proportion. A pass with gradient counts 3, old and reference log-probabilities 1 each, SAPO's
continuations by their own length. Every arm trains until it has spent the budget; the last update may exceed it. With
`--max_updates` every arm trains for that many updates instead.

Arms with the same seed see the same prompts in the same order and are compared in pairs. Each run is written to
`OUTPUT/runs/TASK/ARM/SEED.json` when it ends; started again, the script goes on with the runs that are missing. It
ends with `summary.json`, `results.md` (the tables) and a learning-curve plot per task.

A new method joins by an entry in `ARMS`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from statistics_of_runs import sign_flip_p_value, standard_error

CANVAS_LENGTH, BLOCK_LENGTH, DENOISING_STEPS = 32, 8, 16
# The accuracy after training is measured at S, S/2 and S/4 denoising steps.
EVALUATED_STEPS = (DENOISING_STEPS, DENOISING_STEPS // 2, DENOISING_STEPS // 4)
COMMON = dict(
    per_device_train_batch_size=32,
    num_generations=8,
    max_completion_length=CANVAS_LENGTH,
    block_length=BLOCK_LENGTH,
    denoising_steps=DENOISING_STEPS,
    temperature=1.0,
    learning_rate=3e-4,
    lr_scheduler_type="constant",
    warmup_steps=0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    scale_rewards="none",
    logging_steps=1,
)
LOGGED = (
    "forward_units",
    "reward",
    "frac_reward_zero_std",
    "step_aware/probed_share",
    "step_aware/process_reward_mean",
    "step_aware/process_reward_std",
    "step_aware/forward_units",
    "clip_ratio/region_mean",
)
# All trajectory arms share reduction, learning rate, clipping and K = M.
TRAJECTORY = dict(
    epsilon=0.2,
    num_iterations=2,
    num_mc_samples=4,
    step_scope="exact",
    step_reduction="mean",
    loss_type="grpo",
    top_k=0,
    top_p=1.0,
    beta=0.0,
)
DIFFU = dict(num_iterations=4, epsilon=0.5, beta=0.04)
NOISED = dict(num_iterations=4)
# With the paper's α of 0.04 and rewards of 0 and 1, one completion of a prompt would take all the weight.
DMPO = NOISED | dict(num_mc_samples=2, alpha=0.5)


@dataclass(frozen=True)
class Arm:
    """A method and its settings.

    Args:
        method: a name in `trl_diffusion.trainers.METHODS`.
        baselines: the arms it is compared with.
        settings: fields of its config besides `COMMON`.
        step_aware: arguments of `StepAwareReward`; `None` without.
        selector: a step selector that has no name in the config.
    """

    method: str
    baselines: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    step_aware: dict[str, Any] | None = None
    selector: Callable | None = None


def _sapo(**settings: Any) -> Arm:
    return Arm("diffu_grpo", ("diffu_grpo",), DIFFU, settings)


def _selected(selector: str, **settings: Any) -> Arm:
    return Arm("atpo", ("uniform", "random"), TRAJECTORY | {"step_selector": selector} | settings)


def _drawn(draws: str) -> Arm:
    return Arm("agrpo", ("uniform", "random"), TRAJECTORY | {"step_draws": draws})


def _tuned(method: str, learning_rate: float, **settings: Any) -> Arm:
    """An arm of the comparison of all methods, each at its own learning rate (see `docs/pages/results.md`)."""
    return Arm(method, ("diffu_grpo_tuned", "agrpo_tuned"), settings | {"learning_rate": learning_rate})


def _cached(cache: str, correction: str) -> Arm:
    """`agrpo_tuned` with rollouts under an approximate cache."""
    settings = {"learning_rate": 1e-4, "step_draws": "uniform", "cache": cache, "rollout_correction": correction}
    return Arm("agrpo", ("agrpo_tuned",), TRAJECTORY | settings)


def fixed_steps(signals, count: int, noise):
    """The middle of each of K equal parts in every rollout: with K = 4 of 16 steps, the third step of every block."""
    from trl_diffusion.credit import StepSelection

    steps = signals.entropy.size(1)
    middle = [[(2 * part + 1) * steps // (2 * count) for part in range(count)]]
    return StepSelection(signals.num_candidates.new_tensor(middle))


ARMS: dict[str, Arm] = {
    "diffu_grpo": Arm("diffu_grpo", ("diffu_grpo",), DIFFU),
    "sapo_1": _sapo(num_rollouts=1),
    "sapo_3": _sapo(num_rollouts=3),
    "sapo_6": _sapo(num_rollouts=6),
    "sapo_3_mean": _sapo(num_rollouts=3, form="mean_normalised"),
    # The canvas has 32 positions, so 32 and 64 masks are the same run: `sapo_3`. In proportion to the paper's canvas
    # of 256, its 32 and 64 masks are 4 and 8 here.
    "sapo_3_masks4": _sapo(num_rollouts=3, num_mask_tokens=4),
    "sapo_3_masks8": _sapo(num_rollouts=3, num_mask_tokens=8),
    "uniform": _selected("uniform"),
    "uniform_fixed": Arm("atpo", ("uniform", "random"), TRAJECTORY | {"step_selector": None}, selector=fixed_steps),
    "random": _selected("random"),
    "entropy": _selected("entropy"),
    "confidence_margin": _selected("confidence_margin"),
    "roec": _selected("roec"),
    "roec_cm": _selected("roec_cm"),
    "roec_cm_k2": _selected("roec_cm", num_mc_samples=2),
    "roec_cm_k8": _selected("roec_cm", num_mc_samples=8),
    "agrpo_uniform": _drawn("uniform"),
    "agrpo_entropy": _drawn("entropy"),
    # All methods, at that learning rate of 3e-5, 1e-4 and 3e-4 which sampled best on word problems with seed 100.
    "diffu_grpo_tuned": _tuned("diffu_grpo", 3e-4, **DIFFU),
    "agrpo_tuned": _tuned("agrpo", 1e-4, **TRAJECTORY, step_draws="uniform"),
    "roec_cm_tuned": _tuned("atpo", 1e-4, **TRAJECTORY, step_selector="roec_cm"),
    "tracerl": _tuned("tracerl", 1e-4, num_iterations=2, shrink=4, epsilon=0.2, beta=0.01),
    "uni_grpo": _tuned("uni_grpo", 3e-5, **NOISED, epsilon=0.2, beta=0.04),
    "coupled_grpo": _tuned("coupled_grpo", 1e-4, **NOISED, epsilon=0.5, beta=0.01),
    "espo": _tuned("espo", 3e-5, **NOISED, num_mc_samples=2, epsilon=0.2, beta=1e-3),
    "espo_4_views": _tuned("espo", 3e-5, **NOISED, num_mc_samples=4, epsilon=0.2, beta=1e-3),
    "wd1": _tuned("wd1", 1e-4, **NOISED),
    "spg": _tuned("spg", 1e-4, **NOISED),
    "spg_random": _tuned("spg", 1e-4, **NOISED, noise="random"),
    "spg_elbo": _tuned("spg", 1e-4, **NOISED, negative_bound="lower"),
    "dmpo": _tuned("dmpo", 3e-5, **DMPO),
    "dmpo_individual": _tuned("dmpo", 3e-5, **DMPO, weight_baseline="individual"),
    "dmpo_none": _tuned("dmpo", 3e-5, **DMPO, weight_baseline="none"),
    "dmpo_wddo": _tuned("dmpo", 1e-4, **DMPO, weight_baseline="none", objective="wddo"),
    "agrpo_prefix": _cached("prefix", "recompute"),
    "agrpo_dual": _cached("dual", "recompute"),
    "agrpo_prefix_behaviour": _cached("prefix", "behaviour"),
    "agrpo_dual_behaviour": _cached("dual", "behaviour"),
}


@dataclass(frozen=True)
class Task:
    """Rows, and what a completion is worth.

    Args:
        load: (split, size, seed) -> data set.
        reward: (completion, row) -> reward in [0, 1]; 1 if and only if the completion is right.
    """

    load: Callable[..., Any]
    reward: Callable[[str, dict[str, Any]], float]

    def correct(self, text: str, row: dict[str, Any]) -> bool:
        return self.reward(text, row) == 1.0


def tasks() -> dict[str, Task]:
    from trl_diffusion.tasks.countdown import check_countdown, load_countdown
    from trl_diffusion.tasks.gsm8k import correctness_reward
    from trl_diffusion.tasks.sudoku import load_sudoku
    from trl_diffusion.tasks.word_problems import load_word_problems

    return {
        "word_problems": Task(
            load_word_problems, lambda text, row: correctness_reward([text], answer=[row["answer"]])[0] or 0.0
        ),
        "countdown": Task(
            load_countdown, lambda text, row: float(check_countdown(text, row["numbers"], row["target"]))
        ),
        "sudoku": Task(load_sudoku, blank_cells_right),
    }


def blank_cells_right(text: str, row: dict[str, Any]) -> float:
    """Share of the blank cells of a Sudoku that are right; 0 without a grid."""
    from trl_diffusion.tasks.sudoku import extract_grid

    grid = extract_grid(text)
    blanks = [cell for cell, digit in enumerate(row["puzzle"]) if digit == "0"]
    return 0.0 if grid is None else sum(grid[cell] == row["solution"][cell] for cell in blanks) / len(blanks)


def train_and_evaluate(
    task_name: str,
    arm_name: str,
    seed: int,
    budget: float,
    eval_size: int,
    learning_rate: float | None,
    max_updates: int | None,
) -> dict[str, Any]:
    """One run: training until the budget is spent, then accuracy. An arm named `base` is not trained.

    `learning_rate` replaces the arm's own, `max_updates` the budget.
    """
    import torch
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

    from trl_diffusion.credit import StepAwareReward
    from trl_diffusion.evaluation import evaluate_accuracy
    from trl_diffusion.models.embedded import EMBEDDED_MODEL
    from trl_diffusion.sampling import SamplingConfig
    from trl_diffusion.trainers import METHODS

    torch.set_num_threads(1)
    disable_progress_bar()
    task = tasks()[task_name]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left")
    curve: list[dict[str, float]] = []
    start = time.perf_counter()
    if arm_name == "base":
        model, units = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL), 0.0
    else:
        arm = ARMS[arm_name]
        trainer_class = METHODS[arm.method]
        config = trainer_class.config_class

        def reward(completions, **columns):
            columns = {name: values for name, values in columns.items() if isinstance(values, list)}
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            return [task.reward(c[0]["content"], row) for c, row in zip(completions, rows, strict=True)]

        class Budget(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "reward" in logs:
                    curve.append({name: logs[name] for name in LOGGED if logs.get(name) is not None})

            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop |= max_updates is None and trainer.forward_units >= budget

        with tempfile.TemporaryDirectory() as folder:
            quiet = dict(use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True)
            step_aware = arm.step_aware is not None
            trainer = trainer_class(
                model=EMBEDDED_MODEL,
                reward_funcs=StepAwareReward(reward, success_threshold=1.0, **arm.step_aware)
                if step_aware
                else reward,
                args=config(
                    folder,
                    seed=seed,
                    max_steps=max_updates or 100_000,
                    gradient_checkpointing=False,
                    model_init_kwargs={"dtype": "float32"},
                    **quiet,
                    **COMMON | arm.settings | ({} if learning_rate is None else {"learning_rate": learning_rate}),
                ),
                train_dataset=task.load("train", 2000, seed),
                processing_class=tokenizer,
                callbacks=[Budget()],
                **({} if arm.selector is None else {"step_selector": arm.selector}),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        model, units = trainer.model, trainer.forward_units
    seconds = time.perf_counter() - start
    held_out = task.load("test", eval_size, 0)

    def accuracy(steps: int, temperature: float = 0.0) -> float:
        decoding = SamplingConfig(CANVAS_LENGTH, steps, BLOCK_LENGTH, temperature, unmasking="max_prob")
        measured = evaluate_accuracy(
            model, tokenizer, held_out, task.correct, decoding=decoding, batch_size=128, progress=False
        )
        return measured.value

    return {
        "task": task_name,
        "arm": arm_name,
        "seed": seed,
        "forward_units": units,
        "updates": len(curve),
        "seconds": seconds,
        "accuracy": {str(steps): accuracy(steps) for steps in EVALUATED_STEPS},
        "sampled_accuracy": accuracy(DENOISING_STEPS, temperature=1.0),
        "curve": curve,
    }


# ---------------------------------------------------------------- all runs


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run that is not on disk yet; then all of them."""
    jobs = [(task, "base", 0) for task in args.tasks]
    jobs += [(task, arm, seed) for seed, task, arm in product(args.seeds, args.tasks, args.arms)]
    paths = {job: args.output_dir / "runs" / job[0] / job[1] / f"{job[2]}.json" for job in jobs}
    setting = {name: getattr(args, name) for name in ("budget", "eval_size", "learning_rate", "max_updates")}
    missing = [job for job in jobs if not _finished(paths[job], setting)]
    with (
        ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="runs") as progress,
    ):
        started = {pool.submit(train_and_evaluate, *job, *setting.values()): job for job in missing}
        for future in as_completed(started):
            result = future.result()
            _write(paths[started[future]], {**result, **setting})
            progress.set_postfix_str(
                f"{result['task']} {result['arm']} {result['accuracy'][str(DENOISING_STEPS)]:.3f}"
            )
            progress.update()
    return [json.loads(paths[job].read_text()) for job in jobs]


def _finished(path: Path, setting: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    found = {name: json.loads(path.read_text()).get(name) for name in setting}
    if found != setting:
        raise SystemExit(f"{path} was made with {found}, not {setting}. Choose another --output_dir or delete it.")
    return True


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all, so that a killed script leaves no torn file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(result))
    os.replace(path.with_suffix(".tmp"), path)


# ---------------------------------------------------------------- report


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task and arm: accuracies, spread over seeds, and paired differences to the arm's baselines."""
    by_arm: dict[tuple[str, str], dict[int, dict]] = {}
    for run in runs:
        by_arm.setdefault((run["task"], run["arm"]), {})[run["seed"]] = run
    rows = []
    for (task, arm), of_seed in by_arm.items():
        row: dict[str, Any] = {"task": task, "arm": arm, "seeds": len(of_seed)}
        for measure in MEASURES:
            row[measure] = _mean_and_spread([MEASURES[measure](run) for run in of_seed.values()])
        for name in ("forward_units", "updates"):
            row[name] = float(np.mean([run[name] for run in of_seed.values()]))
        row["differences"] = [
            _difference(measure, baseline, of_seed, by_arm.get((task, baseline), {}))
            for baseline in (ARMS[arm].baselines if arm in ARMS else ())
            for measure in ("greedy", "sampled")
            if arm != baseline
        ]
        rows.append(row)
    return rows


# Accuracies in percent: greedy at S, S/2 and S/4 steps, and sampled at temperature 1.
MEASURES: dict[str, Callable[[dict], float]] = {
    "greedy": lambda run: 100 * run["accuracy"][str(EVALUATED_STEPS[0])],
    "greedy_half_steps": lambda run: 100 * run["accuracy"][str(EVALUATED_STEPS[1])],
    "greedy_quarter_steps": lambda run: 100 * run["accuracy"][str(EVALUATED_STEPS[2])],
    "sampled": lambda run: 100 * run["sampled_accuracy"],
}


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": float(np.mean(values)), "standard_error": standard_error(values), "std": std}


def _difference(measure: str, baseline: str, arm: dict[int, dict], other: dict[int, dict]) -> dict[str, Any]:
    """Paired over the seeds that both have."""
    shared = sorted(arm.keys() & other.keys())
    values = [MEASURES[measure](arm[seed]) - MEASURES[measure](other[seed]) for seed in shared]
    return {
        "measure": measure,
        "baseline": baseline,
        "mean": float(np.mean(values)) if values else math.nan,
        "standard_error": standard_error(values),
        "p_value": sign_flip_p_value(values) if values else math.nan,
    }


def columns(baselines: tuple[str, ...]) -> list[str]:
    """Head of the table of a family of arms."""
    compared = [f"{measure} − {baseline} (p)" for baseline in baselines for measure in ("greedy", "sampled")]
    return ["arm", "greedy", "std", "greedy S/2", "S/4", "sampled", "std", *compared, "rollouts"]


def cells(row: dict[str, Any], baselines: tuple[str, ...]) -> list[str]:
    """A row of that table."""

    def mean(name: str) -> str:
        value = row[name]
        error = "" if math.isnan(value["standard_error"]) else f" ± {value['standard_error']:.1f}"
        return f"{value['mean']:.1f}{error}"

    def std(name: str) -> str:
        return "" if math.isnan(row[name]["std"]) else f"{row[name]['std']:.1f}"

    compared = {(d["baseline"], d["measure"]): d for d in row["differences"] if not math.isnan(d["mean"])}
    texts = {key: f"{d['mean']:+.1f} ± {d['standard_error']:.1f} ({d['p_value']:.3f})" for key, d in compared.items()}
    differences = [texts.get((baseline, measure), "") for baseline in baselines for measure in ("greedy", "sampled")]
    own = [mean("greedy"), std("greedy"), mean("greedy_half_steps"), mean("greedy_quarter_steps"), mean("sampled")]
    return [row["arm"], *own, std("sampled"), *differences, f"{row['updates']:.0f}"]


def families(rows: list[dict[str, Any]]) -> dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]]:
    """Rows by task and baselines; the untrained model stands in each of its task's tables."""
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for row in rows:
        if row["arm"] in ARMS:
            groups.setdefault((row["task"], ARMS[row["arm"]].baselines), []).append(row)
    base = {row["task"]: row for row in rows if row["arm"] == "base"}
    return {(task, baselines): [base[task], *own] for (task, baselines), own in groups.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    parts = []
    for (task, baselines), own in families(rows).items():
        head = columns(baselines)
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cells(row, baselines)) + " |" for row in own]
        parts.append(f"### {task}: against {' and '.join(baselines)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def plot(runs: list[dict[str, Any]], task: str, path: Path) -> None:
    """Mean reward of the rollouts against the compute spent; one panel per family of arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = sorted({ARMS[run["arm"]].baselines for run in runs if run["arm"] in ARMS})
    figure, axes = plt.subplots(
        1, len(groups), figsize=(8 * len(groups), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, baselines in zip(axes[0], groups, strict=True):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for arm in (name for name in ARMS if ARMS[name].baselines == baselines):
            curves = [run["curve"] for run in runs if run["task"] == task and run["arm"] == arm]
            if curves:
                grid = np.linspace(0, max(curve[-1]["forward_units"] for curve in curves), 60)
                values = np.array([_smooth(curve, grid) for curve in curves])
                error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros_like(grid)
                (line,) = axis.plot(grid, values.mean(0), label=arm, lw=2.5 if arm in baselines else 1.3)
                axis.fill_between(
                    grid, values.mean(0) - error, values.mean(0) + error, color=line.get_color(), alpha=0.07
                )
        axis.set(xlabel="forward units", title=f"{task}: compared with {' and '.join(baselines)}")
        axis.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    axes[0][0].set_ylabel("mean reward of the rollouts (± standard error)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(curve: list[dict[str, float]], grid: np.ndarray) -> np.ndarray:
    """Rewards over the grid, averaged with a Gaussian of a tenth of the budget."""
    units = np.array([point["forward_units"] for point in curve])
    rewards = np.array([point["reward"] for point in curve])
    weights = np.exp(-0.5 * ((grid[:, None] - units) / (grid[-1] / 10)) ** 2)
    return (weights * rewards).sum(1) / weights.sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["word_problems", "countdown"], choices=sorted(tasks()))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", type=float, default=16_000, help="forward units per run")
    parser.add_argument("--max_updates", type=int, help="updates per run, instead of the budget")
    parser.add_argument("--eval_size", type=int, default=256, help="held-out problems")
    parser.add_argument("--learning_rate", type=float, help="for all arms, instead of their own")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare_methods"))
    args = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"  # read by the worker processes when they import torch
    start = time.perf_counter()
    runs = run_all(args)
    rows = summarise(runs)
    spent = f"{args.max_updates} updates" if args.max_updates else f"{args.budget:.0f} forward units"
    for (task, baselines), own in families(rows).items():
        table = Table(*columns(baselines), title=f"{task}: {spent} per run, seeds {args.seeds}")
        for row in own:
            table.add_row(*cells(row, baselines))
        Console(width=180).print(table)
    (args.output_dir / "summary.json").write_text(json.dumps(rows, indent=1))
    (args.output_dir / "results.md").write_text(markdown(rows))
    for task in args.tasks:
        plot(runs, task, args.output_dir / f"{task}.png")
    print(f"{time.perf_counter() - start:.0f} s; tables, plots and runs: {args.output_dir}")


if __name__ == "__main__":
    main()
