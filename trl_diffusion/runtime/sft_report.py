"""The start-up report of masked SFT: model, data, batch, the cost of an update, and what is off."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from rich.panel import Panel
from rich.table import Table

from trl_diffusion.runtime import cost
from trl_diffusion.runtime.report import memory_facts, model_facts, report_panel, significant
from trl_diffusion.runtime.run import TrainingRun


@dataclass(frozen=True)
class SFTRun(TrainingRun):
    """A run of masked SFT.

    Args:
        rows: training rows, with `prompt_ids` and `completion_ids`.
        evaluates: `True` if there are rows to evaluate on.
    """

    rows: Any
    evaluates: bool


def sft_report(run: SFTRun) -> Panel:
    """Return the panel for a run that is about to begin."""
    facts = {
        **model_facts(run),
        **_method(run),
        **_data(run),
        **_batch(run),
        **memory_facts(cost.policy_memory(run)),
        **_off(run),
    }
    return report_panel(run, facts, _cost_table(run))


def _method(run: SFTRun) -> dict[str, str]:
    args, paper = run.args, run.paper
    return {
        "method": f"{run.name}, arXiv {paper['id']}: {paper['title']}",
        "canvas": f"{args.max_completion_length} positions, each masked with probability t ~ "
        f"U({args.min_noise_level:g}, 1)",
    }


def _data(run: SFTRun) -> dict[str, str]:
    rows = run.rows
    prompts, completions = ([len(ids) for ids in rows[f"{part}_ids"]] for part in ("prompt", "completion"))
    return {
        "data": f"{len(rows):,} rows; prompts of {statistics.mean(prompts):.0f} tokens on average and {max(prompts)} "
        f"at most, completions of {statistics.mean(completions):.0f} and {max(completions)} with their end"
    }


def _batch(run: SFTRun) -> dict[str, str]:
    args, processes = run.args, run.processes
    batches = len(run.rows) / (args.per_device_train_batch_size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    an_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    return {
        "update": f"{args.per_device_train_batch_size} per device × {args.gradient_accumulation_steps} micro-batches "
        f"× {processes} process{'' if processes == 1 else 'es'} = {_rows_of_update(run)} rows",
        "run": f"{updates:,} updates, of which {an_epoch:,} make an epoch",
    }


def _rows_of_update(run: SFTRun) -> int:
    args = run.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * run.processes


def update_cost(run: SFTRun) -> tuple[float, float]:
    """Return the forward units and floating-point operations of an update of full batches, over all processes.

    A forward unit is a forward pass of one row of prompt and canvas; a backward pass counts as two. Operations are
    those of matrix products, on average over the noise.
    """
    args, rows, batch = run.args, _rows_of_update(run), run.args.per_device_train_batch_size
    prompts = [len(ids) for ids in run.rows["prompt_ids"]]
    # Prompts are padded to the longest of their micro-batch.
    prompt = statistics.mean(max(prompts[start : start + batch]) for start in range(0, len(prompts), batch))
    canvas = args.max_completion_length
    # With block-causal attention the input holds the finished completion in addition to the noised one.
    context = 0 if run.family.attention_block is None else canvas
    shape, tokens = cost.network_shape(run.model, args.gradient_checkpointing), prompt + canvas + context
    scored = scored_positions(args)
    flop = shape.forward_flop(tokens, scored) + shape.backward_flop(tokens, scored)
    return 3 * rows * (1 + context / (prompt + canvas)), rows * flop


def scored_positions(args: Any) -> float:
    """Return the number of positions of each row that the last layer computes, on average.

    All rows of a micro-batch are padded to the one that masks most. The largest of B noise levels that are uniform on
    [min, 1] is (B + min) / (B + 1) on average.
    """
    batch = args.per_device_train_batch_size
    return args.max_completion_length * (batch + args.min_noise_level) / (batch + 1)


def _cost_table(run: SFTRun) -> Table:
    units, flop = update_cost(run)
    table = Table("one update, all processes", title="Cost of full batches")
    table.add_column("forward units", justify="right")
    table.add_column("TFLOP", justify="right")
    table.add_row("forward and backward", f"{units:,.0f}", significant(flop / 1e12))
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
