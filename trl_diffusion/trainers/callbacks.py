"""Callbacks: held-out accuracy before, during and after training, and the confusion zones of rollouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from trl_diffusion.credit.success import check_success, successes
from trl_diffusion.evaluation.confusion_zones import confusion_zone_figure, failure_auc, signal_frame
from trl_diffusion.evaluation.samples import Sample
from trl_diffusion.evaluation.statistics import Estimate
from trl_diffusion.runtime.zero3 import finish_trace
from trl_diffusion.sampling.rollout import FinishedBatch
from trl_diffusion.sampling.trajectory import taken_steps
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer
from trl_diffusion.trainers.held_out_samples import HeldOutSample, HeldOutSamples, prompt_text
from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOTrainer


class AccuracyCallback(TrainerCallback):
    """Measures accuracy when training begins and ends, and every `every` updates in between.

    It is logged as `eval_accuracy`, `eval_correct` and `eval_total`. A resumed run reads the earlier measurements from
    its log, and does not measure at its beginning again.

    Processes share the rows, except under FSDP: there all must run the same forwards, so all decode the same rows.

    Args:
        trainer: the trainer it is added to.
        dataset: the held-out rows.
        measure: `(model, dataset=rows) -> Estimate`, for example `evaluate_accuracy` with its other arguments bound.
        every: updates between measurements; 0 for none in between.
        samples: keeps completions of the first problems. `measure` then also takes `on_sample`, as
            `evaluate_accuracy` does.
        between: rows, the first ones, for the measurements in between; `None` for all.

    Attributes:
        history: (update, accuracy) of the run, in the order measured.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        measure: Callable[..., Estimate],
        every: int = 0,
        samples: HeldOutSamples | None = None,
        between: int | None = None,
    ):
        self.trainer, self.dataset, self.measure, self.every = trainer, dataset, measure, every
        self.samples, self.between = samples, between
        self.history: list[tuple[int, Estimate]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.history = [
            (entry["step"], Estimate.of(entry["eval_correct"], entry["eval_total"]))
            for entry in state.log_history
            if "eval_total" in entry
        ]
        if not self.history:
            self._measure(state.global_step)
        elif self.samples is not None:
            self.samples.resume(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self._measure(state.global_step, self.between)

    def on_train_end(self, args, state, control, **kwargs):
        self._measure(state.global_step)

    def _measure(self, step: int, count: int | None = None) -> None:
        """Measure on the first `count` rows, or on all, and log it."""
        trainer: Any = self.trainer
        accelerator = trainer.accelerator
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            finish_trace(accelerator, model)
            alone = accelerator.num_processes == 1 or trainer.is_fsdp_enabled
            rows = range(len(self.dataset))[:count]
            if not alone:
                rows = rows[accelerator.process_index :: accelerator.num_processes]
            accuracy, seen = self._measure_rows(model, rows)
            if not alone:
                counts = [0.0, 0.0] if accuracy is None else [accuracy.correct, accuracy.total]
                counts = accelerator.reduce(torch.tensor(counts, device=accelerator.device), reduction="sum")
                correct, total = counts.tolist()
                accuracy = Estimate.of(correct, int(total))
        assert accuracy is not None
        if self.samples is not None:
            self._keep(self.samples, step, seen)
        self.history.append((step, accuracy))
        # TRL files what is logged under "train" or "eval" by the mode of the model.
        training = trainer.model.training
        trainer.model.eval()
        trainer.log({"eval_accuracy": accuracy.value, "eval_correct": accuracy.correct, "eval_total": accuracy.total})
        trainer.model.train(training)

    def _measure_rows(self, model, rows: range) -> tuple[Estimate | None, dict[int, Sample]]:
        """Return the accuracy on some rows, `None` if there are none, and the samples to keep by their row."""
        if not rows:
            return None, {}
        dataset = self.dataset if len(rows) == len(self.dataset) else self.dataset.select(rows)
        if self.samples is None:
            return self.measure(model, dataset=dataset), {}
        seen: list[Sample] = []
        accuracy = self.measure(model, dataset=dataset, on_sample=seen.append)
        return accuracy, {rows[one["row"]]: one for one in seen if rows[one["row"]] < self.samples.count}

    def _keep(self, samples: HeldOutSamples, step: int, seen: dict[int, Sample]) -> None:
        """Hand the samples of all processes to `samples` on the first one."""
        gathered = dict(gather_object([*seen.items()]))  # under FSDP every process has the same
        if self.trainer.accelerator.is_main_process:
            prompts = self.dataset["prompt"]
            samples.add(
                HeldOutSample(
                    step, row, prompt_text(prompts[row]), one["completion"], one["scores"]["accuracy"] == 1.0
                )
                for row, one in gathered.items()
            )


class ConfusionZoneCallback(TrainerCallback):
    """Draws the confusion zones of the latest rollout every few updates, without a forward pass.

    Writes `confusion_zones/update_….png` and `.parquet` (see `signal_frame`; completions of all processes) below the
    trainer's `output_dir`, marks the steps that a step selector chose last, logs `confusion_zones/auc_entropy`,
    `…_confidence_margin` and `…_roec` (not where all completions succeeded or failed), and sends the image to wandb
    and trackio where `report_to` names them.

    Args:
        trainer: the trainer it is added to, with `record_signals=True` or a step selector.
        every: updates between figures.
        success: a function that says which completions succeeded; called like a reward function, it returns one truth
            value per completion, or `None` if it cannot say. Give this or `success_threshold`.
        success_threshold: a completion succeeded if its reward is at least this.
        reward: which of the trainer's reward functions the threshold is for.

    Raises:
        TypeError: if the trainer is not one of this library.
        ValueError: if the trainer does not record signals, or the settings contradict each other.
    """

    def __init__(
        self,
        trainer: DiffusionGRPOTrainer,
        every: int,
        *,
        success: Callable[..., Any] | None = None,
        success_threshold: float | None = None,
        reward: int = 0,
    ):
        if not isinstance(trainer, DiffusionGRPOTrainer):
            raise TypeError(
                f"ConfusionZoneCallback needs the rollouts of a DiffusionGRPOTrainer, got {type(trainer).__name__}."
            )
        if not trainer.args.record_signals:
            raise ValueError(
                "ConfusionZoneCallback needs the signals of the denoising steps, which this trainer does not record. "
                "Set record_signals=True in its config."
            )
        if every < 1:
            raise ValueError(f"every must be at least 1 update, got {every}. For no figures leave the callback out.")
        check_success("ConfusionZoneCallback", success, success_threshold)
        if not 0 <= reward < len(trainer.reward_funcs):
            raise ValueError(f"reward={reward} is not one of the trainer's {len(trainer.reward_funcs)} functions.")
        self.trainer, self.every = trainer, every
        self.success, self.success_threshold, self.reward = success, success_threshold, reward

    def on_step_end(self, args, state, control, **kwargs):
        # Right after a resume the rollout in use is from before it, and not at hand.
        if state.global_step % self.every == 0 and self.trainer.last_rollout is not None:
            self._draw(state.global_step)

    def _draw(self, update: int) -> None:
        trainer = self.trainer
        assert trainer.last_rollout is not None
        trajectory, finished = trainer.last_rollout
        assert trajectory.step_entropy is not None and trajectory.step_margin is not None
        taken = taken_steps(trajectory.unmask_step, trajectory.step_entropy.size(1))
        entropy, margin, steps, taken = trainer.accelerator.gather(
            (trajectory.step_entropy, trajectory.step_margin, trajectory.steps_taken, taken)
        )
        steps_per_block = trainer.args.sampling_config().steps_per_block
        frame = signal_frame(entropy, margin, steps, self._successes(finished), steps_per_block, taken)
        areas = failure_auc(frame)["auc"].dropna()
        trainer.meter.add("train", {f"confusion_zones/auc_{signal}": area for signal, area in areas.items()})
        if trainer.accelerator.is_main_process:
            selected = trainer.last_selection if isinstance(trainer, TrajectoryGRPOTrainer) else None
            assert trainer.args.output_dir is not None
            path = Path(trainer.args.output_dir) / "confusion_zones" / f"update_{update:06d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            frame.to_parquet(path.with_suffix(".parquet"))
            image = path.with_suffix(".png")
            confusion_zone_figure(frame, steps_per_block, selected, f"update {update}").savefig(image)
            self._send(image, update)

    def _successes(self, finished: FinishedBatch) -> torch.Tensor:
        """Return the success of the completions of all processes: float64 [B], NaN where it is unknown."""
        if self.success_threshold is not None:  # the rewards are those of all processes already
            return successes(None, self.success_threshold, finished.rewards[:, self.reward].tolist())
        own = successes(
            self.success,
            None,
            prompts=finished.prompts,
            completions=finished.completions,
            completion_ids=finished.completion_ids,
            **finished.columns(list(range(len(finished.prompts)))),
        )
        return self.trainer.accelerator.gather(own.to(self.trainer.accelerator.device))

    def _send(self, image: Path, update: int) -> None:
        """The image to the trackers that the run reports to; imported only then, since neither is required."""
        # The x axis that transformers' own callbacks for both trackers log.
        step, report_to = {"train/global_step": update}, self.trainer.args.report_to or []
        if "wandb" in report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({"confusion_zones": wandb.Image(str(image)), **step})
        if "trackio" in report_to:
            import trackio

            trackio.log({"confusion_zones": trackio.Image(str(image)), **step})
