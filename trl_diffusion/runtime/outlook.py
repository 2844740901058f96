"""What is ahead of a run: updates and epochs, learning rate, and the checkpoints that it leaves on the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers.trainer_utils import SaveStrategy, SchedulerType

from trl_diffusion.runtime import cost
from trl_diffusion.runtime.run import RolloutRun, TrainingRun
from trl_diffusion.runtime.text import amount, byte_size, plural


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Args:
        updates: optimizer updates; `None` if they follow from the number of rows, and that is not known.
        epoch: updates that make an epoch; `None` if the number of rows is not known.
    """

    updates: int | None
    epoch: int | None

    @classmethod
    def of(cls, args: Any, epoch: int | None) -> Length:
        """Return the length of a run, from its settings and the updates that make an epoch."""
        if args.max_steps > 0:
            return cls(args.max_steps, epoch)
        return cls(None if epoch is None else math.ceil(args.num_train_epochs * epoch), epoch)

    def __str__(self) -> str:
        if self.updates is None:
            return "its length follows from the rows, and none were read: --dataset_size assumes a number"
        if self.epoch is None:
            return plural(self.updates, "update")
        return f"{plural(self.updates, 'update')} = {amount(self.updates / self.epoch)} epochs"


def rollout_length(run: RolloutRun) -> Length:
    """Return the length of a run that learns from rollouts. An epoch gives every prompt to one rollout."""
    args = run.args
    if run.rows is None:
        return Length.of(args, None)
    rollouts = run.rows // (int(args.generation_batch_size or 0) // run.group)
    return Length.of(args, max(math.ceil(rollouts * cost.updates_per_rollout(args)), 1))


def learning_rate(args: Any, updates: int | None) -> str:
    """Describe learning rate, schedule and optimizer.

    Args:
        args: the settings.
        updates: of the run; `None` if not known.
    """
    warmup = "no"
    if args.warmup_steps and args.lr_scheduler_type != SchedulerType.CONSTANT:  # which has none, whatever is set
        share = f"{100 * args.warmup_steps:g} % of the updates"
        steps = int(args.warmup_steps) if args.warmup_steps >= 1 else None
        steps = args.get_warmup_steps(updates) if updates is not None else steps
        warmup = f"{share if steps is None else plural(steps, 'update')} of"
    parts = [
        f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        f"{warmup} warm-up",
        f"{args.optim.value}, weight decay {args.weight_decay:g}",
        f"gradient norm at most {args.max_grad_norm:g}" if args.max_grad_norm else "",
    ]
    return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Disk:
    """What a run leaves on the disk, all processes together.

    Args:
        model: bytes of the trained weights, which are saved at the end and in every checkpoint.
        checkpoint: bytes of a checkpoint; `None` if the size of the optimizer's state is not known.
        written: checkpoints that are written; `None` if not known.
        kept: checkpoints that are kept; `None` if not known.
    """

    model: float
    checkpoint: float | None
    written: int | None
    kept: int | None

    @classmethod
    def of(cls, run: TrainingRun, updates: int | None) -> Disk:
        """Return the estimate for a run of so many updates; `None` if they are not known."""
        args, launch, optimizer = run.args, run.launch, cost.policy_memory(run).optimizer
        model = cost.weight_bytes(weight for weight in run.model.parameters() if weight.requires_grad)
        checkpoint: float | None = model
        if not args.save_only_model:
            # The processes write their shares of the optimizer's state, and DeepSpeed the weights a second time.
            copies = 2 if launch.deepspeed else 1
            checkpoint = None if optimizer is None else copies * model + optimizer / launch.share(1)
        written = _checkpoints(args, updates)
        limit = args.save_total_limit or None
        return cls(model, checkpoint, written, written if limit is None or written is None else min(limit, written))

    def __str__(self) -> str:
        what = f"{byte_size(self.model)} of trained weights at the end"
        if self.written == 0:
            return f"none; {what}"
        if self.checkpoint is None:
            return f"the size of the optimizer's state is not known; {what}"
        if self.written is None or self.kept is None:
            return f"{byte_size(self.checkpoint)} each, how many is not known; {what}"
        # An old checkpoint is deleted when the new one is whole.
        most = min(self.kept + 1, self.written) * self.checkpoint + self.model
        kept = f"all {self.kept} kept" if self.kept == self.written else f"the last {self.kept} of {self.written} kept"
        return f"{kept}, {byte_size(self.checkpoint)} each; {what}; {byte_size(most)} on the disk at most"


def _checkpoints(args: Any, updates: int | None) -> int | None:
    """Return how many checkpoints are written in so many updates; `None` if that is not known."""
    if args.save_strategy == SaveStrategy.NO:
        return 0
    if args.save_strategy == SaveStrategy.EPOCH:
        return math.ceil(args.num_train_epochs) if args.max_steps <= 0 else None
    if args.save_strategy != SaveStrategy.STEPS or updates is None:
        return None
    every = args.save_steps if args.save_steps >= 1 else math.ceil(updates * args.save_steps)
    return math.ceil(updates / every)


def outlook_facts(run: TrainingRun, length: Length) -> dict[str, str]:
    """Return the facts for the report: learning rate and checkpoints."""
    saved = "adapter" if isinstance(run.model, PeftModel) else "model"
    every = f"every {run.args.save_steps:g} updates, " if run.args.save_strategy == SaveStrategy.STEPS else ""
    return {
        "learning rate": learning_rate(run.args, length.updates),
        "checkpoints": f"{saved}, {every}{Disk.of(run, length.updates)}",
    }
