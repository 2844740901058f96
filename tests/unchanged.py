"""Records what every method does on fixed seeds, and compares two versions of the code by it.

    python tests/unchanged.py record before.pt        # with the code as it was
    python tests/unchanged.py compare before.pt       # with the code as it is

A record is made of what does not depend on how the code is arranged: the arguments and outputs of every forward of
the network (of rollouts, old, reference and policy passes, in their order), the gradients before and the parameters
after each of three updates, and the logged metrics but for times. Integers must be equal; floats within `--tolerance`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from typing import Any

import torch
from methods import METHODS, Method
from transformers import PrinterCallback, TrainerCallback

UPDATES = {"max_steps": 3, "learning_rate": 0.01, "logging_steps": 1}
MORE = {
    "agrpo": [{"cache": "prefix"}, {"gradient_checkpointing": True}],
    "diffu_grpo": [
        {"loss_type": "dr_grpo", "beta": 0.1, "num_iterations": 2},
        {"confidence_threshold": 0.5, "unmasking": "max_prob"},
    ],
    "espo": [{"beta": 0.1, "num_iterations": 2}],
    "dmpo": [{"num_iterations": 2}],
    "tracerl": [{"num_iterations": 2}],
}


def digest(value: Any) -> Any:
    """A tensor of integers by its hash, one of floats by its elements (at most 4,096, evenly spaced)."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            flat = value.detach().float().flatten()
            return tuple(value.shape), flat[:: max(1, -(-len(flat) // 4096))].clone()
        return tuple(value.shape), hashlib.sha256(value.detach().long().numpy().tobytes()).hexdigest()
    if isinstance(value, bool | int | float | str | None):
        return value
    return type(value).__name__


class Recorder(TrainerCallback):
    """Everything in the order in which it happens."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def watch(self, network: torch.nn.Module) -> None:
        network.register_forward_hook(self._forward, with_kwargs=True)

    def _forward(self, network, args, kwargs, output) -> None:
        given = {name: digest(value) for name, value in sorted(kwargs.items()) if value is not None}
        tensors = {name: digest(value) for name, value in output.items() if isinstance(value, torch.Tensor)}
        self.events.append(("forward", (given, tensors)))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.events.append(("gradients", {name: digest(p.grad) for name, p in model.named_parameters()}))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.events.append(("parameters", {name: digest(p) for name, p in model.named_parameters()}))

    def on_log(self, args, state, control, logs=None, **kwargs):
        kept = {name: None if value is None else float(value) for name, value in logs.items() if not timed(name)}
        self.events.append(("log", kept))


def timed(name: str) -> bool:
    return any(word in name for word in ("time", "seconds", "per_second", "runtime", "profiling"))


def record(method: Method, settings: dict[str, Any]) -> list[tuple[str, Any]]:
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        trainer = method.make(folder, **UPDATES | settings)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(recorder)
        recorder.watch(trainer.accelerator.unwrap_model(trainer.model))
        trainer.train()
    return recorder.events


def runs() -> dict[str, tuple[Method, dict[str, Any]]]:
    """Every method as the tests set it, and some with further settings."""
    found = {method.name: (method, {}) for method in METHODS}
    for method in METHODS:
        for settings in MORE.get(method.name, []):
            found[f"{method.name}, {settings}"] = (method, settings)
    return found


def difference(before: Any, now: Any, where: str = "") -> tuple[float, str]:
    """Largest difference of two records and its place; infinite where they do not correspond."""
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor) and before.shape == now.shape:
        apart = (before - now).abs() / before.abs().clamp(min=1)
        apart[(before == now) | (before.isnan() & now.isnan())] = 0
        return (float(apart.max()), where) if len(apart) else (0.0, where)
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        pairs = [(before[key], now[key], f"{where}/{key}") for key in before]
    elif isinstance(before, tuple | list) and type(before) is type(now) and len(before) == len(now):
        pairs = [(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(before, now, strict=True))]
    elif isinstance(before, float) and isinstance(now, float):
        return difference(torch.tensor([before]).double(), torch.tensor([now]).double(), where)
    else:
        return (0.0, where) if before == now else (float("inf"), f"{where}: {str(before)[:80]} | {str(now)[:80]}")
    return max((difference(*pair) for pair in pairs), key=lambda found: found[0], default=(0.0, where))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative to 1 or to the value, if larger")
    parser.add_argument("--only", nargs="+", help="names of runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: run for name, run in runs().items() if args.only is None or name in args.only}
    if args.action == "record":
        torch.save({name: record(*run) for name, run in chosen.items()}, args.file)
        return
    saved = torch.load(args.file, weights_only=False)
    failed = False
    for name, run in chosen.items():
        apart, place = difference(saved[name], record(*run))
        failed |= apart > args.tolerance
        print(f"{'DIFFERS' if apart > args.tolerance else 'same':8}{apart:.1e}  {name}  {place if apart else ''}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
