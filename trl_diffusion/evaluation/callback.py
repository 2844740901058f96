"""Held-out accuracy before, during and after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from trl_diffusion.evaluation.accuracy import Accuracy, wilson_interval
from trl_diffusion.trainers.zero3 import finish_trace


class AccuracyCallback(TrainerCallback):
    """Measures accuracy when training begins and ends, and every few updates between.

    Logs it as `eval_accuracy`, `eval_correct` and `eval_total`. A resumed run takes what was measured before from its
    log, and does not measure at its beginning again.

    Processes share the rows, except under FSDP, where all must run the same forwards and so decode the same rows.

    Args:
        trainer: the trainer it is added to.
        dataset: the held-out rows.
        measure: `(model, dataset=rows) -> Accuracy`, for example `evaluate_accuracy` with its other arguments bound.
        every: updates between measurements; 0 for none in between.

    Attributes:
        history: (update, accuracy) of the run, in the order measured.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset, measure: Callable[..., Accuracy], every: int = 0):
        self.trainer, self.dataset, self.measure, self.every = trainer, dataset, measure, every
        self.history: list[tuple[int, Accuracy]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.history = [
            (entry["step"], _accuracy(entry["eval_correct"], entry["eval_total"]))
            for entry in state.log_history
            if "eval_total" in entry
        ]
        if not self.history:
            self._measure(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self._measure(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        trainer: Any = self.trainer
        accelerator = trainer.accelerator
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            finish_trace(trainer, model)
            if accelerator.num_processes == 1 or trainer.is_fsdp_enabled:
                accuracy = self.measure(model, dataset=self.dataset)
            else:
                mine = range(accelerator.process_index, len(self.dataset), accelerator.num_processes)
                counts = torch.zeros(2, dtype=torch.long, device=accelerator.device)
                if mine:
                    own = self.measure(model, dataset=self.dataset.select(mine))
                    counts += torch.tensor([own.correct, own.total], device=counts.device)
                correct, total = accelerator.reduce(counts, reduction="sum").tolist()
                accuracy = _accuracy(correct, total)
        self.history.append((step, accuracy))
        # TRL files what is logged under "train" or "eval" by the mode of the model.
        training = trainer.model.training
        trainer.model.eval()
        trainer.log({"eval_accuracy": accuracy.value, "eval_correct": accuracy.correct, "eval_total": accuracy.total})
        trainer.model.train(training)


def _accuracy(correct: int, total: int) -> Accuracy:
    return Accuracy(correct, total, *wilson_interval(correct, total))
