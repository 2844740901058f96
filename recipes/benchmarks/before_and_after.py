"""Time two checkouts of this repository in turn: is anything slower than it was?

    git worktree add ../before COMMIT
    python recipes/benchmarks/before_and_after.py ../before . --rounds 5

Runs `rollout.py`, `scoring.py` and `update.py` of each checkout in a separate process, alternately and every other
round backwards, at sizes for which a round takes five minutes of a processor. It compares the modes that both have.

Seconds are those of the processor, and the least of three runs in a process, because other programs then count little.
Above 1 the second checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

SIZES = "--shapes backbone-heavy --rows 2 --prompt 100 --canvas 64 --rounds 3 --seed {seed} --device cpu"
BENCHMARKS = {
    "rollout": "--steps 32 --block 16 --published_steps 1",
    "scoring": "--targets 0.25",
    "update": "--steps 32 --block 16 --published_steps 1 --views 4 --iterations 2",
}
# The scripts read the clock by this name. Processor time is what a thread computed, not what it waited for.
_START = """
import runpy, sys, time
time.perf_counter = time.process_time
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def seconds_of(checkout: Path, benchmark: str, more: list[str]) -> dict[str, float]:
    """Run a benchmark of a checkout with its own code, and return the seconds of its modes.

    Raises:
        RuntimeError: if it fails.
    """
    script = checkout / "recipes" / "benchmarks" / f"{benchmark}.py"
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _START, str(script), *more, "--output_dir", folder]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{script} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        found = {}
        for path in sorted(Path(folder).glob("*.json")):
            written = json.loads(path.read_text())
            for mode in [*written["modes"], *written.get("uneven", [])]:
                found[f"{path.stem}: {mode['name']}"] = min(mode["seconds"])
    return found


def compare(before: Path, after: Path, arguments: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Return (seconds before, seconds after) of every round, by the name of the mode; write what is known so far."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for turn in range(arguments.rounds):
        for name in arguments.benchmarks:
            more = f"{SIZES.format(seed=arguments.seed)} {BENCHMARKS[name]}".split()
            order = [before, after] if turn % 2 == 0 else [after, before]
            seconds = {checkout: seconds_of(checkout, name, more) for checkout in order}
            for mode in seconds[before].keys() & seconds[after].keys():
                pairs.setdefault(mode, []).append((seconds[before][mode], seconds[after][mode]))
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(pairs, indent=1))
    return dict(sorted(pairs.items()))


def table(pairs: dict[str, list[tuple[float, float]]]) -> Table:
    """Return medians, and how many times as fast the second checkout is, with its smallest and largest value."""
    made = Table("", "before, s", "after, s", "times as fast")
    for mode, rounds in pairs.items():
        ratios = [before / after for before, after in rounds]
        before, after = (statistics.median(column) for column in zip(*rounds, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        made.add_row(mode, f"{before:.3g}", f"{after:.3g}", spread)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/before_and_after.json"))
    arguments = parser.parse_args()
    pairs = compare(arguments.before.resolve(), arguments.after.resolve(), arguments)
    Console(width=110).print(table(pairs))


if __name__ == "__main__":
    main()
