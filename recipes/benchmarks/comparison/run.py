"""Runs an arm of the comparison on a task with a seed, and all of the runs that are not on disk yet."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from comparison.arms import ARMS, COMMON
from comparison.core import CORE, FEWER_STEPS
from comparison.settings import Setting, setting_of
from trl_diffusion.credit import StepAwareReward
from trl_diffusion.evaluation import evaluate_accuracy
from trl_diffusion.evaluation.samples import Sample
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS, Task
from trl_diffusion.trainers import METHODS, DiffusionGRPOTrainer

TRAINING_ROWS = 2000
EVALUATION_BATCH = 128
CONFIDENCE_THRESHOLD = 0.9  # of parallel decoding, as in its paper (2505.22618)
ALL_ARMS = ARMS | CORE
# Read by a worker process when it starts: one thread each, and glibc keeps freed memory for the next tensor. By
# default it returns the memory of large ones to the system, and the next one begins with new pages.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
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
        curve: the `LOGGED` metrics of every rollout; its later updates log no reward.
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


@dataclass(frozen=True)
class Job:
    """A run: an arm on a task, with a seed.

    Args:
        task: its name.
        arm: its name, or `base` for the untrained model.
        seed: of the run.
        learning_rate: in place of the arm's own.
        folder: where its result goes, with the name SEED.json.
        tuning: the run is for choosing a learning rate; only one sample of every held-out problem is measured.
    """

    task: str
    arm: str
    seed: int
    learning_rate: float | None
    folder: Path
    tuning: bool = False

    @property
    def path(self) -> Path:
        return self.folder / f"{self.seed}.json"


@dataclass(frozen=True)
class Length:
    """How long runs train, and how much is measured after them.

    Args:
        budget: forward units per run.
        eval_size: held-out problems.
        max_updates: updates per run, in place of the budget.
    """

    budget: float = 16_000
    eval_size: int = 256
    max_updates: int | None = None


def make_trainer(job: Job, length: Length, setting: Setting, folder: str, budget: Budget) -> DiffusionGRPOTrainer:
    """Make the trainer of a run; its only reward is the task's first, which is 1 for success."""
    arm, task = ALL_ARMS[job.arm], TASKS[job.task]
    trainer_class, reward = METHODS[arm.method], task.rewards[0]
    quiet = dict(use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True)
    settings = COMMON | setting.of_trainer | arm.settings
    settings |= {} if job.learning_rate is None else {"learning_rate": job.learning_rate}
    settings |= {"denoising_steps": setting.fewer_steps[0]} if job.arm in FEWER_STEPS else {}
    rows = generated(task, "train", arm.curriculum or TRAINING_ROWS, job.seed)
    if arm.curriculum is not None:
        rows, settings = rows.sort("difficulty"), settings | {"shuffle_dataset": False}
    trainer = trainer_class(
        model=setting.model,
        reward_funcs=reward
        if arm.step_aware is None
        else StepAwareReward(reward, success_threshold=1.0, **arm.step_aware),
        args=trainer_class.config_class(
            folder,
            seed=job.seed,
            max_steps=length.max_updates or 100_000,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            **quiet,
            **settings,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(setting.model, padding_side="left"),
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


def measure(model, job: Job, setting: Setting, eval_size: int) -> dict[str, Any]:
    """Measure held-out accuracy: greedy at several numbers of denoising steps, and of samples at temperature 1.

    The untrained model and the arms of `FEWER_STEPS` are also decoded in parallel: every position commits whose
    largest probability reaches `CONFIDENCE_THRESHOLD`, and the mean number of steps of a completion is counted.
    """
    task, tokenizer = TASKS[job.task], AutoTokenizer.from_pretrained(setting.model, padding_side="left")
    held_out = generated(task, "test", eval_size, 0)
    with_fewer_steps = job.arm in ("base", *FEWER_STEPS) and bool(setting.fewer_steps)
    steps, draws = [*setting.greedy_steps, *(setting.fewer_steps if with_fewer_steps else ())], setting.draws
    if job.tuning:
        steps, draws = [], 1

    def accuracy(decoding: SamplingConfig, draws: int = 1, on_sample: Callable[[Sample], None] | None = None) -> float:
        measured = evaluate_accuracy(
            model,
            tokenizer,
            held_out,
            task.is_correct,
            decoding=decoding,
            batch_size=EVALUATION_BATCH,
            completions_per_prompt=draws,
            progress=False,
            on_sample=on_sample,
        )
        return measured.value

    found = {
        "accuracy": {str(number): accuracy(setting.decoding(number)) for number in steps},
        "sampled_accuracy": accuracy(setting.decoding(setting.denoising_steps, 1.0), draws),
    }
    if with_fewer_steps:
        taken: list[int] = []
        one_token_a_step = setting.decoding(setting.canvas_length, confidence_threshold=CONFIDENCE_THRESHOLD)
        reached = accuracy(one_token_a_step, on_sample=lambda sample: taken.append(sample["forwards"]))
        found["parallel"] = {"accuracy": reached, "steps": float(np.mean(taken))}
    return found


def train_and_evaluate(job: Job, length: Length) -> dict[str, Any]:
    """Train until the budget is spent, then measure accuracy. An arm named `base` is not trained."""
    torch.set_num_threads(1)
    disable_progress_bar()
    setting, spent = setting_of(job.task), Budget(None if length.max_updates is not None else length.budget)
    start = time.perf_counter()
    if job.arm == "base":
        model, units = AutoModelForCausalLM.from_pretrained(setting.model), 0.0
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(job, length, setting, folder, spent)
            trainer.train()
        model, units = trainer.model, trainer.forward_units
    seconds = time.perf_counter() - start
    return {
        "task": job.task,
        "arm": job.arm,
        "seed": job.seed,
        "learning_rate": job.learning_rate,
        "forward_units": units,
        "rollouts": len(spent.curve),
        "seconds": seconds,
        **measure(model, job, setting, length.eval_size),
        "curve": spent.curve,
    }


def run_all(jobs: Sequence[Job], length: Length, workers: int) -> list[dict[str, Any]]:
    """Do every run that is not on disk yet, and return all of them in the order of the jobs.

    The first run that fails ends it; those that are running then are finished and kept.
    """
    missing = [job for job in jobs if not _finished(job, length)]
    os.environ |= WORKER_ENVIRONMENT
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="runs") as progress,
    ):
        try:
            for future in as_completed([pool.submit(run_and_write, job, length) for job in missing]):
                result = future.result()
                progress.set_postfix_str(f"{result['task']} {result['arm']} {result['sampled_accuracy']:.3f}")
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [json.loads(job.path.read_text()) for job in jobs]


def run_and_write(job: Job, length: Length) -> dict[str, Any]:
    """Do a run and write its result, which is returned."""
    result = {**train_and_evaluate(job, length), **asdict(length)}
    _write(job.path, result)
    return result


def is_of(result: dict[str, Any], job: Job, length: Length) -> bool:
    """Return whether a result is that of a run, at this length and learning rate."""
    setting = {"task": job.task, "arm": job.arm, "seed": job.seed, "learning_rate": job.learning_rate}
    return all(result.get(name) == value for name, value in (setting | asdict(length)).items())


def _finished(job: Job, length: Length) -> bool:
    if not job.path.exists():
        return False
    found = json.loads(job.path.read_text())
    if not is_of(found, job, length):
        setting = asdict(length) | {"learning_rate": job.learning_rate}
        found = {name: found.get(name) for name in setting}
        raise SystemExit(f"{job.path} was made with {found}, not {setting}. Choose another --output_dir or delete it.")
    return True


def keep(job: Job, result: dict[str, Any]) -> None:
    """Take a result that is known as that of a run, unless it is on disk."""
    if not job.path.exists():
        _write(job.path, result)


def _write(path: Path, result: dict[str, Any]) -> None:
    """Write a file as a whole or not at all, so that a killed script leaves no torn file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(result))
    os.replace(path.with_suffix(".tmp"), path)
