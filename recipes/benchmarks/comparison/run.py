"""Runs an arm of the comparison on a task with a seed, and all of the runs that are not on disk yet."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from comparison.arms import ARMS, BLOCK_LENGTH, CANVAS_LENGTH, COMMON, DENOISING_STEPS, EVALUATED_STEPS, Arm
from trl_diffusion.credit import StepAwareReward
from trl_diffusion.evaluation import evaluate_accuracy
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS, Task
from trl_diffusion.trainers import METHODS, DiffusionGRPOTrainer

TRAINING_ROWS = 2000
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


class Budget(TrainerCallback):
    """Keeps the learning curve, and stops training when the budget of forward units is spent.

    Args:
        budget: forward units; `None` where the number of updates is fixed instead.

    Attributes:
        trainer: the trainer it is added to.
        curve: the `LOGGED` metrics of every update.
    """

    trainer: DiffusionGRPOTrainer

    def __init__(self, budget: float | None):
        self.budget = budget
        self.curve: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "reward" in logs:
            self.curve.append({name: logs[name] for name in LOGGED if logs.get(name) is not None})

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.budget is not None and self.trainer.forward_units >= self.budget


def make_trainer(
    arm: Arm, task: Task, seed: int, folder: str, learning_rate: float | None, max_updates: int | None, budget: Budget
) -> DiffusionGRPOTrainer:
    """Make the trainer of an arm on the bundled model; its only reward is the task's first, which is 1 for success."""
    trainer_class, reward = METHODS[arm.method], task.rewards[0]
    quiet = dict(use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True)
    settings = COMMON | arm.settings | ({} if learning_rate is None else {"learning_rate": learning_rate})
    trainer = trainer_class(
        model=EMBEDDED_MODEL,
        reward_funcs=reward
        if arm.step_aware is None
        else StepAwareReward(reward, success_threshold=1.0, **arm.step_aware),
        args=trainer_class.config_class(
            folder,
            seed=seed,
            max_steps=max_updates or 100_000,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            **quiet,
            **settings,
        ),
        train_dataset=generated(task, "train", TRAINING_ROWS, seed),
        processing_class=AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left"),
        callbacks=[budget],
        **({} if arm.selector is None else {"step_selector": arm.selector}),
    )
    budget.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    return trainer


def generated(task: Task, split: str, size: int, seed: int):
    """Return generated problems of a task."""
    assert task.generate is not None
    return task.generate(split, size, seed)


def measure(model, task: Task, eval_size: int) -> dict[str, Any]:
    """Measure held-out accuracy, greedy at several numbers of denoising steps, and sampled at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left")
    held_out = generated(task, "test", eval_size, 0)

    def accuracy(steps: int, temperature: float = 0.0) -> float:
        decoding = SamplingConfig(CANVAS_LENGTH, steps, BLOCK_LENGTH, temperature, unmasking="max_prob")
        measured = evaluate_accuracy(
            model, tokenizer, held_out, task.is_correct, decoding=decoding, batch_size=128, progress=False
        )
        return measured.value

    return {
        "accuracy": {str(steps): accuracy(steps) for steps in EVALUATED_STEPS},
        "sampled_accuracy": accuracy(DENOISING_STEPS, temperature=1.0),
    }


def train_and_evaluate(
    task_name: str,
    arm_name: str,
    seed: int,
    budget: float,
    eval_size: int,
    learning_rate: float | None,
    max_updates: int | None,
) -> dict[str, Any]:
    """Train until the budget is spent, then measure accuracy. An arm named `base` is not trained.

    `learning_rate` replaces the arm's own, `max_updates` the budget.
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    task, spent = TASKS[task_name], Budget(None if max_updates is not None else budget)
    start = time.perf_counter()
    if arm_name == "base":
        model, units = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL), 0.0
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(ARMS[arm_name], task, seed, folder, learning_rate, max_updates, spent)
            trainer.train()
        model, units = trainer.model, trainer.forward_units
    seconds = time.perf_counter() - start
    return {
        "task": task_name,
        "arm": arm_name,
        "seed": seed,
        "forward_units": units,
        "updates": len(spent.curve),
        "seconds": seconds,
        **measure(model, task, eval_size),
        "curve": spent.curve,
    }


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Do every run that is not on disk yet, and return all of them."""
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
    """Write a file as a whole or not at all, so that a killed script leaves no torn file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(result))
    os.replace(path.with_suffix(".tmp"), path)
