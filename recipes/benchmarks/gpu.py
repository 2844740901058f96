"""One prepared run for a borrowed GPU: is everything right there, how fast is it, and which kernels take the time.

    python recipes/benchmarks/gpu.py                                # 8 minutes on one H100 or H200, no network
    python recipes/benchmarks/gpu.py --device cpu --shapes tiny     # tries the script

1. `pytest -m gpu` compares rollouts and LoRA updates with those of the CPU.
2. Networks in the shapes of LLaDA-8B and SDAR-8B, with random weights made on the device, write rollouts in every
   cache. Each is warmed up by a rollout of few steps, from which its time is predicted; counted once, timed `--rounds`
   times, and profiled in the rollout of few steps.
3. The same LLaDA network scores a view, with and without the gradient of a LoRA.
4. The real trainer does one AGRPO update with a LoRA: a rollout, and what is learnt from it.
5. With `--fused`, which is the default on a GPU, the rollouts are timed again with `fuse_elementwise`.
6. With `--compiled`, likewise, those of `dual` and of SDAR are timed again with `rollout_compile`.

What would not fit into `--minutes` is skipped, and named. `gpu.json` has everything, with versions, seed and settings;
`gpu.md` is the table for docs/pages/performance.md. Both are written again after every measurement, so that a run that
is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from peft import get_peft_model
from rich.console import Console
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import measure
from networks import SHAPES, lora
from profiled import kernel_times
from rollout import MODES, Rollouts
from scoring import Scoring
from update import Trainers, train, work_of

from trl_diffusion.models.fused import fuse_elementwise
from trl_diffusion.sampling import SamplingConfig

ROOT = Path(__file__).parents[2]
GIB = 2**30
SIZES: dict[str, dict[str, Any]] = {
    "8b": dict(
        networks=["llada-8b", "sdar-8b"], rows=16, micro_rows=8, prompt=200, canvas=256, steps=128, block=32, views=8
    ),
    "tiny": dict(networks=["tiny", "tiny-sdar"], rows=2, micro_rows=1, prompt=8, canvas=16, steps=8, block=8, views=1),
}
CACHES = {"exact": "none", "prefix": "prefix", "dual": "dual", "block-causal": "block"}
# Seconds of the correctness tests, most of which are imports; on a slow disk they must not take all the time.
TESTS_NEED, TESTS_AT_MOST = 60.0, 180.0
COMPILING_NEEDS = {"fused": 60.0, "compiled": 120.0}  # seconds, at a guess


class Run:
    """The time that is left, and what was found; every finding goes to the disk at once.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.end = args, time.monotonic() + 60 * args.minutes
        self.found: dict[str, Any] = {
            "setting": measure.settings(args),
            "machine": measure.machine(args.device),
            "versions": measure.versions(),
            "modes": [],
            "scoring": [],
            "skipped": [],
        }

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def fits(self, what: str, seconds: float) -> bool:
        """Return whether there is time for a measurement; name it among those skipped if not."""
        if seconds <= self.left:
            print(f"[{self.left:.0f} s left] {what}, about {seconds:.0f} s", flush=True)
            return True
        reason = f"{what}: needs about {seconds:.0f} s, and {max(self.left, 0):.0f} s are left"
        print(f"Skipped {reason}", flush=True)
        self.found["skipped"].append(reason)
        self.save()
        return False

    def save(self) -> None:
        folder = self.args.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(self.found, indent=1))
        (folder / "gpu.md").write_text(table(self.found))


def free(device: torch.device) -> None:
    """Give back the memory of networks that are no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- 1. correctness


def test(run: Run) -> None:
    """Run the tests that need a GPU in another process, whose memory is free again when it ends."""
    if not run.fits("correctness tests", TESTS_NEED):
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu", "tests/test_gpu.py"]
        environment = os.environ | {"TRL_DIFFUSION_GPU_TESTS_ON": str(run.args.device)}
        started, at_most = time.monotonic(), min(run.left, TESTS_AT_MOST)
        try:
            subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment, timeout=at_most, check=False)
        except subprocess.TimeoutExpired:
            run.found["skipped"].append(f"correctness tests: not finished after {at_most:.0f} s")
        found: dict[str, Any] = {"seconds": time.monotonic() - started}
        if report.exists():
            found |= outcomes(report)
    run.found["correctness"] = found
    run.save()


def outcomes(report: Path) -> dict[str, Any]:
    """Count what passed in a report of pytest, and name what did not."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = {
        case.attrib["name"]: (problem.attrib.get("message") or "").splitlines()[:3]
        for case in cases
        for problem in case
        if problem.tag in ("failure", "error")
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


# ---------------------------------------------------------------- 2. rollouts


def time_rollouts(run: Run, name: str, peak: float) -> None:
    """Time every cache of a network, profile it, and for full attention time a scored view."""
    args = run.args
    rollouts = Rollouts(SHAPES[name], args)
    weights = sum(weight.numel() * weight.element_size() for weight in rollouts.model.parameters())
    for mode, config in rollouts.modes.items():
        brief = replace(config, denoising_steps=2 * config.num_blocks)
        rollouts.whole(brief)
        seconds, _ = measure.time_and_peak(partial(rollouts.whole, brief), args.device)
        expected = seconds * config.denoising_steps / brief.denoising_steps
        if run.fits(f"rollout, {name}, {mode}", (args.rounds + 1.3) * expected):
            found = time_rollout(rollouts, config, args, peak, weights)
            total, kernels = kernel_times(partial(rollouts.whole, brief), args.device)
            profiled = {"kernel_ms": total / brief.denoising_steps, "kernels": kernels}
            run.found["modes"].append({"name": mode, "network": name} | found | profiled)
            run.save()
    if not SHAPES[name].block_causal:
        time_scoring(run, rollouts, name, peak)


def time_rollout(
    rollouts: Rollouts, config: SamplingConfig, args: argparse.Namespace, peak: float, weights: int
) -> dict[str, Any]:
    write = partial(rollouts.whole, config)
    work, flop = measure.count_flop(write)
    rounds = [measure.time_and_peak(write, args.device) for _ in range(args.rounds)]
    seconds = statistics.median(elapsed for elapsed, _ in rounds)
    return {
        "seconds": seconds,
        "step_ms": 1e3 * seconds / config.denoising_steps,
        "tokens_per_second": work.tokens / seconds,
        "forwards": work.forwards,
        "tflop": flop / 1e12,
        "peak_share": flop / seconds / peak,
        "peak_gib": (weights + max(memory for _, memory in rounds) * measure.MIB) / GIB,
    }


# ---------------------------------------------------------------- 3. scoring


def time_scoring(run: Run, rollouts: Rollouts, name: str, peak: float) -> None:
    """Time a view of which half the canvas is scored, as old log-probabilities and as a loss."""
    args = run.args
    if not run.fits(f"scoring, {name}", 10.0):
        return
    scoring = Scoring(get_peft_model(rollouts.model, lora()), 0.5, with_rows(args, args.micro_rows))
    for gradient in (False, True):
        score = partial(scoring.run, scoring.gathered, gradient)
        work, flop = measure.count_flop(score)
        seconds, memory = min(measure.time_and_peak(score, args.device) for _ in range(3))
        found = {"seconds": seconds, "peak_share": flop / seconds / peak, "added_gib": memory * measure.MIB / GIB}
        run.found["scoring"].append({"network": name, "gradient": gradient, "rows": work.forwards} | found)
    run.save()


def with_rows(args: argparse.Namespace, rows: int) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {"rows": rows})


# ---------------------------------------------------------------- 4. updates


def time_update(run: Run, mode: dict[str, Any]) -> None:
    """Time one AGRPO update with the cache of a mode that was timed."""
    args, exact = run.args, next((each["seconds"] for each in run.found["modes"] if each["name"] == "exact"), 0.0)
    # a view costs a pass with its backward pass, and approximate caches one more for old log-probabilities
    expected = 1.5 * mode["seconds"] + 4 * args.views * (exact or mode["seconds"]) / args.steps + 10
    if not run.fits(f"update, {mode['network']}, {mode['name']}", expected):
        return
    with tempfile.TemporaryDirectory() as folder:
        trainers = Trainers(SHAPES[mode["network"]], args, folder)
        trainer = trainers.make(
            "AGRPO",
            cache=CACHES[mode["name"]],
            per_device_train_batch_size=args.micro_rows,
            gradient_accumulation_steps=args.rows // args.micro_rows,
        )
        weights = sum(weight.numel() * weight.element_size() for weight in trainer.model.parameters())
        seconds, memory = measure.time_and_peak(partial(train, trainer, work_of(trainer)), args.device)
    mode["update"] = {"seconds": seconds, "peak_gib": (weights + memory * measure.MIB) / GIB}
    run.save()


# ---------------------------------------------------------------- 5. and 6. fused layers, compiled steps


def time_again(run: Run, name: str, peak: float, kind: str) -> None:
    """Time the rollouts of a network again, `fused` with `fuse_elementwise` or `compiled` with `rollout_compile`."""
    args = run.args
    plain = {mode["name"]: mode for mode in run.found["modes"] if mode["network"] == name}
    if kind == "compiled":
        plain = {mode: found for mode, found in plain.items() if CACHES[mode] in ("dual", "block")}
    if not plain or not run.fits(f"compiling, {kind}, {name}", COMPILING_NEEDS[kind]):
        return
    rollouts = Rollouts(SHAPES[name], args)
    if kind == "fused":
        fuse_elementwise(rollouts.model)
    for mode, as_it_is in rollouts.modes.items():
        config = replace(as_it_is, rollout_compile=kind == "compiled" and mode in plain)
        brief = replace(config, denoising_steps=2 * config.num_blocks)
        if mode in plain and run.fits(f"{kind} rollout, {name}, {mode}", 1.3 * plain[mode]["seconds"]):
            for _ in range(3 if kind == "compiled" else 1):  # a graph is warmed up, recorded, and then repeated
                rollouts.whole(brief)
            seconds, _ = measure.time_and_peak(partial(rollouts.whole, config), args.device)
            total, kernels = kernel_times(partial(rollouts.whole, brief), args.device)
            plain[mode][kind] = {
                "seconds": seconds,
                "step_ms": 1e3 * seconds / config.denoising_steps,
                "peak_share": 1e12 * plain[mode]["tflop"] / seconds / peak,
                "kernel_ms": total / brief.denoising_steps,
                "kernels": kernels,
            }
            run.save()


# ---------------------------------------------------------------- the table


def table(found: dict[str, Any]) -> str:
    """Return the table for the documentation, with what it was measured on."""
    exact = next((mode for mode in found["modes"] if mode["name"] == "exact"), None)
    lines = [
        "| | tokens/s | × exact | fused, tokens/s | of matmul peak | peak GiB | update: s, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode in found["modes"]:
        faster = f"{mode['tokens_per_second'] / exact['tokens_per_second']:.1f}" if exact else ""
        fused, update = mode.get("fused"), mode.get("update")
        cells = [
            f"{mode['network']}, {mode['name']}",
            f"{mode['tokens_per_second']:.0f}",
            faster,
            f"{mode['tokens_per_second'] * mode['seconds'] / fused['seconds']:.0f}" if fused else "",
            f"{100 * mode['peak_share']:.0f} %",
            f"{mode['peak_gib']:.1f}",
            f"{update['seconds']:.1f}, {update['peak_gib']:.1f}" if update else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    peak = f"{found['matmul_peak_tflops']:.3g} TFLOP/s" if "matmul_peak_tflops" in found else "not measured"
    below = [f"{found['machine']['device']}, {versions}. Peak of a matrix product: {peak}."]
    if "correctness" in found and "passed" in found["correctness"]:
        tests = found["correctness"]
        below.append(f"Correctness tests: {tests['passed']} passed, {len(tests['failed'])} failed.")
    for mode in found["modes"]:
        if again := mode.get("compiled"):
            rate = mode["tokens_per_second"] * mode["seconds"] / again["seconds"]
            below.append(f"With `rollout_compile`, {mode['network']}, {mode['name']}: {rate:.0f} tokens/s.")
    below += [f"Skipped {reason}." for reason in found["skipped"]]
    return "\n".join([*lines, "", *below, ""])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SIZES, default="8b", help="the networks, and sizes to go with them")
    parser.add_argument("--minutes", type=float, default=8.0, help="what would take longer is skipped")
    parser.add_argument("--rows", type=int, help="completions")
    parser.add_argument("--micro_rows", type=int, help="completions with a gradient at once")
    parser.add_argument("--prompt", type=int, help="tokens of every prompt")
    parser.add_argument("--canvas", type=int)
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--block", type=int, help="positions per block")
    parser.add_argument("--views", type=int, help="views per completion")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, help="also with fused layers")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="also with compiled steps")
    parser.add_argument("--rounds", type=int, default=1, help="times that a rollout is timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/gpu"))
    args = parser.parse_args()
    for name, value in SIZES[args.shapes].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    for kind in COMPILING_NEEDS:
        if getattr(args, kind) is None:
            setattr(args, kind, args.device.type == "cuda")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand. To try the script: --device cpu --shapes tiny")
    if args.rows % args.micro_rows:
        parser.error(f"--micro_rows {args.micro_rows} must divide --rows {args.rows}")
    # what the other benchmarks' classes read
    fixed = dict(temperature=1.0, unmasking="low_confidence", modes=MODES, compile=False, full=False, iterations=1)
    return argparse.Namespace(**vars(args) | fixed)


def main() -> None:
    logging.set_verbosity_error()
    args = parse_args()
    run = Run(args)
    test(run)
    peak = measure.matmul_peak(args.device, SHAPES[args.networks[0]].dtype)
    run.found["matmul_peak_tflops"] = peak / 1e12
    for name in args.networks:
        time_rollouts(run, name, peak)
        free(args.device)
    for mode in run.found["modes"]:
        time_update(run, mode)
        free(args.device)
    for kind in [kind for kind in COMPILING_NEEDS if getattr(args, kind)]:
        for name in args.networks:
            time_again(run, name, peak, kind)
            free(args.device)
    run.save()
    Console().print(table(run.found), soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
