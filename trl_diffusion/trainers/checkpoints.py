"""Checkpoints from which a run goes on as if it had never stopped.

transformers saves weights, optimizer, schedule, random generators and its own state. Missing there are the loss and
the time since the last log, and any way to tell a checkpoint that was written to its end from one that was not (see
`trl_diffusion.trainers.manifest`). What a GRPO run needs besides is in `trl_diffusion.trainers.rollout_checkpoints`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_diffusion.trainers.manifest import discard, fault, read_manifest, rotate, seal, survey

logger = logging.getLogger(__name__)

# With other values the rollout batch and the position in it would mean something else.
_FIXED_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "num_mc_samples",
    "seed",
)


@dataclass
class ResumeConfig:
    """The field by which a run is resumed; part of every config of this library.

    Args:
        resume_from_checkpoint: for recipes, what they pass to `train`; on the command line it needs no value.
    """

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from this checkpoint; without a value, from the last whole one in `output_dir`, or from "
            "the start if there is none.",
            "nargs": "?",
            "const": "last",
        },
    )


class Checkpoints(Trainer):
    """Saves and restores a run at any optimizer step; stands before TRL's trainer in the method resolution order.

    A resumed run takes the same steps and writes the same log as one that was never interrupted, but for times. On one
    CPU process that is so bit for bit.
    """

    state_file = "run_state"  # of each process; its index and `.pt` follow
    args: Any
    model: Any  # transformers types it as optional
    _pending: dict[str, Any] | None = None
    _seconds_before = 0.0
    _started = 0.0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """TRL's `train`.

        Args:
            resume_from_checkpoint: a checkpoint; or `True` (or `"last"`) for the last one of `output_dir` that is
                whole. Torn ones are skipped with a warning, and if there is none, training starts from the beginning.
            *args: see `transformers.Trainer.train`.
            **kwargs: see `transformers.Trainer.train`.

        Raises:
            ValueError: if the checkpoint named is torn, or was written with other settings or another number of
                processes.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._pending, self._seconds_before, self._started = None, 0.0, time.time()
        if checkpoint is None:
            return super().train(None, *args, **kwargs)
        callback = _TakeBackPending(self)
        self.add_callback(callback)
        # The interrupted run has evaluated at its start.
        eval_on_start, self.args.eval_on_start = self.args.eval_on_start, False
        try:
            return super().train(str(checkpoint), *args, **kwargs)
        finally:
            self.remove_callback(callback)
            self.args.eval_on_start = eval_on_start

    # ---------------------------------------------------------------- which checkpoint

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        """The checkpoint to go on from, the same on every process."""
        output_dir = Path(self.args.output_dir)
        if asked is None or asked is False:
            whole, _ = survey(output_dir)
            if whole and self.is_world_process_zero():
                logger.warning(
                    "%s holds checkpoints of an earlier run, which this run does not resume and may overwrite.",
                    output_dir,
                )
            return None
        checkpoint = self._last_checkpoint(output_dir) if asked in (True, "", "last") else Path(str(asked))
        if checkpoint is None:
            if self.is_world_process_zero():
                logger.warning("No whole checkpoint in %s: training starts from the beginning.", output_dir)
            return None
        if not all(gather_object([checkpoint.is_dir()])):
            raise ValueError(
                f"resume_from_checkpoint={asked!r} is not a folder. Give a checkpoint's folder, or True for the last "
                f"whole one in {output_dir}."
            )
        torn = [why for why in gather_object([fault(checkpoint)]) if why is not None]
        if torn:
            raise ValueError(
                f"{checkpoint} {torn[0]}, so it was not written to its end and the run cannot go on from it. Give "
                "another one, or resume_from_checkpoint=True for the last one that is whole."
            )
        self._check_fits(checkpoint)
        return checkpoint

    def _last_checkpoint(self, output_dir: Path) -> Path | None:
        whole, torn = survey(output_dir)
        if self.is_local_process_zero():
            for folder, why in torn.items():
                logger.warning("Skipping %s: it %s.", folder, why)
        # Nodes may have folders of their own: one that is whole everywhere is wanted.
        of_processes = gather_object([[folder.name for folder in whole]])
        names = [name for name in of_processes[0] if all(name in others for others in of_processes)]
        return output_dir / names[0] if names else None

    def _check_fits(self, checkpoint: Path) -> None:
        facts = read_manifest(checkpoint)
        if facts["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} was written by {facts['processes']} processes; this run has "
                f"{self.accelerator.num_processes}. Resume with as many processes as wrote it."
            )
        changed = {
            name: (value, getattr(self.args, name))
            for name, value in facts["settings"].items()
            if value != getattr(self.args, name)
        }
        if changed:
            listed = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
            raise ValueError(
                f"{checkpoint} was written with {listed}. A run cannot go on with other values of these: set them "
                "back, or start a new run from the saved weights."
            )

    # ---------------------------------------------------------------- write

    def _save_checkpoint(self, model, trial):
        if self.args.save_only_model:  # nothing to resume from
            super()._save_checkpoint(model, trial)
            return
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            discard(folder)  # what a killed run left
        self.accelerator.wait_for_everyone()
        folder.mkdir(parents=True, exist_ok=True)
        self._write_state(folder)
        # transformers would delete old checkpoints before this one is whole
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self._seal(folder)
        if self.args.should_save and limit is not None and limit > 0:
            best = self.state.best_model_checkpoint
            rotate(run_dir, limit, keep={folder} if best is None else {folder, Path(best)})

    def _push_from_checkpoint(self, checkpoint_folder):
        self._seal(Path(checkpoint_folder))  # so that the uploaded copy is whole, too
        if self.args.hub_always_push:
            self._finish_current_push()  # transformers would overwrite the files that are still being uploaded
        super()._push_from_checkpoint(checkpoint_folder)

    def _seal(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()  # all have written
        if self.args.should_save:
            settings = {name: vars(self.args)[name] for name in _FIXED_SETTINGS if name in vars(self.args)}
            seal(folder, processes=self.accelerator.num_processes, settings=settings)

    def _write_state(self, folder: Path) -> None:
        """Write what transformers does not save."""
        torch.save(self._run_state(), folder / self._state_name())

    def _run_state(self) -> dict[str, Any]:
        """What this process must remember; plain values and tensors."""
        return {
            "loss": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "seconds": self._seconds_before + time.time() - self._started,
        }

    def _state_name(self) -> str:
        return f"{self.state_file}_{self.accelerator.process_index}.pt"

    # ---------------------------------------------------------------- restore

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # PEFT loads adapters as float32, also those that TRL trains in bfloat16
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes[name]:
                parameter.data = parameter.data.to(dtypes[name])

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # by way of the CPU: torch.load does not know accelerate's device `cpu:0`
        state = torch.load(Path(checkpoint) / self._state_name(), map_location="cpu", weights_only=True)
        self._take_back(state, Path(checkpoint))

    def _take_back(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Take back what `_write_state` wrote."""
        self._pending = state

    def take_back_pending(self) -> None:
        """Loss since the last log and time spent before; transformers sets them to zero when training starts."""
        assert self._pending is not None
        self._tr_loss = self._pending["loss"].to(self.args.device)
        self._total_loss_scalar = self._pending["total_loss"]
        self._globalstep_last_logged = self._pending["last_logged"]
        self._seconds_before = self._pending["seconds"]
        self._pending, self._started = None, time.time()

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        # A run that was killed after its last update is at its end; transformers would take one step more.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else position

    def _finalize_training(self, trial, num_train_samples, start_time):
        # Loss, time and throughput of the whole run, not of its last part.
        self._initial_global_step = 0
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


class _TakeBackPending(TrainerCallback):
    """Calls `Checkpoints.take_back_pending` when it is time."""

    def __init__(self, trainer: Checkpoints):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.take_back_pending()
