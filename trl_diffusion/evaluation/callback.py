"""Held-out accuracy before, during and after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from trl_diffusion.evaluation.accuracy import Accuracy


class AccuracyCallback(TrainerCallback):
    """Measures accuracy when training begins and ends, and every few updates between; logs it as `eval_accuracy`.

    Every process decodes the same prompts: with sharded weights all must run the same forwards.

    Args:
        trainer: the trainer it is added to.
        measure: accuracy of a model, for example `evaluate_accuracy` with its other arguments bound.
        every: updates between measurements; 0 for none in between.

    Attributes:
        history: (update, accuracy), in the order measured.
    """

    def __init__(self, trainer: Trainer, measure: Callable[..., Accuracy], every: int = 0):
        self.trainer, self.measure, self.every = trainer, measure, every
        self.history: list[tuple[int, Accuracy]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._measure(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self._measure(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        trainer: Any = self.trainer
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            accuracy = self.measure(model)
        self.history.append((step, accuracy))
        # TRL files what is logged under "train" or "eval" by the mode of the model.
        training = trainer.model.training
        trainer.model.eval()
        trainer.log({"eval_accuracy": accuracy.value})
        trainer.model.train(training)
