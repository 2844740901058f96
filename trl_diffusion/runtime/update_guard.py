"""Updates under the policy of `GuardConfig`: what happens when the loss or the gradient is not finite."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

logger = logging.getLogger(__name__)


class GuardedUpdates(Trainer):
    """Looks at the loss and the gradient before every step of the optimizer.

    It stands before TRL's trainer in the method resolution order.
    """

    args: Any
    model: Any  # transformers types it as optional
    _metrics: Any
    _losses_finite: torch.Tensor | None = None

    def check_update_policy(self) -> None:
        """Refuse what cannot be done.

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
        if self.model.training:
            finite = loss.detach().isfinite()
            self._losses_finite = finite if self._losses_finite is None else self._losses_finite & finite
            if self._steps_in_backward() and self.accelerator.sync_gradients:
                self._check_update(model, None)  # the last moment before the step

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._check_update(model, grad_norm)
        return grad_norm

    def _steps_in_backward(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _check_update(self, model, grad_norm) -> None:
        finite, self._losses_finite = self._losses_finite, None
        loss_is_bad = finite is not None and not bool(finite)
        # The loss scaler of fp16 meets infinite gradients in ordinary operation, and leaves such updates out itself.
        looked_at = grad_norm is not None and self.accelerator.mixed_precision != "fp16"
        norm_is_bad = looked_at and not math.isfinite(float(grad_norm))
        flags = torch.tensor([loss_is_bad, norm_is_bad], dtype=torch.long, device=self.accelerator.device)
        loss_is_bad, norm_is_bad = self.accelerator.reduce(flags, reduction="sum").bool().tolist()
        skip = self.args.nonfinite_update == "skip"
        if skip:
            self._metrics["train"]["guards/skipped_updates"].append(float(loss_is_bad or norm_is_bad))
        if not (loss_is_bad or norm_is_bad):
            return
        bad = " and ".join(
            name for name, is_bad in (("the loss", loss_is_bad), ("the gradient norm", norm_is_bad)) if is_bad
        )
        what = f"Update {self.state.global_step + 1}: not finite: {bad}"
        if not skip:
            stepped = self._steps_in_backward() and grad_norm is not None
            raise FloatingPointError(
                f"{what}. "
                + ("DeepSpeed has already tried the step; go back to a checkpoint. " if stepped else "")
                + "Lower learning_rate, set max_grad_norm, or use bfloat16 or float32 in place of float16"
                + ("." if self._steps_in_backward() else "; nonfinite_update='skip' leaves such updates out.")
            )
        # Without gradients the optimizer touches neither parameters nor its own state; zeros would still decay them.
        model.zero_grad(set_to_none=True)
        if self.accelerator.is_main_process:
            logger.warning("%s. The update is skipped; the metric guards/skipped_updates counts.", what)
