"""The reference model: what a KL term, or DMPO's weights, compare the policy with.

It is a copy of the policy's first weights, or the policy with its adapter turned off. TRL makes it by loading the
policy's path again, which fails for a model that was never saved and is wrong for one that changed since. So where the
policy came as an object, TRL is told that there is no reference, and gets a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from trl import GRPOConfig
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from trl_diffusion.adapters.precision import copy_as_reference
from trl_diffusion.runtime.launch import check_reference_loading


@dataclass(frozen=True)
class ReferenceSource:
    """Where the reference model of a run comes from.

    Args:
        copied: a copy of a policy that came as an object; `None` where TRL loads the path again, or an adapter is
            turned off.
        by_trl: whether TRL makes it.
    """

    copied: PreTrainedModel | None
    by_trl: bool

    @classmethod
    def of(cls, model: Any, args: GRPOConfig, peft_config: PeftConfig | None, needed: bool) -> ReferenceSource:
        """Prepare the reference model before TRL's trainer changes the policy.

        Args:
            model: the trainer's argument.
            args: the trainer's config.
            peft_config: of an adapter that TRL will make; `None` for none.
            needed: whether the run compares with a reference model.

        Raises:
            ValueError: if it cannot be had, or `sync_ref_model` has nothing to change.
        """
        adapter = isinstance(model, PeftModel) or peft_config is not None
        if args.sync_ref_model and adapter:
            raise ValueError("sync_ref_model=True needs a separate reference model; a LoRA run has none. Turn it off.")
        if needed and not adapter:
            check_reference_loading()
        copied, by_trl = None, needed
        if needed and isinstance(model, PreTrainedModel) and not adapter:
            if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
                raise ValueError(
                    "With ZeRO-3, where a reference model is needed, pass the model as a path or hub id, not as an "
                    "object: its weights are sharded and cannot be copied."
                )
            copied, by_trl = copy.deepcopy(model), False
        if needed and isinstance(model, PeftModel) and model.active_adapter != "default":
            copy_as_reference(model)  # TRL would copy the adapter called "default"
            by_trl = False
        return cls(copied, by_trl)

    def arguments_for_trl(self, args: GRPOConfig) -> None:
        """Set β so that TRL makes a reference model, or makes none; changes `args`.

        The trainer puts the run's own β back into `args` once TRL is through with it.
        """
        args.beta = float(self.by_trl)  # TRL makes one wherever beta is not 0
        args.sync_ref_model = args.sync_ref_model and self.by_trl

    def prepare(self, args: GRPOConfig, accelerator: Accelerator, deepspeed: bool, fsdp: bool) -> Any:
        """The copy, prepared for the backend; `None` without one."""
        if self.copied is None:
            return None
        if args.disable_dropout:
            disable_dropout_in_model(self.copied)
        if deepspeed:
            return prepare_deepspeed(self.copied, accelerator)
        if fsdp:
            return prepare_fsdp(self.copied, accelerator)
        # placed as the policy is, which is nowhere in a dry run
        placement = args.place_model_on_device  # type: ignore[attr-defined]
        return accelerator.prepare_model(self.copied, device_placement=placement, evaluation_mode=True)


@contextmanager
def reference_policy(policy: Any, separate: Any, accelerator: Accelerator) -> Iterator[Any]:
    """Yield the model to score with: the separate reference model, or the policy without its adapter.

    Args:
        policy: the trainer's model.
        separate: the separate reference model, or `None`.
        accelerator: of the run.
    """
    if separate is not None:
        yield separate
        return
    peft_model = accelerator.unwrap_model(policy)
    with use_adapter(peft_model, "ref" if "ref" in peft_model.peft_config else None):
        yield policy
