"""Trains the four-word model, is killed at given moments, and resumes with `resume_from_checkpoint=True`.

    python tests/resume_worker.py --cases agrpo diffu_grpo --out FOLDER
    accelerate launch --config_file trl_diffusion/accelerate_configs/cpu_zero2.yaml tests/resume_worker.py \
        --cases "agrpo on two processes" --zero 2 --out FOLDER

Every attempt is a process of its own, forked after the imports, that ends by SIGKILL: it sends it to itself at the
moment asked for, or this process sends it at a random time. The last attempt finishes. What it leaves in
`FOLDER/CASE/killed.pt` must be what an uninterrupted run leaves in `whole.pt`; `kills.txt` says where each attempt
ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from launching import SILENCE, free_port
from methods import PROMPTS, method_named
from peft import LoraConfig
from tiny import tiny_model
from transformers import BitsAndBytesConfig, TrainerCallback, TrainerState

import trl_diffusion.runtime.rollouts as engine
from trl_diffusion.evaluation import AccuracyCallback, Estimate
from trl_diffusion.models import LLaDAModelLM
from trl_diffusion.runtime import manifest

SAVE_STEPS = 2
TIMES = ("step_time", "seconds", "runtime", "per_second")  # what may differ in a log, by the end of its name

# Two inner updates on four micro-batches, two of which make an update: a rollout batch lasts for four updates, an
# epoch (8 prompts, 4 in a rollout batch) for eight. Logs and checkpoints fall on other updates.
SETTINGS: dict[str, Any] = dict(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    steps_per_generation=4,
    num_iterations=2,
    num_mc_samples=2,
    max_steps=30,
    learning_rate=0.02,
    optim="adamw_torch",
    lr_scheduler_type="cosine",
    max_grad_norm=0.5,
    logging_steps=3,
    save_strategy="steps",
    save_steps=SAVE_STEPS,
    save_total_limit=2,
)
UPDATES_PER_ROLLOUT = 4


@dataclass(frozen=True)
class Kill:
    """A moment: the phase of the update that `step` updates precede, or of what is done after `step` updates."""

    phase: str
    step: int
    rank: int = 0


@dataclass(frozen=True)
class Case:
    """A run and the moments at which it is killed.

    Args:
        method: name of the method.
        settings: fields of its config, over `SETTINGS`.
        kills: in the order of their steps.
        adapter: `None`, `lora`, or `qlora` (4 bits).
        changes: settings of the last attempt and of the uninterrupted run.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    kills: tuple[Kill, ...] = ()
    adapter: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)


IN_AN_UPDATE = ("rollout", "view", "accumulation", "optimizer step", "between")
IN_A_CHECKPOINT = ("rollout state", "weights", "trainer state", "manifest", "rotation")


def seeded_kills(seed: int) -> tuple[Kill, ...]:
    """Every phase once, in random order at random steps, and one kill from outside at a random time."""
    generator = random.Random(seed)
    phases = [*IN_AN_UPDATE, *IN_A_CHECKPOINT]
    generator.shuffle(phases)
    kills, step = [], 0
    for phase in phases:
        step += generator.randint(1, 2)
        needs = {"rollout": UPDATES_PER_ROLLOUT} | dict.fromkeys(IN_A_CHECKPOINT, SAVE_STEPS)
        step += -step % needs.get(phase, 1)
        kills.append(Kill(phase, step))
    return (*kills, Kill("timer", step + 1))


def cases() -> dict[str, Case]:
    adapter_kills = (Kill("accumulation", 3), Kill("weights", 4), Kill("between", 7))
    # The last one is in the second epoch, before its second rollout.
    rank_kills = (Kill("rollout", 4, rank=1), Kill("shard", 6, rank=1), Kill("accumulation", 11))
    divided = {"per_device_train_batch_size": 2, "max_steps": 14}
    return {
        "agrpo": Case("agrpo", kills=seeded_kills(0)),
        "diffu_grpo": Case(
            "diffu_grpo", {"num_iterations": 2, "beta": 0.1, "learning_rate": 5e-3}, kills=seeded_kills(1)
        ),
        "lora": Case("agrpo", {"max_steps": 9, "beta": 0.1}, adapter_kills, adapter="lora"),
        "qlora": Case("agrpo", {"max_steps": 9, "beta": 0.1}, adapter_kills, adapter="qlora"),
        "agrpo on two processes": Case("agrpo", divided, rank_kills),
        "other rates on two processes": Case(
            "agrpo",
            # with a reference model, of whose weights a sample is compared
            divided | {"max_steps": 6, "beta": 0.1, "loss_type": "dr_grpo"},
            (Kill("between", 3),),
            changes={"learning_rate": 0.1, "lr_scheduler_type": "linear", "weight_decay": 0.3},
        ),
    }


# ---------------------------------------------------------------- one attempt


def train(case: Case, folder: Path, result: Path, kill: Kill | None, log: Path, *, zero: int | None) -> None:
    torch.set_num_threads(1)
    trainer = make_trainer(case, folder, zero)
    if zero:
        assert trainer.accelerator.num_processes == 2
        assert trainer.accelerator.state.deepspeed_plugin.zero_stage == zero
    if kill is not None and kill.rank == trainer.accelerator.process_index:
        Killer(trainer, kill, log).arm()
    accuracy = AccuracyCallback(trainer, Dataset.from_dict({"prompt": PROMPTS}), accuracy_of, every=5)
    trainer.add_callback(accuracy)
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train(resume_from_checkpoint=True)
    weights = weights_of(trainer)
    if trainer.accelerator.is_main_process:
        state = {
            "weights": weights,
            # sorted, as transformers writes the log of a checkpoint
            "history": [json.dumps(without_times(entry), sort_keys=True) for entry in trainer.state.log_history],
            "accuracy": [(step, value.correct) for step, value in accuracy.history],
            "forward_units": trainer.forward_units,
            "rates": rates.of_steps,
        }
        torch.save(state, result)


def make_trainer(case: Case, folder: Path, zero: int | None):
    torch.manual_seed(0)
    model: Any = tiny_model(seed=3)
    if case.adapter == "qlora":
        checkpoint = folder.parent / "base"
        if not checkpoint.is_dir():
            tiny_model(seed=3, hidden_size=64, intermediate_size=128).save_pretrained(checkpoint)
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = LLaDAModelLM.from_pretrained(checkpoint, quantization_config=quantisation)
    if zero:
        checkpoint = folder.parent / f"base-{os.environ['RANK']}"
        model.save_pretrained(checkpoint)
        model = str(checkpoint)
    # `use_cpu` would turn DeepSpeed off, and without gloo accelerate would count one process
    device = {"use_cpu": False, "ddp_backend": "gloo", "ddp_timeout": SILENCE - 40} if zero else {"use_cpu": True}
    return method_named(case.method).make(
        folder,
        model=model,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if case.adapter else None,
        **SETTINGS | case.settings | device,
    )


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """Every weight, whole."""
    named = dict(trainer.model.named_parameters())
    gathered: Any = nullcontext()
    if trainer.is_deepspeed_enabled:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(named.values()))
    with gathered:
        return {name: weight.detach().clone() for name, weight in named.items()}


def accuracy_of(model, dataset) -> Estimate:
    """A number that changes with the weights, in place of an accuracy."""
    weights = [weight.double().abs().sum() for weight in model.parameters() if weight.is_floating_point()]
    return Estimate.of(int(1e4 * float(sum(weights))) % 10007, 10007)


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.endswith(TIMES)}


class Rates(TrainerCallback):
    """Learning rate and weight decay at every step of the optimizer, by the number of updates before it."""

    def __init__(self):
        self.of_steps: dict[int, tuple[float, float]] = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        group = optimizer.param_groups[0]
        self.of_steps[state.global_step] = group["lr"], group["weight_decay"]


# ---------------------------------------------------------------- moments


class Killer:
    """Ends this process by SIGKILL at a moment.

    Args:
        trainer: of the run.
        kill: the moment.
        log: a file that is told where the process ended.
    """

    def __init__(self, trainer, kill: Kill, log: Path):
        self.trainer, self.kill, self.log = trainer, kill, log

    def arm(self) -> None:
        trainer, phase = self.trainer, self.kill.phase
        events = {
            "accumulation": "on_substep_end",
            "optimizer step": "on_optimizer_step",
            "between": "on_step_end",
            "timer": "on_step_begin",
        }
        if phase in events:
            react = self.wait_for_the_end if phase == "timer" else self.die_if_reached
            callback = type("Moment", (TrainerCallback,), {events[phase]: lambda *_, **__: react()})
            trainer.add_callback(callback())
        elif phase == "rollout":
            engine.sample = self.cut_short(engine.sample)
        elif phase == "view":
            trainer.accelerator.backward = self.last(trainer.accelerator.backward)
        elif phase == "rollout state":
            torch.save = self.last(torch.save, spoil=lambda _, path, **__: half(path), of="rollout_state")
        elif phase == "shard":
            torch.save = self.last(torch.save, spoil=lambda _, path, **__: half(path), of="optim_states")
        elif phase == "weights":
            trainer.save_model = self.last(trainer.save_model, spoil=lambda folder, **_: half(weights_in(folder)))
        elif phase == "trainer state":
            TrainerState.save_to_json = self.last(TrainerState.save_to_json, spoil=lambda _, path: half(path))
        elif phase == "manifest":
            manifest._sync = self.last(manifest._sync, of=".part")
        elif phase == "rotation":
            manifest.shutil.rmtree = self.delete_in_part(shutil.rmtree)
        else:
            raise ValueError(f"There is no phase {phase!r}.")

    def reached(self) -> bool:
        return self.trainer.state.global_step == self.kill.step

    def die_if_reached(self) -> None:
        if self.reached():
            self.tell()
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self) -> None:
        with self.log.open("a") as file:
            file.write(f"{self.kill.phase} {self.trainer.state.global_step}\n")

    def last(self, function: Callable, spoil: Callable = lambda *_, **__: None, of: str = "") -> Callable:
        """The function, which spoils what it wrote and is the last to run at the moment.

        Args:
            function: to go on with.
            spoil: called with the same arguments.
            of: only where this occurs in one of the arguments.
        """

        def run(*args, **kwargs):
            value = function(*args, **kwargs)
            if self.reached() and any(of in str(argument) for argument in args if not isinstance(argument, dict)):
                spoil(*args, **kwargs)
                self.die_if_reached()
            return value

        return run

    def delete_in_part(self, delete: Callable) -> Callable:
        """The function that deletes a checkpoint, which deletes only one file at the moment."""

        def run(folder: Path, **kwargs) -> None:
            if self.reached() and folder.exists():
                weights_in(folder).unlink()
                self.die_if_reached()
            delete(folder, **kwargs)

        return run

    def cut_short(self, sample: Callable) -> Callable:
        """The sampler, which does not come to its third forward pass at the moment."""

        def run(model, *args, **kwargs):
            forwards = count(1)
            model.register_forward_pre_hook(lambda *_: self.die_if_reached() if next(forwards) == 3 else None)
            return sample(model, *args, **kwargs)

        return run

    def wait_for_the_end(self) -> None:
        """Say once that the moment has come, and go on slowly: another process kills this one."""
        if self.reached():
            self.tell()
        if self.trainer.state.global_step >= self.kill.step:
            time.sleep(1)


def weights_in(folder: Path | str) -> Path:
    return next(Path(folder).glob("*model.safetensors"))


def half(path: Path | str) -> None:
    """Leave the first half of a file."""
    os.truncate(path, Path(path).stat().st_size // 2)


# ---------------------------------------------------------------- attempts


def attempt(number: int, run: Callable[[Path], None], kill: Kill | None, out: Path) -> bool:
    """Run in a process of its own. With several ranks, an attempt is over for all when one of them was killed.

    Returns:
        Whether the run came to its end.
    """
    log, over = out / "kills.txt", out / f"over-{number}"
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            run(log)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    random_time = random.Random(number).uniform(0, 0.3)
    ended = 0
    try:
        while not ended:
            if kill is not None and kill.phase == "timer" and log.exists() and "timer" in log.read_text():
                time.sleep(random_time)
                os.kill(pid, signal.SIGKILL)
            elif over.exists():
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            ended, status = os.waitpid(pid, os.WNOHANG)
    finally:
        if not ended:  # this process is told to stop
            os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status != 0:
        # the death of another rank ends this one too, and maybe before that one's parent has said so
        patience = time.monotonic() + SILENCE / 2 * (int(os.environ.get("WORLD_SIZE", "1")) > 1)
        while not over.exists() and time.monotonic() < patience:
            time.sleep(0.02)
        if not over.exists():
            raise RuntimeError(f"Attempt {number} failed with wait status {status}; expected to meet {kill}.")
    if killed:
        over.touch()
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", choices=cases(), required=True)
    parser.add_argument("--zero", type=int, help="ZeRO stage")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for name in arguments.cases:
        out = arguments.out / name
        out.mkdir(parents=True, exist_ok=True)
        run_case(cases()[name], out, arguments.zero)


def run_case(case: Case, out: Path, zero: int | None) -> None:
    """All attempts in one folder, and then in another the run that nothing interrupts."""
    rank, processes = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    attempts = [*((kill, "killed") for kill in case.kills), (None, "killed"), (None, "whole")]
    for number, (kill, name) in enumerate(attempts):
        if kill is None:
            case = replace(case, settings=case.settings | case.changes)
        if zero:  # every attempt has processes of its own, which meet at a port of their own
            os.environ |= {"MASTER_PORT": agreed_port(out, number, rank), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        finished = attempt(number, partial(train, case, out / name, out / f"{name}.pt", kill, zero=zero), kill, out)
        if finished != (kill is None):
            raise RuntimeError(f"Attempt {number}: finished is {finished}, but it was to meet {kill}.")
        (out / f"done-{number}-{rank}").touch()
        while len(list(out.glob(f"done-{number}-*"))) < processes:
            time.sleep(0.02)


def agreed_port(out: Path, number: int, rank: str) -> str:
    """A port that is free now, chosen by rank 0 for all ranks of an attempt."""
    told, part = out / f"port-{number}", out / f"port-{number}.part"
    if rank == "0":
        part.write_text(str(free_port()))
        part.rename(told)
    while not told.exists():
        time.sleep(0.02)
    return told.read_text()


if __name__ == "__main__":
    main()
