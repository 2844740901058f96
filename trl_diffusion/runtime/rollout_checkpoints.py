"""Checkpoints of a GRPO run, which may stand in the middle of a rollout batch.

To `trl_diffusion.runtime.checkpoints` this adds the rollout batch and the position in it, TRL's metrics of the steps
since the last log, a reference model that `sync_ref_model` changes, and an order of the prompts that is a function of
seed and epoch.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from trl.trainer.utils import RepeatSampler

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.runtime.checkpoints import Checkpoints
from trl_diffusion.runtime.earlier_buffers import upgrade
from trl_diffusion.runtime.meter import Meter
from trl_diffusion.runtime.run_facts import Facts, as_json
from trl_diffusion.sampling import Trajectory
from trl_diffusion.sampling.rollout import FinishedBatch

REFERENCE_WEIGHTS = "reference_model.safetensors"


class RolloutCheckpoints(Checkpoints):
    """`Checkpoints` for trainers that learn from rollouts; stands before TRL's trainer in the method resolution order.

    A resumed run takes the same steps and writes the same log as one that was never interrupted, but for times. On one
    CPU process that is so bit for bit.
    """

    state_file = "rollout_state"
    ref_model: Any
    reward_funcs: list[Any]
    reward_func_names: list[str]
    meter: Meter
    choices: Any
    last_rollout: tuple[Trajectory, FinishedBatch] | None
    _unshown_completions: bool
    entropy_coef: float
    _last_world_entropy: float
    _rollouts: dict[str, int]
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _metrics: dict[str, Any]
    _logs: dict[str, Any]
    _train_sampler: _EpochRepeatSampler | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """`Checkpoints.train`.

        Args:
            resume_from_checkpoint: see `Checkpoints.train`.
            *args: see `transformers.Trainer.train`.
            **kwargs: see `transformers.Trainer.train`.

        Raises:
            ValueError: as `Checkpoints.train`; or if checkpoints cannot hold what changes.
        """
        if self.args.sync_ref_model and self.is_fsdp_enabled and self.args.save_strategy != "no":
            raise ValueError(
                "Checkpoints cannot hold a reference model that sync_ref_model changes and FSDP shards, so the run "
                "could not be resumed. Set save_strategy='no' or sync_ref_model=False, or use DDP or DeepSpeed."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ---------------------------------------------------------------- what must be the same

    def _collect_facts(self) -> Facts:
        facts = super()._collect_facts()
        rewards: dict[str, Any] = {"list of reward functions": []}
        for name, function in zip(self.reward_func_names, self.reward_funcs, strict=True):
            step_aware = isinstance(function, StepAwareReward)
            rewards["list of reward functions"].append(f"{name} (step-aware)" if step_aware else name)
            if step_aware:
                settings = {name: value for name, value in vars(function).items() if not name.startswith("__")}
                rewards |= {f"step-aware reward's {name}": v for name, v in settings.items() if not callable(v)}
        return facts | {"run": facts["run"] | as_json(rewards)}

    def _fixed_weights(self) -> list[tuple[str, torch.nn.Parameter]]:
        if self.ref_model is None or self.args.sync_ref_model:
            return super()._fixed_weights()
        return list(self.accelerator.unwrap_model(self.ref_model).named_parameters())

    # ---------------------------------------------------------------- what a rollout run must remember

    def _write_state(self, folder: Path) -> None:
        super()._write_state(folder)
        self._save_reference(folder)

    def _run_state(self) -> dict[str, Any]:
        rollouts = {
            "step": self._step,
            "rollouts": self._rollouts,
            "forward_units": self.meter.forward_units,
            "buffer": self._buffered_inputs if self._buffer_in_use() else None,
            "metrics": _plain(self._metrics),
            "logs": _plain(self._logs),
            "entropy_coef": self.entropy_coef,
            "last_world_entropy": self._last_world_entropy,
        }
        return super()._run_state() | rollouts | self._extra_state()

    def _buffer_in_use(self) -> bool:
        """Return whether the next step learns from the rollout batch of the last one."""
        return self._step % (self.args.steps_per_generation * self.args.num_iterations) != 0

    def _extra_state(self) -> dict[str, Any]:
        """Return the state that TRL does not have: the likelihood's, and the rollout in use."""
        state = {"unshown_completions": self._unshown_completions} | self.choices.likelihood.state()
        # Only `ConfusionZoneCallback` looks at a rollout again.
        if self.last_rollout is not None and self.args.record_signals and self._buffer_in_use():
            trajectory, finished = self.last_rollout
            if is_plain(vars(finished)):
                state["last_rollout"] = vars(trajectory), vars(finished)
        return state

    def _take_back(self, state: dict[str, Any], checkpoint: Path) -> None:
        super()._take_back(state, checkpoint)
        self._step, self._rollouts = state["step"], state["rollouts"]
        self.meter.forward_units = state["forward_units"]
        buffer = upgrade(state["buffer"], int(self.args.num_generations or 1), self.choices.credit.refreshes)
        self._buffered_inputs = send_to_device(buffer, self.accelerator.device)
        for mode, metrics in state["metrics"].items():
            self._metrics[mode].clear()
            self._metrics[mode].update(metrics)
        _refill(self._logs, state["logs"])
        self.entropy_coef, self._last_world_entropy = state["entropy_coef"], state["last_world_entropy"]
        self._load_extra_state(state)
        self._load_reference(checkpoint)

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `_extra_state` gave."""
        self._unshown_completions = state.get("unshown_completions", True)  # checkpoints of 0.1.0.dev0 lack it
        small = {name: value for name, value in state.items() if name not in ("buffer", "last_rollout")}
        self.choices.likelihood.load_state(send_to_device(small, self.accelerator.device))
        if "last_rollout" in state:
            trajectory, finished = send_to_device(state["last_rollout"], self.accelerator.device)
            self.last_rollout = Trajectory(**trajectory), FinishedBatch(**finished)

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


class _EpochRepeatSampler(RepeatSampler):
    """`RepeatSampler` whose order is a function of (seed, epoch), so that a resumed run sees the order it left."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed + epoch)


def is_plain(value: Any) -> bool:
    """Return whether a checkpoint can hold a value: text, numbers, tensors, and dicts and lists of these."""
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
