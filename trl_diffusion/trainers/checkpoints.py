"""Checkpoints from which a run goes on as if it had never stopped.

transformers saves weights, optimizer, schedule, random generators and its own state. A GRPO run also stands in the
middle of a rollout batch, of an epoch of its sampler and of what it averages for the next log; that is saved here, and
which checkpoints are whole (`trl_diffusion.trainers.manifest`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import RepeatSampler

from trl_diffusion.trainers.manifest import discard, fault, read_manifest, rotate, seal, survey

logger = logging.getLogger(__name__)

REFERENCE_WEIGHTS = "reference_model.safetensors"

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


class Checkpoints(Trainer):
    """Saves and restores a run at any optimizer step; stands before TRL's trainer in the method resolution order.

    A resumed run takes the same steps and writes the same log as one that was never interrupted, but for times. On one
    CPU process that is so bit for bit.
    """

    args: Any
    model: Any  # transformers types it as optional
    ref_model: Any
    forward_units: float
    entropy_coef: float
    _last_world_entropy: float
    _rollouts: dict[str, int]
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _metrics: dict[str, Any]
    _logs: dict[str, Any]
    _train_sampler: _EpochRepeatSampler | None = None
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
                processes; or if checkpoints cannot hold what changes.
        """
        if self.args.sync_ref_model and self.is_fsdp_enabled and self.args.save_strategy != "no":
            raise ValueError(
                "Checkpoints cannot hold a reference model that sync_ref_model changes and FSDP shards, so the run "
                "could not go on from them. Set save_strategy='no' or sync_ref_model=False, or use DDP or DeepSpeed."
            )
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
        torch.save(self._run_state(), folder / self._rollout_state_name())
        self._save_reference(folder)
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
            settings = {name: getattr(self.args, name) for name in _FIXED_SETTINGS}
            seal(folder, processes=self.accelerator.num_processes, settings=settings)

    def _run_state(self) -> dict[str, Any]:
        """What this process must remember; plain values and tensors."""
        return {
            "step": self._step,
            "rollouts": self._rollouts,
            "forward_units": self.forward_units,
            "buffer": self._buffered_inputs if self._buffer_in_use() else None,
            "metrics": _plain(self._metrics),
            "logs": _plain(self._logs),
            "loss": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "entropy_coef": self.entropy_coef,
            "last_world_entropy": self._last_world_entropy,
            "seconds": self._seconds_before + time.time() - self._started,
        } | self._extra_state()

    def _buffer_in_use(self) -> bool:
        """Whether the next step learns from the rollout batch of the last one."""
        return self._step % (self.args.steps_per_generation * self.args.num_iterations) != 0

    def _extra_state(self) -> dict[str, Any]:
        """What a method must remember in a checkpoint."""
        return {}

    def _rollout_state_name(self) -> str:
        return f"rollout_state_{self.accelerator.process_index}.pt"

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
        path = Path(checkpoint) / self._rollout_state_name()
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._step, self._rollouts, self.forward_units = state["step"], state["rollouts"], state["forward_units"]
        self._buffered_inputs = send_to_device(state["buffer"], self.accelerator.device)
        for mode, metrics in state["metrics"].items():
            self._metrics[mode].clear()
            self._metrics[mode].update(metrics)
        _refill(self._logs, state["logs"])
        self.entropy_coef, self._last_world_entropy = state["entropy_coef"], state["last_world_entropy"]
        self._load_extra_state(state)
        self._load_reference(Path(checkpoint))
        self._pending = state

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `_extra_state` gave."""

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

    # ---------------------------------------------------------------- data

    def _get_train_sampler(self, dataset=None):
        of_trl: Any = super()._get_train_sampler(dataset)
        self._train_sampler = _EpochRepeatSampler(
            data_source=of_trl.data_source,
            mini_repeat_count=of_trl.mini_repeat_count,
            batch_size=of_trl.batch_size,
            repeat_count=of_trl.repeat_count,
            shuffle=of_trl.shuffle,
            seed=of_trl.seed,
        )
        return self._train_sampler

    def _run_epoch(self, model, epoch, *args, **kwargs):
        # With several processes accelerate does not reach the sampler of a dataloader whose first batches are skipped
        if self._train_sampler is not None:
            self._train_sampler.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *args, **kwargs)

    # ---------------------------------------------------------------- a reference model that changes

    def _save_reference(self, folder: Path) -> None:
        """The reference weights, if `sync_ref_model` changes them; else they are those the run started from."""
        if self.ref_model is None or not self.args.sync_ref_model:
            return
        weights = {}
        for name, parameter in self.accelerator.unwrap_model(self.ref_model).named_parameters():
            with self._whole(parameter):
                if self.args.should_save:
                    weights[name] = parameter.detach().cpu().clone()
        if self.args.should_save:
            save_file(weights, folder / REFERENCE_WEIGHTS)

    def _load_reference(self, checkpoint: Path) -> None:
        if self.ref_model is None or not self.args.sync_ref_model:
            return
        with safe_open(checkpoint / REFERENCE_WEIGHTS, framework="pt") as weights:
            for name, parameter in self.accelerator.unwrap_model(self.ref_model).named_parameters():
                with self._whole(parameter):
                    parameter.data.copy_(weights.get_tensor(name))

    def _whole(self, parameter: torch.nn.Parameter):
        """Under ZeRO-3 a parameter is gathered for the context, and what the first process writes to it is kept."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if plugin is None or plugin.zero_stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


class _EpochRepeatSampler(RepeatSampler):
    """`RepeatSampler` whose order is a function of (seed, epoch), so that a resumed run sees the order it left."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed + epoch)


class _TakeBackPending(TrainerCallback):
    """Calls `Checkpoints.take_back_pending` when it is time."""

    def __init__(self, trainer: Checkpoints):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.take_back_pending()


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold a value: text, numbers, tensors, and dicts and lists of these."""
    if type(value) is dict:
        return all(map(is_plain, value.values()))
    if type(value) is list:
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


def _plain(value: Any) -> Any:
    """A table of log entries as `is_plain` wants it; what a reward function logged of another kind becomes text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if is_plain(value) else str(value)


def _refill(logs: dict[str, Any], saved: dict[str, Any]) -> None:
    """Put saved entries back into TRL's tables of bounded columns."""
    for name, values in saved.items():
        if isinstance(values, dict):
            _refill(logs[name], values)
        else:
            logs[name].clear()
            logs[name].extend(values)
