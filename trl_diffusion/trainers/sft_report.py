"""The start-up report of masked SFT: model, data, batch, the cost of an update, and what is off."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from trl_diffusion.trainers import cost
from trl_diffusion.trainers.startup_report import memory_facts, model_facts, report_panel, significant

if TYPE_CHECKING:
    from trl_diffusion.trainers.sft import SFTConfig, SFTTrainer


def print_sft_report(trainer: SFTTrainer) -> None:
    """Print the panel, on the main process only."""
    if trainer.accelerator.is_main_process:
        Console().print(sft_report(trainer))


def sft_report(trainer: SFTTrainer) -> Panel:
    """The panel for a trainer that is about to train on its `train_dataset`."""
    facts = {
        **model_facts(trainer),
        **_method(trainer),
        **_data(trainer),
        **_batch(trainer),
        **memory_facts(cost.policy_memory(trainer)),
        **_off(trainer),
    }
    return report_panel(trainer, facts, _cost_table(trainer))


def _method(trainer: SFTTrainer) -> dict[str, str]:
    args, paper = trainer.args, trainer._paper
    return {
        "method": f"{trainer._name}, arXiv {paper['id']}: {paper['title']}",
        "canvas": f"{args.max_completion_length} positions, each masked with probability t ~ "
        f"U({args.min_noise_level:g}, 1)",
    }


def _data(trainer: SFTTrainer) -> dict[str, str]:
    rows: Any = trainer.train_dataset
    prompts, completions = ([len(ids) for ids in rows[f"{part}_ids"]] for part in ("prompt", "completion"))
    return {
        "data": f"{len(rows):,} rows; prompts of {statistics.mean(prompts):.0f} tokens on average and {max(prompts)} "
        f"at most, completions of {statistics.mean(completions):.0f} and {max(completions)} with their end"
    }


def _batch(trainer: SFTTrainer) -> dict[str, str]:
    args, processes = trainer.args, trainer.accelerator.num_processes
    batches = len(trainer.train_dataset) / (args.per_device_train_batch_size * processes)  # type: ignore[arg-type]
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    an_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    return {
        "update": f"{args.per_device_train_batch_size} per device × {args.gradient_accumulation_steps} micro-batches "
        f"× {processes} process{'' if processes == 1 else 'es'} = {_rows_of_update(trainer)} rows",
        "run": f"{updates:,} updates, of which {an_epoch:,} make an epoch",
    }


def _rows_of_update(trainer: SFTTrainer) -> int:
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes


def update_cost(trainer: SFTTrainer) -> tuple[float, float]:
    """Forward units and floating-point operations of an update, on all processes together and with full batches.

    Units are those of `DiffusionGRPOTrainer.count_forwards`; operations are those in matrix products, on average over
    the noise.
    """
    args, rows, batch = trainer.args, _rows_of_update(trainer), trainer.args.per_device_train_batch_size
    prompts = [len(ids) for ids in trainer.train_dataset["prompt_ids"]]  # type: ignore[index]
    # Prompts are padded to the longest of their micro-batch.
    prompt = statistics.mean(max(prompts[start : start + batch]) for start in range(0, len(prompts), batch))
    canvas = args.max_completion_length
    # Block-causal attention is shown the finished completion in addition to the noised one.
    context = 0 if trainer.family.attention_block is None else canvas
    shape, tokens = cost.network_shape(trainer.model, args.gradient_checkpointing), prompt + canvas + context
    scored = scored_positions(args)
    flop = shape.forward_flop(tokens, scored) + shape.backward_flop(tokens, scored)
    return 3 * rows * (1 + context / (prompt + canvas)), rows * flop


def scored_positions(args: SFTConfig) -> float:
    """Positions of each row that the last layer computes, on average: as many as the micro-batch's fullest row masks.

    The largest of B levels that are uniform on [min, 1] is (B + min) / (B + 1) on average.
    """
    batch = args.per_device_train_batch_size
    return args.max_completion_length * (batch + args.min_noise_level) / (batch + 1)


def _cost_table(trainer: SFTTrainer) -> Table:
    units, flop = update_cost(trainer)
    table = Table("one update, all processes", title="Cost of full batches")
    table.add_column("forward units", justify="right")
    table.add_column("TFLOP", justify="right")
    table.add_row("forward and backward", f"{units:,.0f}", significant(flop / 1e12))
    return table


def _off(trainer: SFTTrainer) -> dict[str, str]:
    args = trainer.args
    off = {
        "gradient clipping": not args.max_grad_norm,
        "gradient checkpointing": not args.gradient_checkpointing,
        "evaluation loss": trainer.eval_dataset is None,
    }
    return {
        "off": ", ".join(name for name, is_off in off.items() if is_off) or "nothing",
        "guards": f"nonfinite_update={args.nonfinite_update}",
    }
