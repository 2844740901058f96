"""Checkpoints from which a run continues as if it had never stopped.

transformers saves weights, optimizer, schedule, random generators and its own state. It does not save the loss and the
time since the last log, and it does not notice that a checkpoint was not written to its end (see
`trl_diffusion.runtime.manifest`). It also resumes under any settings; here a run compares its facts with those of the
checkpoint first (`run_facts.py`), and its own learning rates take effect (`resumed_rates.py`). What a GRPO run needs
in addition is in `trl_diffusion.runtime.rollout_checkpoints`.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper  # can be imported without DeepSpeed
from datasets import Dataset
from peft import PeftModel, PeftType
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.runtime.manifest import damage, discard, fault, read_manifest, rotate, seal, survey
from trl_diffusion.runtime.resumed_rates import Rates, SavedSchedule
from trl_diffusion.runtime.run_facts import (
    Change,
    Facts,
    adapter_facts,
    changes,
    data_facts,
    model_facts,
    setting_facts,
    trained_weights,
    unknown,
    weights_checksum,
)

logger = logging.getLogger(__name__)
# If one of these has changed, a schedule that follows measurements starts again.
_RATE_SETTINGS = ("`learning_rate`", "`lr_scheduler_type`", "`lr_scheduler_kwargs`")


@dataclass
class ResumeConfig:
    """The field by which a run is resumed; part of every config of this library.

    Args:
        resume_from_checkpoint: passed to `train` by recipes; on the command line it needs no value.
    """

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Continue from this checkpoint; without a value, from the last whole one in `output_dir`, or from "
            "the start if there is none.",
            "nargs": "?",
            "const": "last",
        },
    )


LAST = ("true", "last", "")  # what asks for the last whole checkpoint, as a word in Python, YAML or on a command line
NONE = ("none", "false")


class Checkpoints(Trainer):
    """Saves and restores a run at any optimizer step; stands before TRL's trainer in the method resolution order.

    A resumed run takes the same steps and writes the same log, except for times, as one that was never interrupted; in
    one process on a CPU bit for bit.
    """

    state_file = "run_state"  # each process has one, with its index and `.pt` added to this name
    args: Any
    model: Any  # transformers types it as optional
    lr_scheduler: Any
    processing_class: Any
    family: DiffusionFamily
    _facts: Facts
    _model_facts: Facts | None = None
    _rates: Rates
    _restarts_rates = False
    _saved_progress: dict[str, Any] | None = None  # of the checkpoint, until training starts
    _seconds_before = 0.0
    _started = 0.0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as TRL does, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint; or `True` (or `"last"`) for the last one of `output_dir` that is
                whole. Torn ones are skipped with a warning, and if there is none, training starts from the beginning.
            *args: see `transformers.Trainer.train`.
            **kwargs: see `transformers.Trainer.train`.

        Raises:
            ValueError: if the checkpoint named is torn, or was written by a run with other settings, another model,
                adapter or data set, or another number of processes; the message names what changed.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._saved_progress, self._seconds_before, self._started = None, 0.0, time.time()
        if checkpoint is None:
            return super().train(None, *args, **kwargs)
        callback = _RestoreProgress(self)
        self.add_callback(callback)
        # The interrupted run has evaluated at its start already.
        eval_on_start, self.args.eval_on_start = self.args.eval_on_start, False
        try:
            return super().train(str(checkpoint), *args, **kwargs)
        finally:
            self.remove_callback(callback)
            self.args.eval_on_start = eval_on_start

    # ---------------------------------------------------------------- which checkpoint

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        """Choose the checkpoint to continue from, the same on every process; `None` to start from the beginning."""
        output_dir = Path(self.args.output_dir)
        self._facts = self._collect_facts()
        word = str(asked).lower()
        if word in NONE:
            whole, torn = survey(output_dir)
            if (whole or torn) and self.is_world_process_zero():
                logger.warning(
                    "%s holds checkpoints of an earlier run, which this run does not resume and may overwrite.",
                    output_dir,
                )
            return None
        checkpoint = self._last_checkpoint(output_dir) if word in LAST else Path(str(asked))
        if checkpoint is None:
            if self.is_world_process_zero():
                logger.warning("No whole checkpoint in %s: training starts from the beginning.", output_dir)
            return None
        if not all(gather_object([checkpoint.is_dir()])):
            raise ValueError(
                f"resume_from_checkpoint={asked!r} is not a folder. Give a checkpoint's folder, or True for the last "
                f"whole one in {output_dir}."
            )
        # Gathered, so that all processes raise if one of them cannot read its copy; alone it would hang the others.
        faults = [why for why in gather_object([fault(checkpoint)]) if why is not None] or self._damage(checkpoint)
        if faults:
            raise ValueError(
                f"{checkpoint} {faults[0]}: it was not written to its end, or changed since, and the run cannot "
                "continue from it. Give another one, or resume_from_checkpoint=True for the last one that is whole."
            )
        self._check_fits(checkpoint)
        return checkpoint

    def _last_checkpoint(self, output_dir: Path) -> Path | None:
        """Return the checkpoint written last that is whole on every process; warn about those that are skipped."""
        whole, torn = survey(output_dir)
        for folder, why in torn.items():
            self._warn_skipped(folder, why)
        # Nodes may not share a disk, so a checkpoint has to be whole on all of them.
        of_processes = gather_object([[folder.name for folder in whole]])
        for name in of_processes[0]:
            if all(name in others for others in of_processes):
                damaged = self._damage(output_dir / name)
                if not damaged:
                    return output_dir / name
                self._warn_skipped(output_dir / name, damaged[0])
        return None

    def _damage(self, checkpoint: Path) -> list[str]:
        """Return what is wrong with the contents of a checkpoint; one process of every node reads its files."""
        found = damage(checkpoint) if self.is_local_process_zero() else None
        return [why for why in gather_object([found]) if why is not None]

    def _warn_skipped(self, folder: Path, why: str) -> None:
        if self.is_local_process_zero():
            logger.warning("Skipping %s: it %s.", folder, why)

    # ---------------------------------------------------------------- is it a checkpoint of the same run

    def _collect_facts(self) -> Facts:
        """Collect the facts about this run that manifests keep, see `trl_diffusion.runtime.run_facts`."""
        # Once, before the first training: training changes weights and optimizer, on which these facts depend.
        if self._model_facts is None:
            self._model_facts = self._collect_model_facts()
        data = data_facts(self.train_dataset, self.processing_class.chat_template)
        return {**self._model_facts, "settings": setting_facts(self.args), "data": data}

    def _collect_model_facts(self) -> Facts:
        model: Any = self.accelerator.unwrap_model(self.model)
        adapters = model.peft_config if isinstance(model, PeftModel) else {}
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        fixed = self._fixed_weights()
        run = {
            "trainer": type(self).__name__,
            "family": self.family.name,
            "network": type(base).__name__,
            "adapter": ", ".join(PeftType(config.peft_type).value for config in adapters.values()) or None,
            "set of trained weights": trained_weights(model),
            "optimizer": None if self.optimizer is None else _description(self.optimizer),
            "way of distribution": self._distribution(),
        }
        checksum = weights_checksum(fixed, self._whole) if fixed else None
        return {"run": run, "model": model_facts(base, checksum), "adapter": adapter_facts(adapters)}

    def _fixed_weights(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the weights that checkpoints do not hold, which must be those the run first started with, by name.

        With an adapter these are the weights of its base; without one, checkpoints hold all weights.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return []
        return [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]

    def _distribution(self) -> str | None:
        """Name the backend by the kind of files that it writes; `_check_fits` compares the number of processes."""
        if self.is_deepspeed_enabled:
            return f"DeepSpeed ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "FSDP" if self.is_fsdp_enabled else None

    def _whole(self, parameter: torch.nn.Parameter):
        """Return a context in which a parameter is whole.

        Under ZeRO-3 it is gathered, and what the first process writes to it is kept.
        """
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if plugin is None or plugin.zero_stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def _check_fits(self, checkpoint: Path) -> None:
        """Compare the facts of a checkpoint with this run's; report allowed changes, and raise for others."""
        before = read_manifest(checkpoint)
        if before.get("processes") != self.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} was written by {before.get('processes')} processes; this run has "
                f"{self.accelerator.num_processes}. Resume with as many processes as wrote it."
            )
        # The first process decides for all: under FSDP others may not hold the weights yet, so their checksums differ.
        changed = gather_object([changes(before, self._facts)])[0]
        if refused := [change for change in changed if not change.allowed]:
            raise ValueError(
                f"{checkpoint} was written by a run in which {_listed(refused)}. What it holds (drawn completions and "
                "their log-probabilities, places in the random streams and in the data, the optimizer's averages) is "
                "wrong with the new values. Set them back; or start a new run from the saved weights: give this "
                "folder as the model and another output_dir, and leave resume_from_checkpoint out."
            )
        self._restarts_rates = any(change.name in _RATE_SETTINGS for change in changed)
        if self.is_world_process_zero():
            self._warn_of_changes(checkpoint, changed, unknown(before, self._facts))

    def _warn_of_changes(self, checkpoint: Path, changed: list[Change], not_compared: list[str]) -> None:
        if changed:
            logger.warning("Resuming %s with other settings: %s.", checkpoint, _listed(changed))
        if not_compared:
            logger.warning(
                "%s was written by an earlier version, which did not record everything that must stay the same. Make "
                "sure that these are as they were: %s.",
                checkpoint,
                ", ".join(not_compared),
            )
        if not isinstance(self.train_dataset, Dataset):
            logger.warning("The training data are a stream, so nothing checks that they are the same as before.")

    # ---------------------------------------------------------------- write

    def _save_checkpoint(self, model, trial):
        if self.args.save_only_model:  # nothing to resume from
            super()._save_checkpoint(model, trial)
            return
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            discard(folder)  # remains of a killed run, whose files this run might not overwrite
        self.accelerator.wait_for_everyone()
        folder.mkdir(parents=True, exist_ok=True)
        self._write_state(folder)
        # transformers deletes old checkpoints at the end of its `_save_checkpoint`, when this one has no manifest yet.
        # A run killed at that moment would have no whole checkpoint left, so they are deleted below instead.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.push_to_hub:  # otherwise `_push_from_checkpoint` has sealed it, before it was uploaded
            self._seal(folder)
        if self.args.should_save and limit is not None and limit > 0:
            best = self.state.best_model_checkpoint
            rotate(run_dir, limit, keep={folder} if best is None else {folder, Path(best)})

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.args.save_only_model:
            self._seal(Path(checkpoint_folder))  # so that the uploaded copy is whole too
        if self.args.hub_always_push:
            self._finish_current_push()  # transformers would overwrite files that are still being uploaded
        super()._push_from_checkpoint(checkpoint_folder)

    def _seal(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()  # until all have written their files
        if self.args.should_save:
            seal(folder, processes=self.accelerator.num_processes, **self._facts)

    def _write_state(self, folder: Path) -> None:
        """Write this process's part of what transformers does not save."""
        torch.save(self._run_state(), folder / self._state_name())

    def _run_state(self) -> dict[str, Any]:
        """Return what this process must remember, as plain values and tensors that `weights_only` loading accepts."""
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
        # PEFT loads every adapter in float32, but TRL may train it in bfloat16, in which the optimizer saw it.
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes[name]:
                parameter.data = parameter.data.to(dtypes[name])

    def create_scheduler(self, num_training_steps, optimizer=None):
        schedule = super().create_scheduler(num_training_steps, optimizer)
        # Called without an optimizer once everything is wrapped. Under DeepSpeed there is an earlier call, with one.
        if optimizer is None:
            self._rates = Rates(self.optimizer, schedule)
        return schedule

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        # The schedule is not loaded, because that would bring back the rates of the interrupted run; `Rates` advances
        # it to its place. DeepSpeed loads schedules itself, whatever stands here.
        schedule, saved = self.lr_scheduler, SavedSchedule()
        if not isinstance(schedule, DeepSpeedSchedulerWrapper):
            self.lr_scheduler = saved
        super()._load_optimizer_and_scheduler(checkpoint)
        self.lr_scheduler = schedule
        self._rates.resume(saved.state, self.state.global_step, anew=self._restarts_rates)
        # Loaded to the CPU first: torch.load does not accept accelerate's device `cpu:0`.
        state = torch.load(Path(checkpoint) / self._state_name(), map_location="cpu", weights_only=True)
        self._take_back(state, Path(checkpoint))

    def _take_back(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Restore what `_write_state` wrote; a subclass adds what its `_run_state` added."""
        self._saved_progress = state

    def restore_progress(self) -> None:
        """Restore the running loss and the elapsed time, which transformers resets at the start of training."""
        saved, self._saved_progress = self._saved_progress, None
        assert saved is not None
        self._tr_loss = saved["loss"].to(self.args.device)
        self._total_loss_scalar = saved["total_loss"]
        self._globalstep_last_logged = saved["last_logged"]
        self._seconds_before, self._started = saved["seconds"], time.time()

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        # transformers takes the steps between logs, saves and evaluations from the checkpoint; here they are the
        # run's.
        self.state.compute_steps(self.args, max_steps)
        # A run that was killed after its last update is finished, but transformers would take one more step.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else position

    def _finalize_training(self, trial, num_train_samples, start_time):
        # Report loss, time and throughput of the whole run, not of the part since it was resumed.
        self._initial_global_step = 0
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


class _RestoreProgress(TrainerCallback):
    """Calls `Checkpoints.restore_progress` once transformers has reset what it restores."""

    def __init__(self, trainer: Checkpoints):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_progress()


def _listed(changed: list[Change]) -> str:
    return "; ".join(map(str, changed))


def _description(optimizer: torch.optim.Optimizer) -> str:
    """Describe an optimizer that was passed to the trainer: its class, and how many tensors each of its groups has."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} of groups of {sizes} tensors"
