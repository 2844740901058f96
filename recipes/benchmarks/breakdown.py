"""Measures where the time of an update goes: forward passes, backward passes, the optimizer, all the rest."""

from __future__ import annotations

import time
from statistics import median

import measure
from peft import PeftModel
from transformers import TrainerCallback

from trl_diffusion.trainers import DiffusionGRPOTrainer

PARTS = ("forward", "backward", "optimizer")


class _Clock(TrainerCallback):
    """Adds up the seconds that a trainer spends in each part."""

    def __init__(self, trainer: DiffusionGRPOTrainer):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.device = trainer.accelerator.device
        model = trainer.accelerator.unwrap_model(trainer.model)
        networks = [model.get_base_model() if isinstance(model, PeftModel) else model]
        if trainer.ref_model is not None:
            networks.append(trainer.accelerator.unwrap_model(trainer.ref_model))
        for network in networks:
            network.register_forward_pre_hook(lambda *_: self.start())
            network.register_forward_hook(lambda *_: self.stop("forward"))
        self.backward = trainer.accelerator.backward
        trainer.accelerator.backward = self.timed_backward
        trainer.add_callback(self)

    def timed_backward(self, *args, **kwargs):
        self.start()
        self.backward(*args, **kwargs)
        self.stop("backward")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.start()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.stop("optimizer")

    def start(self) -> None:
        measure.synchronise(self.device)
        self.started = time.perf_counter()

    def stop(self, part: str) -> None:
        measure.synchronise(self.device)
        self.seconds[part] += time.perf_counter() - self.started


def breakdown(trainer: DiffusionGRPOTrainer, rounds: int) -> dict[str, float]:
    """Return the shares of the time of `trainer.train()`, medians over rounds.

    `overhead` is all that is no forward and no backward pass, the optimizer included. The LM head and the scoring of
    targets are part of the forward pass; drawing tokens is not.
    """
    clock, shares = _Clock(trainer), []
    for _ in range(rounds):
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        total, _ = measure.time_and_peak(trainer.train, clock.device)
        own = {part: seconds / total for part, seconds in clock.seconds.items()}
        shares.append(own | {"overhead": 1 - own["forward"] - own["backward"]})
    return {part: median(share[part] for share in shares) for part in shares[0]}
