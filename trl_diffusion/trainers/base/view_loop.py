"""Several Monte-Carlo views of the same rows in one optimizer update."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer


class ViewLoop(Trainer):
    """Runs `Trainer.training_step` once per Monte-Carlo view of the same rows, as one step of the optimizer's window.

    It stands between TRL's trainer and transformers' in the method resolution order: TRL's `training_step` calls
    `super().training_step`, which is this loop, and so counts one step and one step time whatever the number of views.
    Only the last view synchronises gradients.
    """

    args: Any
    _view = 0

    def num_backwards(self) -> int:
        """Forward and backward passes of one update."""
        return 1

    def training_step(self, model, inputs, num_items_in_batch=None):
        state, last = self.accelerator.gradient_state, self.num_backwards() - 1
        sync = self.accelerator.sync_gradients
        # DeepSpeed takes its accumulation boundary from `sync_gradients`; `no_sync` is for the others
        hold = sync and self.accelerator.distributed_type != DistributedType.DEEPSPEED
        loss = torch.zeros((), device=self.args.device)
        try:
            for self._view in range(last + 1):
                state._set_sync_gradients(sync and self._view == last)
                with self.accelerator.no_sync(model) if hold and self._view < last else nullcontext():
                    loss = loss + super().training_step(model, inputs, num_items_in_batch)
        finally:
            state._set_sync_gradients(sync)
            self._view = 0
        return loss
