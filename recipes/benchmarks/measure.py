"""Time, memory and floating-point operations of several ways to do the same work, alternating in one process."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20
_MCL_CURRENT, _MCL_ONFAULT = 1, 4  # Linux


@dataclass(frozen=True)
class Work:
    """What a run did: forward passes of a row, and tokens that it wrote or scored."""

    forwards: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Part:
    """A run that is timed, and how often the whole repeats it."""

    run: Callable[[], Work]
    times: float = 1.0


@dataclass(frozen=True)
class Mode:
    """A way to do the work, as parts whose costs add up to the whole."""

    name: str
    parts: Sequence[Part]

    @property
    def extrapolated(self) -> bool:
        return any(part.times != 1.0 for part in self.parts)


@dataclass
class Measured:
    """The whole work done in one mode.

    Args:
        name: of the mode.
        seconds: of every round.
        peak_mib: largest memory above what was there before, over parts and rounds.
        flop: operations in matrix products.
        forwards: forward passes of a row.
        tokens: tokens written or scored.
        extrapolated: whether the figures (but memory) follow from timed parts.
    """

    name: str
    seconds: list[float]
    peak_mib: float
    flop: float
    forwards: float
    tokens: float
    extrapolated: bool

    def slower_than(self, other: Measured) -> list[float]:
        """Ratio of the times, round by round."""
        return [mine / yours for mine, yours in zip(self.seconds, other.seconds, strict=True)]


def compare(modes: Sequence[Mode], rounds: int, device: torch.device, compiles: bool = False) -> list[Measured]:
    """Run every mode once to warm up and count operations, then `rounds` times in turn, every other round backwards.

    Neighbours in time share the machine's mood, so ratios of neighbours are what to read.

    Args:
        modes: ways to do the same work.
        rounds: how often each is timed.
        device: where.
        compiles: whether they use torch.compile, which waits until nobody counts; then they warm up once more.
    """
    results = []
    for mode in track(modes, description="warm-up"):
        flop = forwards = tokens = 0.0
        for part in mode.parts:
            work, operations = count_flop(part.run)
            if compiles:
                part.run()
            flop += part.times * operations
            forwards += part.times * work.forwards
            tokens += part.times * work.tokens
        # at least a page, as ratios are taken
        page = os.sysconf("SC_PAGE_SIZE") / MIB
        results.append(Measured(mode.name, [], page, flop, forwards, tokens, mode.extrapolated))
    pairs = list(zip(modes, results, strict=True))
    for turn in track(range(rounds), description="rounds"):
        for mode, result in pairs[:: -1 if turn % 2 else 1]:
            seconds = 0.0
            for part in mode.parts:
                elapsed, peak = time_and_peak(part.run, device)
                seconds += part.times * elapsed
                result.peak_mib = max(result.peak_mib, peak)
            result.seconds.append(seconds)
    return results


def time_and_peak(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of a run, and its peak memory in MiB above what was held before it.

    Memory is the resident set on a CPU (Linux only) and the allocator's on CUDA.
    """
    before = _start_of_peak(device)
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    seconds = time.perf_counter() - start
    return seconds, (_peak(device) - before) / MIB


def synchronise(device: torch.device) -> None:
    """Wait for what CUDA was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_of_peak(device: torch.device) -> int:
    """Bytes held now; the peak starts here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    library = ctypes.CDLL(None)
    # What malloc kept of earlier runs goes back to the system: reused, it would hide what this run needs.
    library.munlockall()
    library.malloc_trim(0)
    # Code and data that the system may take from an idle process would count when they return. Where the limit on
    # locked memory forbids to hold them, peaks come out somewhat larger.
    library.mlockall(_MCL_CURRENT | _MCL_ONFAULT)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at the present resident set
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


# ---------------------------------------------------------------- operations


def count_flop(run: Callable[[], Any]) -> tuple[Any, int]:
    """Result of a run, and its operations in matrix products: 2 per multiplication, from the operators' shapes."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        result = run()
    return result, counter.get_total_flops()


def _attention_flop(products: int, query: Sequence[int], key: Sequence[int]) -> int:
    rows, heads, queries, size = query
    return 2 * products * rows * heads * queries * key[2] * size


# torch counts the attention kernels of CUDA only. The backward pass forms five products, one of them again.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, *args, out_shape=None, **kwargs: (
        _attention_flop(2, query, key)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, *args, **kwargs: (
        _attention_flop(5, query, key)
    ),
}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product here, best of several."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = min(time_and_peak(partial(torch.matmul, left, right), device)[0] for _ in range(10))
    return 2 * size**3 / seconds


# ---------------------------------------------------------------- report


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on in addition to the settings."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
        "load_before": os.getloadavg()[0],
    }


def _commit() -> str | None:
    """The commit of the code, with a + if files differ from it; `None` outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of everything between this library and the GPU; `None` for what is not here."""
    packages = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
    found = {name: version(name) for name in packages}
    return found | {"python": platform.python_version(), "CUDA": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    """The version of the NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or None


def settings(args: Namespace) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, (Path, torch.device)) else value for name, value in vars(args).items()
    }


def summary(results: Sequence[Measured], yardsticks: Sequence[str], peak: float) -> list[dict[str, Any]]:
    """Medians, and against each yardstick the median, smallest and largest ratio of the times.

    Args:
        results: what `compare` returned.
        yardsticks: names of the modes to compare with.
        peak: FLOP per second of a large matrix product.
    """
    by_name = {result.name: result for result in results}
    rows = []
    for result in results:
        seconds = statistics.median(result.seconds)
        rows.append(
            asdict(result)
            | {
                "median_seconds": seconds,
                "tflop": result.flop / 1e12,
                "peak_share": result.flop / seconds / peak,
                "speedup": {name: _spread(by_name[name].slower_than(result)) for name in yardsticks},
                "memory_share": {name: result.peak_mib / by_name[name].peak_mib for name in yardsticks},
            }
        )
    return rows


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}


def table(title: str, rows: Sequence[dict[str, Any]], yardsticks: Sequence[str]) -> Table:
    """The summary for a reader; extrapolated times carry a tilde."""
    compared = [head for name in yardsticks for head in (f"× {name}", f"memory / {name}")]
    heads = ["", "seconds", "peak MiB", "forwards", "tokens / forward", "TFLOP", "of matmul peak", *compared]
    made = Table(*heads, title=title)
    for row in rows:
        cells = [
            f"{'~' if row['extrapolated'] else ''}{row['median_seconds']:.3g}",
            f"{row['peak_mib']:.0f}",
            f"{row['forwards']:.0f}",
            f"{row['tokens'] / row['forwards']:.2f}",
            f"{row['tflop']:.3g}",
            f"{100 * row['peak_share']:.0f} %",
        ]
        for name in yardsticks:
            ratio = row["speedup"][name]
            cells.append(f"{ratio['median']:.2f} ({ratio['smallest']:.2f}–{ratio['largest']:.2f})")
            cells.append(f"{100 * row['memory_share'][name]:.1f} %")
        made.add_row(row["name"], *cells)
    return made


def _three_digits(value: float) -> str:
    """Return a number with three digits that count, never with an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot(title: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and peak memory of every mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.35 * len(rows)), sharey=True, layout="constrained")
    names = [row["name"] + (" (extrapolated)" if row["extrapolated"] else "") for row in rows]
    for axis, key, label in zip(axes, ("median_seconds", "peak_mib"), ("seconds", "peak memory in MiB"), strict=True):
        bars = axis.barh(names, [row[key] for row in rows])
        axis.bar_label(bars, [_three_digits(row[key]) for row in rows], padding=3, fontsize=8)
        # A logarithmic scale writes only powers of ten; within a decade it would write numbers over each other.
        axis.set(xscale="log", xlabel=f"{label} (logarithmic)")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.25)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(
    name: str,
    title: str,
    results: Sequence[Measured],
    yardsticks: Sequence[str],
    peak: float,
    args: Namespace,
    **more: Any,
) -> None:
    """Print the table; write `NAME.json` and `NAME.png` into the output folder."""
    rows = summary(results, yardsticks, peak)
    Console(width=170).print(table(title, rows, yardsticks))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    written = {"setting": settings(args), "machine": machine(args.device), "matmul_peak_tflops": peak / 1e12}
    (args.output_dir / f"{name}.json").write_text(json.dumps(written | {"modes": rows} | more, indent=1))
    plot(title, rows, args.output_dir / f"{name}.png")
