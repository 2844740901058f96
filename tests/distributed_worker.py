"""One process of `test_distributed.py`: trains every case on the four-word model and writes down what it saw.

    accelerate launch --config_file recipes/accelerate_configs/cpu_zero3.yaml tests/distributed_worker.py \
        --backend zero3 --model PATH --out FOLDER

It stops if the processes are not those of the backend, so that no case passes on another one.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import DistributedType, set_seed
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from methods import METHODS, Method, text_reward, with_property
from peft import LoraConfig
from transformers import TrainerCallback

# distributed type, processes, ZeRO stage
BACKENDS = {
    "single": (DistributedType.NO, 1, 0),
    "ddp": (DistributedType.MULTI_CPU, 2, 0),
    "zero2": (DistributedType.DEEPSPEED, 2, 2),
    "zero3": (DistributedType.DEEPSPEED, 2, 3),
}
RECORDED = ("completion_ids", "unmask_step", "view_steps", "view_weights", "advantages", "old_per_token_logps")


def never_ties(completions, **kwargs) -> list[float]:
    return [float(row) for row in range(len(completions))]


@dataclass(frozen=True)
class Case:
    """A training run that every backend repeats with the same `rows_per_step` rows in a micro-batch of all processes.

    `fault` breaks the run on purpose: "local rows" keys the noise by the row within the process, "step per view"
    tells DeepSpeed that every view ends an update.
    """

    method: Method
    settings: dict[str, Any] = field(default_factory=dict)
    rows_per_step: int = 8
    backends: tuple[str, ...] = tuple(BACKENDS)
    lora: bool = False
    fault: str | None = None


def cases() -> dict[str, Case]:
    """Every case by name."""
    agrpo = next(method for method in METHODS if method.name == "agrpo")
    one = {"rows_per_step": 16, "settings": {"gradient_accumulation_steps": 1}}
    of_steps = {"max_steps": 3, "learning_rate": 1e-2}
    return {
        **{f"update: {method.name}": Case(method) for method in with_property(4)},
        **{
            f"{views} views: {method.name}": Case(method, of_steps | {"num_mc_samples": views})
            for method in with_property(5)
            for views in (1, 8)
        },
        "one micro-batch": Case(agrpo, **one),
        "groups over processes": Case(agrpo, {"gradient_accumulation_steps": 4}, rows_per_step=4),
        # Two updates: at the first, policy and reference are equal and the KL has no gradient.
        "reference": Case(agrpo, {"beta": 0.5, "max_steps": 2}),
        "lora": Case(agrpo, lora=True),
        # Few rows and many blocks, so that a process has no row left while the other still writes.
        "sharded sampling": Case(
            agrpo,
            {"ds3_gather_for_generation": False, "num_generations": 2, "gradient_accumulation_steps": 1}
            | {"block_length": 1, "denoising_steps": 8, "max_steps": 2, "learning_rate": 0.1},
            rows_per_step=4,
        ),
        "fault: local rows": Case(agrpo, **one, backends=("single", "ddp"), fault="local rows"),
        "fault: step per view": Case(agrpo, of_steps, backends=("single", "zero2"), fault="step per view"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--model", required=True, help="checkpoint of the model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=280.0, help="seconds after which a stuck process says where")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.timeout, exit=True)
    torch.set_num_threads(1)
    for name, case in cases().items():
        if arguments.backend in case.backends:
            print(f"case: {name}", flush=True)
            run(name, case, arguments.backend, arguments.model, arguments.out)


def run(name: str, case: Case, backend: str, model: str, out: Path) -> None:
    """Trains a case and saves what happened as `NAME-RANK.pt`."""
    trainer = make_trainer(case, backend, model, out / "trainer")
    check_processes(trainer, backend)
    rollouts = record_rollouts(trainer)
    snapshots = record_parameters(trainer)
    with fault(case.fault, trainer):
        trainer.train()
    if backend.startswith("zero"):
        check_engine(trainer, backend)
    result = {
        "rollouts": rollouts,
        "parameters": full_parameters(trainer),
        "trainable": [key for key, value in named_parameters(trainer) if value.requires_grad],
        "before": snapshots[0],
        "changes": sum(differ(a, b) for a, b in zip(snapshots, snapshots[1:], strict=False)),
        "snapshots": len(snapshots),
        "engine_steps": trainer.model_wrapped.global_steps if backend.startswith("zero") else None,
        "trainer_steps": trainer.state.global_step,
    }
    torch.save(result, out / f"{name}-{trainer.accelerator.process_index}.pt")
    if backend.startswith("zero"):
        trainer.model_wrapped.destroy()
    del trainer, rollouts, snapshots
    gc.collect()


def make_trainer(case: Case, backend: str, model: str, folder: Path):
    processes = BACKENDS[backend][1]
    # `use_cpu` would turn DeepSpeed off, and without gloo accelerate would count one process
    backend_settings = {"use_cpu": False, "ddp_backend": "gloo"} if backend.startswith("zero") else {"use_cpu": True}
    set_seed(0)  # LoRA matrices
    return case.method.make(
        folder,
        model=model,
        reward=never_ties if "max_steps" in case.settings else text_reward,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if case.lora else None,
        **backend_settings
        | {"per_device_train_batch_size": case.rows_per_step // processes, "ddp_timeout": 120}
        | case.settings,
    )


def check_processes(trainer, backend: str) -> None:
    kind, processes, stage = BACKENDS[backend]
    accelerator = trainer.accelerator
    assert accelerator.distributed_type == kind, accelerator.distributed_type
    assert accelerator.num_processes == processes, accelerator.num_processes
    assert accelerator.device.type == "cpu", accelerator.device
    if stage:
        assert accelerator.state.deepspeed_plugin.zero_stage == stage


def check_engine(trainer, backend: str) -> None:
    """DeepSpeed ran in the stage asked for, without clipping, on the optimizer asked for; ZeRO-3 cut every tensor."""
    engine, stage = trainer.model_wrapped, BACKENDS[backend][2]
    assert engine.zero_optimization_stage() == stage and engine.world_size == 2
    assert engine.gradient_clipping() == 0.0
    assert isinstance(engine.basic_optimizer, torch.optim.SGD), type(engine.basic_optimizer)
    if stage == 3:
        assert engine.zero_param_persistence_threshold() == 0
        for name, parameter in engine.module.named_parameters():
            assert not parameter.ds_persist, name
            assert parameter.numel() == 0, name  # nothing is whole between two forwards …
            assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // 2), name  # … and here is half of it


def record_rollouts(trainer) -> list[dict[str, torch.Tensor]]:
    """The rows of this process as every rollout leaves them, before TRL shuffles them."""
    seen: list[dict[str, Any]] = []
    generate, plan = trainer._generate_and_score_completions, trainer._plan
    forwards = []

    def record_plan(mode, trajectory, learns):
        forwards.append(trajectory.forwards)
        return plan(mode, trajectory, learns)

    def record(inputs):
        rows = generate(inputs)
        kept = [*RECORDED, *(["ref_per_token_logps"] if trainer.beta else [])]
        seen.append({key: rows[key].clone() for key in kept} | {"forwards": forwards[-1]})
        seen[-1]["global_row"] = rows["global_row"].clone()
        return rows

    trainer._generate_and_score_completions, trainer._plan = record, record_plan
    return seen


def record_parameters(trainer) -> list[dict[str, torch.Tensor]]:
    """The parameters at the start, after every backward pass (DeepSpeed steps there) and after every update."""
    seen: list[dict[str, torch.Tensor]] = []
    backward = trainer.accelerator.backward

    def record_backward(*args, **kwargs):
        backward(*args, **kwargs)
        seen.append(full_parameters(trainer))

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(full_parameters(trainer))

        def on_optimizer_step(self, args, state, control, **kwargs):
            seen.append(full_parameters(trainer))

    trainer.accelerator.backward = record_backward
    trainer.add_callback(Record())
    return seen


def named_parameters(trainer) -> list[tuple[str, torch.nn.Parameter]]:
    return list(trainer.accelerator.unwrap_model(trainer.model).named_parameters())


def full_parameters(trainer) -> dict[str, torch.Tensor]:
    """A copy of every parameter, whole."""
    named = named_parameters(trainer)
    with gathered([parameter for _, parameter in named]):
        return {name: parameter.detach().clone() for name, parameter in named}


def gathered(parameters):
    from deepspeed import zero

    sharded = [parameter for parameter in parameters if zero.partition_parameters.is_zero_param(parameter)]
    return zero.GatheredParameters(sharded) if sharded else nullcontext()


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, second[key]) for key, value in first.items())


@contextmanager
def fault(kind: str | None, trainer) -> Iterator[None]:
    if kind == "local rows":
        with patch.object(trainer, "_global_rows", torch.arange):
            yield
    elif kind == "step per view":
        backward = DeepSpeedEngineWrapper.backward

        def step_always(self, loss, sync_gradients=True, **kwargs):
            backward(self, loss, sync_gradients=True, **kwargs)

        with patch.object(DeepSpeedEngineWrapper, "backward", step_always):
            yield
    else:
        yield


if __name__ == "__main__":
    main()
