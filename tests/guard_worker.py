"""One process of the tests of guards: the second process alone meets what is guarded against.

accelerate launch --config_file … tests/guard_worker.py skip|raise <folder>
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from methods import method_named, text_reward
from test_guards import Steps, breaks
from trainer_helpers import parameters_of


def fails_on_the_second_process(completion_ids, **columns):
    if PartialState().process_index == 1:
        raise KeyError("no such answer")
    return [0.0] * len(completion_ids)


def make(folder: Path, policy: str, backend: dict):
    return method_named("agrpo").make(
        folder,
        reward=[fails_on_the_second_process, text_reward] if policy == "skip" else text_reward,
        reward_error="none",
        nonfinite_update=policy,
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        max_grad_norm=1.0,
        **backend,
    )


def main(policy: str, folder: Path) -> None:
    deepspeed = policy == "raise"
    backend = {"use_cpu": False, "ddp_backend": "gloo"} if deepspeed else {}
    report: dict = {}
    if deepspeed:
        try:
            make(folder, "skip", backend)
        except ValueError as error:
            report["refused"] = str(error)
    trainer = make(folder, policy, backend)
    wanted = DistributedType.DEEPSPEED if deepspeed else DistributedType.MULTI_CPU
    assert trainer.accelerator.distributed_type == wanted, trainer.accelerator.distributed_type
    steps = Steps(trainer)
    trainer.add_callback(steps)
    if trainer.accelerator.process_index == 1:
        breaks(trainer, "loss", update=2)
    try:
        trainer.train()
    except FloatingPointError as error:
        report["error"] = str(error)
    history = trainer.state.log_history
    report |= {
        "processes": trainer.accelerator.num_processes,
        "moved": [not torch.equal(a, b) for a, b in zip(steps.seen, steps.seen[1:], strict=False)],
        "unchanged_by_the_error": torch.equal(steps.seen[-1], parameters_of(trainer)),
        "skipped": [entry["guards/skipped_updates"] for entry in history if "guards/skipped_updates" in entry],
        "errors": [entry["guards/reward_errors"] for entry in history if "guards/reward_errors" in entry],
        "checksum": parameters_of(trainer).double().sum().item(),
    }
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(report))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # everything is written; gloo's threads can abort an interpreter that ends in its own time
