"""Apply the policy of `UpdateGuardConfig` to updates whose loss or gradient is not finite."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from trl_diffusion.runtime.meter import Meter

logger = logging.getLogger(__name__)


class GuardedUpdates(Trainer):
    """Checks that the loss and the gradient are finite before every step of the optimizer.

    This mixin stands before TRL's trainer in the method resolution order.
    """

    args: Any
    model: Any  # transformers types it as optional
    meter: Meter
    _losses_finite: torch.Tensor | None = None

    def check_update_policy(self) -> None:
        """Refuse a policy that the backend cannot follow.

        Raises:
            ValueError: for `skip` with DeepSpeed.
        """
        if self.args.nonfinite_update == "skip" and self.is_deepspeed_enabled:
            raise ValueError(
                "nonfinite_update='skip' does not work with DeepSpeed, which takes the optimizer step inside of the "
                "backward pass, before the gradient can be looked at. Set nonfinite_update='raise'."
            )

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        self.look_at_loss(model, loss)
        return loss

    def look_at_loss(self, model, loss: torch.Tensor) -> None:
        """Remember whether a training loss is finite; a trainer that computes its own loss calls this with it."""
        if not self.model.training:
            return
        # Kept as a tensor: reading it here would make the host wait for the device at every micro-batch.
        finite = loss.detach().isfinite()
        self._losses_finite = finite if self._losses_finite is None else self._losses_finite & finite
        # DeepSpeed takes the step inside of the last backward pass, so this is the last moment before it.
        if self._steps_in_backward() and self.accelerator.sync_gradients:
            self._check_update(model, None)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._check_update(model, grad_norm)
        return grad_norm

    def _steps_in_backward(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _check_update(self, model, grad_norm) -> None:
        """Apply the policy to an update that is about to be made; with a gradient norm DeepSpeed has made it already.

        Raises:
            FloatingPointError: if loss or gradient are not finite and the policy is `raise`.
        """
        not_finite = self._what_is_not_finite(grad_norm)
        skips = self.args.nonfinite_update == "skip"
        if skips:
            self.meter.add("train", {"guards/skipped_updates": float(not_finite is not None)})
        if not_finite is None:
            return
        problem = f"Update {self.state.global_step + 1}: not finite: {not_finite}"
        if not skips:
            raise FloatingPointError(f"{problem}. {self._advice(already_made=grad_norm is not None)}")
        # Without gradients the optimizer touches neither parameters nor its own state; zeros would still decay them.
        model.zero_grad(set_to_none=True)
        if self.accelerator.is_main_process:
            logger.warning("%s. The update is skipped; the metric guards/skipped_updates counts.", problem)

    def _what_is_not_finite(self, grad_norm) -> str | None:
        """Name what is not finite on any process since the last update, the same on all; `None` if everything is."""
        finite, self._losses_finite = self._losses_finite, None
        bad_loss = finite is not None and not bool(finite)
        # The loss scaler of fp16 expects occasional infinite gradients and skips those steps itself.
        checks_norm = grad_norm is not None and self.accelerator.mixed_precision != "fp16"
        bad_norm = checks_norm and not math.isfinite(float(grad_norm))
        # All processes must come to the same decision: one that alone skips a step would drift from the others.
        flags = torch.tensor([bad_loss, bad_norm], dtype=torch.long, device=self.accelerator.device)
        found = self.accelerator.reduce(flags, reduction="sum").tolist()
        names = [name for name, count in zip(("the loss", "the gradient norm"), found, strict=True) if count]
        return " and ".join(names) or None

    def _advice(self, already_made: bool) -> str:
        advice = "Lower learning_rate, set max_grad_norm, or use bfloat16 or float32 in place of float16"
        if not self._steps_in_backward():
            return f"{advice}; nonfinite_update='skip' leaves such updates out."
        if already_made:
            return f"DeepSpeed has already tried the step; go back to a checkpoint. {advice}."
        return f"{advice}."
