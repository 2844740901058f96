"""One process of `test_distributed.py`: trains every case on the four-word model and writes down what it saw.

    accelerate launch --config_file trl_diffusion/accelerate_configs/cpu_zero3.yaml tests/distributed_worker.py \
        --backend zero3 --model CHECKPOINT --out FOLDER

It stops if the processes are not those of the backend, so that no case passes on another one.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, set_seed
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from datasets import Dataset
from launching import SILENCE
from methods import PROMPTS, Method, method_named, text_reward, with_property
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import tiny_mixture, tiny_model, tiny_tokenizer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainerCallback

from trl_diffusion.evaluation import AccuracyCallback, Estimate, evaluate_accuracy
from trl_diffusion.models import A2DQwen3LMHeadModel, Fast_dLLM_QwenForCausalLM, LLaDAModelLM
from trl_diffusion.runtime import rollouts as engine
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.trainers import TrajectoryGRPOTrainer
from trl_diffusion.trainers.held_out_samples import HeldOutSamples


@dataclass(frozen=True)
class Backend:
    """What the processes must turn out to be.

    Args:
        kind: distributed type.
        processes: how many.
        stage: of ZeRO, 0 without DeepSpeed.
        offload: optimizer state, and in stage 3 parameters too, are kept by DeepSpeed's CPU offload.
    """

    kind: DistributedType
    processes: int = 2
    stage: int = 0
    offload: bool = False


BACKENDS = {
    "single": Backend(DistributedType.NO, processes=1),
    "ddp": Backend(DistributedType.MULTI_CPU),
    "zero1": Backend(DistributedType.DEEPSPEED, stage=1),
    "zero2": Backend(DistributedType.DEEPSPEED, stage=2),
    "zero2_offload": Backend(DistributedType.DEEPSPEED, stage=2, offload=True),
    "zero3": Backend(DistributedType.DEEPSPEED, stage=3),
    "zero3_methods": Backend(DistributedType.DEEPSPEED, stage=3),
    "zero3_offload": Backend(DistributedType.DEEPSPEED, stage=3, offload=True),
    "fsdp2": Backend(DistributedType.FSDP),
}
EVERY = tuple(name for name in BACKENDS if name != "zero3_methods")
# Every case runs on these; the others differ from one of them in where state lies, and run fewer.
MAIN = ("single", "ddp", "zero2", "zero3")
# Methods that also run on the others.
COMPARED = ("agrpo", "diffu_grpo", "espo", "dmpo")
# The other methods; under ZeRO-3, the slowest, in a separate launch, which only `make test-release` runs.
MAIN_OF_OTHERS = ("single", "ddp", "zero2", "zero3_methods")
# One method for every way to go through views: drawn steps, masks one by one, masks together, two streams. All share
# the loop over views, so that these run with many views on every backend; the others do so alone (`test_properties`).
MANY_VIEWS = ("agrpo", "diffu_grpo", "espo", "dipo")


@dataclass(frozen=True)
class Case:
    """A training run that every backend repeats with the same number of rows in a micro-batch of all processes.

    Args:
        method: the method to train.
        settings: fields of its config.
        rows: rows of a micro-batch, over all processes.
        backends: where it runs.
        lora: what an adapter starts as: "random" matrices, or the "base" model; none without.
        unsaved: the model is given as an object whose weights are not those of the checkpoint.
        evaluate: run an evaluation after training.
        held_out: rows on which accuracy is measured before, during and after training.
        resume: start again from the first checkpoint and record that run.
        fault: breaks the run on purpose. "local rows": noise is keyed by the row within the process. "step per
            view": DeepSpeed is told that every backward pass ends an update.
    """

    method: Method
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 8
    backends: tuple[str, ...] = MAIN
    lora: str | None = None
    unsaved: bool = False
    evaluate: bool = False
    held_out: int = 0
    resume: bool = False
    fault: str | None = None


def a2d(**fields):
    return tiny_model(3, 6.0, A2DQwen3LMHeadModel, head_dim=8, block_size=0, **fields)


def llada_moe(**fields):
    return tiny_mixture("lladamoe", **fields)


def sdar_moe(**fields):
    return tiny_mixture("sdar_moe", **fields)


def llada2(**fields):
    return tiny_mixture("llada2_moe", **fields)


def fast_dllm(**fields):
    return tiny_model(10, 10.0, Fast_dLLM_QwenForCausalLM, block_size=4, **fields)


def cases() -> dict[str, Case]:
    """Every case by name."""
    agrpo = method_named("agrpo")
    # One entry per class: the settings that tell others of the same class apart do not touch the optimizer.
    counted = {method.trainer: method for method in reversed(with_property(5))}.values()
    # 24 completions, 12 per process: of the three groups the second lies on both.
    spread = {"num_generations": 8}
    three_updates = {"max_steps": 3, "learning_rate": 1e-2, "denoising_steps": 8}
    five_updates = {"max_steps": 5, "learning_rate": 1e-2}
    two_updates = {"max_steps": 2, "learning_rate": 0.1}
    one_batch = {"gradient_accumulation_steps": 1}
    return {
        **{
            f"{method.name}, one update": Case(
                method, spread, rows=12, backends=EVERY if method.name in COMPARED else MAIN_OF_OTHERS
            )
            for method in with_property(4)
        },
        **{
            f"{method.name}, three updates, few views": Case(
                method,
                three_updates | method.few_views,
                backends=MAIN if method.name in COMPARED else MAIN_OF_OTHERS,
            )
            for method in counted
        },
        **{
            f"{name}, three updates, many views": Case(
                method_named(name), three_updates | method_named(name).many_views
            )
            for name in MANY_VIEWS
        },
        **{
            f"{method.name}, five updates": Case(method, five_updates, backends=EVERY)
            for method in with_property(5)
            if method.name in COMPARED
        },
        "one micro-batch": Case(agrpo, one_batch, rows=16),
        "groups over micro-batches and processes": Case(agrpo, {"gradient_accumulation_steps": 4}, rows=4),
        # Two updates: before the first, policy and reference are equal and the KL has no gradient.
        "reference": Case(agrpo, two_updates | {"beta": 0.5}, backends=EVERY, evaluate=True),
        "reference, unsaved model": Case(
            agrpo,
            two_updates | {"beta": 0.5},
            backends=tuple(name for name, backend in BACKENDS.items() if backend.stage < 3),
            evaluate=True,
            unsaved=True,
        ),
        "reference, lora": Case(
            agrpo, two_updates | {"beta": 0.5, "learning_rate": 1.0}, backends=EVERY, evaluate=True, lora="base"
        ),
        # With less than 1 the reference keeps a part of where it was, so that order and number of updates show.
        "reference, synchronised": Case(
            agrpo,
            two_updates
            | {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.7},
            backends=EVERY,
            evaluate=True,
        ),
        "lora": Case(agrpo, lora="random", backends=EVERY),
        # Few rows and many blocks, so that one process has no row left while the other still writes.
        "sharded sampling": Case(
            agrpo,
            two_updates
            | one_batch
            | {"ds3_gather_for_generation": False, "num_generations": 2, "block_length": 1, "denoising_steps": 8},
            rows=4,
            backends=EVERY,
        ),
        # One group on both processes, of which one has nothing to probe.
        "sharded probing": Case(
            method_named("sapo"),
            one_batch
            | {"ds3_gather_for_generation": False, "num_generations": 8, "block_length": 2, "denoising_steps": 8},
            backends=(*MAIN, "fsdp2"),
        ),
        # The same where the weights are gathered for the continuations. And one held-out row, so one process has none.
        "probing on one process": Case(
            method_named("sapo"),
            one_batch | {"num_generations": 8, "block_length": 2, "denoising_steps": 8},
            backends=(*MAIN, "fsdp2"),
        ),
        # Under FSDP all processes decode the same rows.
        "accuracy on one process": Case(
            agrpo, two_updates, backends=tuple(name for name in EVERY if name != "fsdp2"), held_out=1
        ),
        # With momentum, because torch cannot load the state of an optimizer that has none under FSDP2.
        "resumed": Case(
            agrpo,
            three_updates | {"save_strategy": "steps", "save_steps": 1, "optim_args": "momentum=0.5"},
            backends=EVERY,
            resume=True,
        ),
        # The bounds of a rollout follow from what the policy has learnt from all rows of the ones before.
        "learnt bound": Case(
            method_named("diffpo"),
            three_updates | {"learn_bound": True, "unmasking": "entropy", "entropy_bound": 0.2},
            rows=12,
            backends=("single", "ddp", "zero2"),
        ),
        **{
            f"{network.__name__}, two updates": Case(
                replace(agrpo, network=network), two_updates, backends=("single", "zero3")
            )
            for network in (a2d, llada_moe, sdar_moe, llada2, fast_dllm)
        },
        "fault: local rows": Case(agrpo, one_batch, rows=16, backends=("single", "ddp"), fault="local rows"),
        "fault: step per view": Case(agrpo, three_updates, backends=("zero2",), fault="step per view"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--models", type=Path, required=True, help="folder with a checkpoint of every network")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # the imported modules are half a million objects, and every trainer collects garbage
    for name, case in cases().items():
        if arguments.backend in case.backends:
            faulthandler.dump_traceback_later(SILENCE - 20, exit=True)  # a stuck process says where
            start = time.perf_counter()
            model = arguments.models / case.method.network.__name__
            run(name, case, arguments.backend, str(model), arguments.out)
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


def run(name: str, case: Case, backend: str, model: str, out: Path) -> None:
    """Train a case and save what happened as `NAME-RANK.pt`."""
    folder = out / f"{name} trainer"
    if case.resume:
        first = make_trainer(case, backend, model, folder)
        first.train()
        close(first, backend)
    trainer = make_trainer(case, backend, model, folder)
    check_processes(trainer, backend)
    held_out = Dataset.from_dict({"prompt": PROMPTS[: case.held_out]})
    accuracy = AccuracyCallback(
        trainer, held_out, accuracy_of_one_step, every=1, samples=HeldOutSamples(folder, count=2)
    )
    if case.held_out:
        trainer.add_callback(accuracy)
    snapshots, updates = record_parameters(trainer)
    zero = BACKENDS[backend].stage > 0
    with recorded_rollouts(trainer) as rollouts, fault(case.fault, trainer):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if case.resume else None)
        if zero:
            check_engine(trainer, BACKENDS[backend])
        if BACKENDS[backend].kind == DistributedType.FSDP:
            check_shards(trainer)
        if case.evaluate:
            trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS}))
    result = {
        "rollouts": rollouts,
        "before": snapshots[0],
        "after": full_parameters(trainer),
        "updates": updates,
        "backward_passes_and_updates": len(snapshots) - 1,
        "passes": trainer.num_backwards(),
        "accuracy": [(step, measured.correct, measured.total) for step, measured in accuracy.history],
        "held-out samples": [*accuracy.samples.kept],
        "changes": sum(differ(a, b) for a, b in pairwise(snapshots)),
        "trainer_steps": trainer.state.global_step,
        "engine_steps": trainer.model_wrapped.global_steps if zero else None,
    }
    torch.save(result, out / f"{name}-{trainer.accelerator.process_index}.pt")
    close(trainer, backend)


def make_trainer(case: Case, backend: str, model: str, folder: Path):
    kind, method = BACKENDS[backend].kind, case.method
    per_process = case.rows // BACKENDS[backend].processes
    sharded = kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    # `use_cpu` would turn DeepSpeed and FSDP off, and without gloo accelerate would count one process
    device = {"use_cpu": False, "ddp_backend": "gloo"} if sharded else {"use_cpu": True}
    batch = {"per_device_train_batch_size": per_process, "per_device_eval_batch_size": per_process}
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=case.lora == "base") if case.lora else None
    if kind == DistributedType.FSDP:
        method = replace(method, config=lambda **settings: with_fsdp(case.method.config(**settings)))
    set_seed(0)  # for the matrices of LoRA
    return method.make(
        folder,
        model=changed(model) if case.unsaved else model,
        reward=never_ties if "max_steps" in case.settings else text_reward,
        peft_config=lora,
        **device | batch | {"ddp_timeout": SILENCE - 40} | case.settings,
    )


def with_fsdp(args):
    """The config; accelerate 1.15 starts FSDP only where it found GPUs, and is told here that it did."""
    assert PartialState().num_processes == 2 and PartialState().device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def changed(checkpoint: str) -> LLaDAModelLM:
    """The model of a checkpoint with other weights, so that loading it again would give another one."""
    model = LLaDAModelLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8)
    return model


def accuracy_of_one_step(model, dataset: Dataset, on_sample: Callable) -> Estimate:
    """Measure accuracy on canvases that a single forward writes, the fewest there can be."""
    return evaluate_accuracy(
        model,
        tiny_tokenizer(),
        dataset,
        lambda text, row: True,
        decoding=SamplingConfig(4, 1, 4, temperature=0.0, unmasking="max_prob"),
        progress=False,
        on_sample=on_sample,
    )


def never_ties(completions, **kwargs) -> list[float]:
    return [float(row) for row in range(len(completions))]


def close(trainer, backend: str) -> None:
    if BACKENDS[backend].stage:
        trainer.model_wrapped.destroy()


# ---------------------------------------------------------------- what must be so


def check_processes(trainer, backend: str) -> None:
    expected, accelerator = BACKENDS[backend], trainer.accelerator
    assert accelerator.distributed_type == expected.kind, accelerator.distributed_type
    assert accelerator.num_processes == expected.processes, accelerator.num_processes
    assert accelerator.device.type == "cpu", accelerator.device
    if expected.stage:
        assert accelerator.state.deepspeed_plugin.zero_stage == expected.stage
    if expected.kind == DistributedType.FSDP:
        assert accelerator.is_fsdp2 and trainer.is_fsdp_enabled


def check_engine(trainer, backend: Backend) -> None:
    """DeepSpeed ran the stage asked for, plain SGD and no clipping; ZeRO-3 keeps no tensor whole."""
    engine = trainer.model_wrapped
    assert engine.zero_optimization_stage() == backend.stage and engine.world_size == backend.processes
    assert engine.gradient_clipping() == 0.0
    assert isinstance(engine.basic_optimizer, torch.optim.SGD), type(engine.basic_optimizer)
    assert engine.zero_cpu_offload() == backend.offload
    if backend.stage == 3:
        assert (engine.zero_offload_param() is not None) == backend.offload
        assert engine.zero_param_persistence_threshold() == 0
        for name, parameter in engine.module.named_parameters():
            assert parameter.numel() == 0 and not parameter.ds_persist, name
            assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // backend.processes), name


def check_shards(trainer) -> None:
    """FSDP2 wrapped the decoder layers and the rest, and every parameter is cut in two."""
    assert isinstance(trainer.model_wrapped, FSDPModule)
    assert sum(isinstance(module, FSDPModule) for module in trainer.model.modules()) > 1
    for name, parameter in trainer.model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),), name
        assert parameter.to_local().numel() < parameter.numel(), name


# ---------------------------------------------------------------- what is recorded


@contextmanager
def recorded_rollouts(trainer) -> Iterator[list[dict[str, Any]]]:
    """The rows of this process as every rollout leaves them, before TRL shuffles them.

    `forwards`, `whole` and `merged` say how the sampler ran: network evaluations, whether the weights lay there whole,
    and whether an adapter was merged into them;
    `probing` what the continuations of a `StepAwareReward` cost. `selection` are the steps that a selector chose, and
    `process_reward` those of the rows of all processes, `None` for a row that was not probed.
    """
    seen: list[dict[str, Any]] = []
    generate, sample, sampler, probing = trainer._generate_and_score_completions, engine.sample, {}, Counter()

    def record_sample(model, *args, state=None, **kwargs):
        whole = all(parameter.numel() > 0 and not isinstance(parameter, DTensor) for parameter in model.parameters())
        trajectory = sample(model, *args, state=state, **kwargs)
        if state is None:
            adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            merged = bool(adapted) and all(layer.merged for layer in adapted)
            sampler.update(forwards=trajectory.forwards, whole=whole, merged=merged)
        else:
            probing.update(calls=1, forwards=trajectory.forwards, sync_forwards=trajectory.sync_forwards)
        return trajectory

    def record_rows(inputs):
        probing.clear()
        output = generate(inputs)
        rows = {key: value.clone() for key, value in output.items() if isinstance(value, torch.Tensor) and value.dim()}
        if "prompt_masked" in rows:  # every process pads to its own longest prompt
            hidden = rows["prompt_masked"]
            rows["prompt_masked"] = torch.nn.functional.pad(hidden, (8 - hidden.size(-1), 0))
        chosen = trainer.last_selection if isinstance(trainer, TrajectoryGRPOTrainer) else None
        process_reward = list(trainer._logs["extra"]["process_reward"]) if trainer._probe else []
        more = {"selection": None if chosen is None else chosen.tolist(), "process_reward": process_reward}
        seen.append({"rows": rows, **sampler, **more, "probing": dict(probing)})
        return output

    with (
        patch.object(engine, "sample", record_sample),
        patch.object(trainer, "_generate_and_score_completions", record_rows),
    ):
        yield seen


def record_parameters(trainer) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The parameters at the start, after every backward pass (DeepSpeed steps there) and after every update; and those
    after every update alone."""
    seen: list[dict[str, torch.Tensor]] = []
    updates: list[dict[str, torch.Tensor]] = []
    backward = trainer.accelerator.backward

    def record_backward(*args, **kwargs):
        backward(*args, **kwargs)
        seen.append(full_parameters(trainer))

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(full_parameters(trainer))

        def on_optimizer_step(self, args, state, control, **kwargs):
            seen.append(full_parameters(trainer))
            updates.append(seen[-1])

    trainer.accelerator.backward = record_backward
    trainer.add_callback(Record())
    return seen, updates


def full_parameters(trainer) -> dict[str, torch.Tensor]:
    """A copy of every parameter, whole."""
    named = list(trainer.model.named_parameters())
    gathered = nullcontext()
    if trainer.is_deepspeed_enabled:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([parameter for _, parameter in named])
    with gathered:
        return {name: whole(parameter.detach()).clone() for name, parameter in named}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, second[name]) for name, value in first.items())


@contextmanager
def fault(kind: str | None, trainer) -> Iterator[None]:
    """Break the trainer as `Case.fault` says."""
    backward = DeepSpeedEngineWrapper.backward

    def always_step(self, loss, sync_gradients=True, **kwargs):
        backward(self, loss, sync_gradients=True, **kwargs)

    patches = {
        None: nullcontext(),
        "local rows": patch.object(trainer, "_global_rows", torch.arange),
        "step per view": patch.object(DeepSpeedEngineWrapper, "backward", always_step),
    }
    with patches[kind]:
        yield


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # everything is written; gloo's threads can abort an interpreter that ends in its own time
