"""How long a run would take, and whether it would fit: figures of a run, and assumptions about the GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from trl_diffusion.runtime import cost
from trl_diffusion.runtime.report import Figures
from trl_diffusion.runtime.run import TrainingRun
from trl_diffusion.runtime.text import amount, byte_size
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.cost import head_positions

_TIGHT = 0.9  # share of a GPU's memory above which what is not estimated may be too much


@dataclass(frozen=True)
class Machine:
    """What is assumed of every process's GPU.

    Args:
        peak_tflops: its peak, in TFLOP per second.
        share: the share of the peak that matrix products reach, on average over the run.
        gib: its memory.
    """

    peak_tflops: float
    share: float
    gib: float

    def hours(self, flop: float, processes: int) -> float:
        """Return the hours that so many operations take on so many GPUs."""
        return flop / (processes * self.peak_tflops * 1e12 * self.share) / 3600


@dataclass(frozen=True)
class Evaluation:
    """How held-out accuracy is measured.

    Args:
        problems: decoded before and after training.
        every: updates between measurements in between; 0 for none.
        between: problems decoded at each of those.
        decoding: how.
    """

    problems: int
    every: int
    between: int
    decoding: SamplingConfig

    def completions(self, updates: int) -> int:
        """Return the problems that a run of so many updates decodes in all."""
        measured = (updates - 1) // self.every if self.every else 0
        return 2 * self.problems + measured * self.between

    def flop(self, run: TrainingRun, updates: int) -> float:
        """Return the operations of all measurements, if no text ends early."""
        # A batch has different prompts, so that none share the pass of a prompt.
        steps = cost.rollout_units(self.decoding, run.family, run.prompt_length, group=1)
        tokens = run.prompt_length + self.decoding.canvas_length
        shape = cost.network_shape(run.model)
        each = steps * shape.forward_flop(tokens, head_positions(self.decoding) / steps)
        # Under FSDP every process decodes all problems.
        copies = run.launch.processes if run.launch.fsdp else 1
        return copies * self.completions(updates) * each


def duration(run: TrainingRun, figures: Figures, machine: Machine, evaluation: Evaluation | None) -> str:
    """Describe the time that a run takes, with what it is based on."""
    updates, processes = figures.length.updates, run.launch.processes
    if updates is None:
        return f"{_hours(machine.hours(figures.flop, processes))} an update; how many there are is not known"
    training = machine.hours(updates * figures.flop, processes)
    measuring = 0.0 if evaluation is None else machine.hours(evaluation.flop(run, updates), processes)
    return (
        f"about {_hours(training + measuring)} if no text ends early: {_hours(training)} of training, "
        f"{_hours(measuring)} of held-out accuracy; at {100 * machine.share:g} % of {machine.peak_tflops:g} TFLOP/s "
        "per process, which is an assumption: no run was measured on a GPU yet"
    )


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{amount(hours)} hours"
    if hours >= 1 / 60:
        return f"{amount(60 * hours)} minutes"
    return f"{amount(3600 * hours)} s" if hours >= 1 / 3600 else "less than a second"


def memory_table(run: TrainingRun, figures: Figures, machine: Machine) -> Table:
    """Return the memory of one process by its parts; what does not fit into the GPU is marked."""
    kind, activations = figures.activations.largest
    parts = figures.memory.parts() | {f"{kind}, about": activations}
    moved = {name: parts.pop(name) for name in run.launch.offloaded}
    total = sum(size or 0.0 for size in parts.values())
    table = Table("on the GPU of a process", title=f"Memory, with {machine.gib:g} GiB")
    table.add_column("size", justify="right")
    for name, size in parts.items():
        if size != 0:
            table.add_row(*_row(name, size, machine))
    table.add_section()
    table.add_row(*_row("total", total, machine))
    for name, size in moved.items():
        table.add_row(f"{name}, on the CPU", _size(size))
    return table


def _row(name: str, size: float | None, machine: Machine) -> tuple[Text, Text]:
    share = (size or 0.0) / (machine.gib * 2**30)
    verdict, style = (": does not fit", "bold red") if share > 1 else (": hardly fits", "yellow")
    if share <= _TIGHT:
        verdict = style = ""
    return Text(name + verdict, style), Text(_size(size), style)


def _size(size: float | None) -> str:
    return "unknown" if size is None else byte_size(size)
