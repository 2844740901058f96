"""The start-up report of masked SFT: model, data, batch, the cost of an update, and what is off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.panel import Panel
from rich.table import Table

from trl_diffusion.runtime import cost
from trl_diffusion.runtime.activations import Activations, training_bytes
from trl_diffusion.runtime.outlook import Length, outlook_facts
from trl_diffusion.runtime.report import Figures, memory_facts, model_facts, report_panel
from trl_diffusion.runtime.run import TrainingRun
from trl_diffusion.runtime.text import amount, plural


@dataclass(frozen=True)
class SFTRun(TrainingRun):
    """A run of masked SFT.

    Args:
        longest_prompt: tokens of the longest prompt.
        completion_lengths: tokens of every row's completion, its end included.
        evaluates: `True` if there are rows to evaluate on.
    """

    longest_prompt: int
    completion_lengths: Sequence[int]
    evaluates: bool


def padded_prompts(prompt_lengths: Sequence[int], batch: int) -> float:
    """Return the tokens that prompts are padded to, on average: to the longest of their micro-batch."""
    starts = range(0, len(prompt_lengths), batch)
    return statistics.mean(max(prompt_lengths[start : start + batch]) for start in starts)


def sft_report(run: SFTRun) -> Panel:
    """Return the panel for a run that is about to begin."""
    figures = sft_figures(run)
    return report_panel(run, figures.facts, [figures.costs])


def sft_figures(run: SFTRun) -> Figures:
    """Return the figures of a run of masked SFT."""
    length, (units, flop) = _length(run), update_cost(run)
    memory, activations = cost.policy_memory(run), _activations(run)
    facts = {
        **model_facts(run),
        **_method(run),
        **_data(run),
        **_batch(run),
        "run": str(length),
        **outlook_facts(run, length),
        **memory_facts(memory, activations),
        **_off(run),
    }
    return Figures(facts, _cost_table(units, flop), flop, length, memory, activations)


def _length(run: SFTRun) -> Length:
    args = run.args
    if run.rows is None:
        return Length.of(args, None)
    batches = run.rows / (args.per_device_train_batch_size * run.launch.processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return Length.of(args, math.ceil(batches / args.gradient_accumulation_steps))


def _activations(run: SFTRun) -> Activations:
    args, batch = run.args, run.args.per_device_train_batch_size
    tokens = run.prompt_length + args.max_completion_length + _context(run)
    return Activations(training_bytes(run, batch, tokens, scored_positions(args)), rollout=0.0)


def _context(run: SFTRun) -> int:
    """Return the tokens of the finished completion, which block-causal models see in addition to the noised one."""
    return 0 if run.family.attention_block is None else run.args.max_completion_length


def _method(run: SFTRun) -> dict[str, str]:
    args, paper = run.args, run.paper
    return {
        "method": run.name + (f", arXiv {paper['id']}: {paper['title']}" if paper else ""),
        "canvas": f"{args.max_completion_length} positions, each masked with probability t ~ "
        f"U({args.min_noise_level:g}, 1)",
    }


def _data(run: SFTRun) -> dict[str, str]:
    lengths = run.completion_lengths
    return {
        "data": f"{plural(len(lengths), 'row')}; prompts of {run.prompt_length:.0f} tokens on average and "
        f"{run.longest_prompt} at most, completions of {statistics.mean(lengths):.0f} and {max(lengths)}, end included"
    }


def _batch(run: SFTRun) -> dict[str, str]:
    args = run.args
    return {
        "update": f"{args.per_device_train_batch_size} per device × "
        f"{plural(args.gradient_accumulation_steps, 'micro-batch')} × {plural(run.launch.processes, 'process')} = "
        f"{_rows_of_update(run)} rows"
    }


def _rows_of_update(run: SFTRun) -> int:
    args = run.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * run.launch.processes


def update_cost(run: SFTRun) -> tuple[float, float]:
    """Return the forward units and floating-point operations of an update of full batches, over all processes.

    A forward unit is a forward pass of one row of prompt and canvas; a backward pass counts as two. Operations are
    those of matrix products, on average over the noise.
    """
    args, rows, context = run.args, _rows_of_update(run), _context(run)
    shape = cost.network_shape(run.model, args.gradient_checkpointing)
    noised = run.prompt_length + args.max_completion_length
    scored = scored_positions(args)
    flop = shape.forward_flop(noised + context, scored) + shape.backward_flop(noised + context, scored)
    return 3 * rows * (1 + context / noised), rows * flop


def scored_positions(args: Any) -> float:
    """Return the number of positions of each row that the last layer computes, on average.

    All rows of a micro-batch are padded to the one that masks most. The largest of B noise levels that are uniform on
    [min, 1] is (B + min) / (B + 1) on average.
    """
    batch = args.per_device_train_batch_size
    return args.max_completion_length * (batch + args.min_noise_level) / (batch + 1)


def _cost_table(units: float, flop: float) -> Table:
    table = Table("one update, all processes", title="Cost of full batches")
    table.add_column("forward units", justify="right")
    table.add_column("TFLOP", justify="right")
    table.add_row("forward and backward", f"{units:,.0f}", amount(flop / 1e12))
    return table


def _off(run: SFTRun) -> dict[str, str]:
    args = run.args
    off = {
        "gradient clipping": not args.max_grad_norm,
        "gradient checkpointing": not args.gradient_checkpointing,
        "evaluation loss": not run.evaluates,
    }
    return {
        "off": ", ".join(name for name, is_off in off.items() if is_off) or "nothing",
        "guards": f"nonfinite_update={args.nonfinite_update}",
    }
