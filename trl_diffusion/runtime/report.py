"""The start-up report, one panel: model, method, batch, the cost of an update, and what is off or refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from rich.console import Group
from rich.panel import Panel
from rich.table import Table

from trl_diffusion.adapters.coverage import coverage_table, lora_coverage
from trl_diffusion.runtime import cost
from trl_diffusion.runtime.run import RolloutRun, TrainingRun

_PURPOSES = {
    "rollout": "rollout",
    "probe": "continuations, at most",
    "old": "old log-probabilities",
    "reference": "reference model",
    "training": "forward and backward",
}


def startup_report(run: RolloutRun) -> Panel:
    """The panel for a run that is about to begin."""
    facts = {
        **model_facts(run),
        **_method(run),
        **_batch(run),
        **memory_facts(cost.memory(run)),
        **_off(run),
    }
    return report_panel(run, facts, _cost_table(run))


def report_panel(run: TrainingRun, facts: dict[str, str], costs: Table) -> Panel:
    """The panel of any run: facts by name, then the table of costs and, for an adapter, its coverage."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    for name, text in facts.items():
        rows.add_row(name, text)
    tables = Table.grid(padding=(0, 4))
    parts = [costs]
    if isinstance(run.model, PeftModel):
        parts.append(coverage_table(lora_coverage(run.model)))
    tables.add_row(*parts)
    return Panel(Group(rows, "", tables), title=f"trl_diffusion · {run.name}", expand=False)


def model_facts(run: TrainingRun) -> dict[str, str]:
    """Facts of the model that is trained: size, family, attention, adapter, quantisation."""
    family, model = run.family, run.model
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    total = cost.parameter_count(model)
    trained = sum(cost.numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    attention = "full" if family.attention_block is None else f"causal over blocks of {family.attention_block}"
    return {
        "model": f"{base.config._name_or_path or type(base).__name__}, {_count(total)} parameters, "
        f"{_count(trained)} of them trained",
        "family": f"{family.name}: mask id {family.mask_token_id}, end ids {', '.join(map(str, family.end_token_ids))}"
        + (", logits shifted by one" if family.logit_shift else ""),
        "attention": f"{attention}, {base.config._attn_implementation}, {str(base.dtype).removeprefix('torch.')}"
        + _autocast(run),
        "adapter": _adapter(model),
        "quantisation": _quantisation(base),
    }


def _autocast(run: TrainingRun) -> str:
    precision = run.mixed_precision
    return "" if precision == "no" else f" (computed in {precision})"


def _adapter(model) -> str:
    if not isinstance(model, PeftModel):
        return "none, all weights are trained"
    config = model.active_peft_config
    if isinstance(config, LoraConfig):
        return f"LoRA, rank {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}"
    return PeftType(config.peft_type).value


def _quantisation(base) -> str:
    quantizer = base.hf_quantizer
    if quantizer is None:
        return "none"
    config = quantizer.quantization_config.to_dict()
    if config.get("load_in_4bit"):
        twice = ", double quantisation" if config["bnb_4bit_use_double_quant"] else ""
        return f"4 bit {config['bnb_4bit_quant_type']}{twice}, computed in {config['bnb_4bit_compute_dtype']}"
    return str(quantizer.quantization_config.quant_method.value)


def _method(run: RolloutRun) -> dict[str, str]:
    args, paper = run.args, run.paper
    source = f", arXiv {paper['id']}: {paper['title']}" if paper else ""
    views = run.views
    together = ", scored together" if run.backwards < views else ""
    step_aware = "; step-aware reward (SAPO, arXiv 2510.01544)" if run.step_aware else ""
    return {
        "method": f"{run.name}{source}{step_aware}",
        "canvas": f"{args.max_completion_length} tokens in blocks of {args.block_length}, {args.denoising_steps} "
        f"denoising steps{' at most' if args.sampling_config().parallel else ''}, {_unmasking(args)}",
        "cache": _cache(run),
        "views": f"{views} per completion and update{together}",
    }


def _unmasking(args: Any) -> str:
    if args.confidence_threshold is not None:
        else_leftmost = ", else the leftmost" if args.fallback == "leftmost" else ""
        return f"every position with a probability of {args.confidence_threshold:g} or more{else_leftmost}"
    if args.entropy_bound is not None:
        return f"positions up to {args.entropy_bound:g} nats of entropy"
    return f"{args.unmasking} unmasking"


def _cache(run: RolloutRun) -> str:
    config = run.args.sampling_config()
    if config.approximate:
        refresh = f", renewed every {config.cache_refresh} steps" if config.cache_refresh else ""
        return f"{config.cache}, approximate{refresh}"
    if config.cache_for(run.family) == "none":
        return "none"
    return "keys and values of the prompt and of finished blocks, exact"


def _batch(run: RolloutRun) -> dict[str, str]:
    args, processes, group = run.args, run.processes, run.group
    completions, updates = int(args.generation_batch_size or 0), cost.updates_per_rollout(args)
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return {
        "rollout": f"{completions // group} prompts × {group} completions = {completions} completions, "
        f"{updates:g} update{'' if updates == 1 else 's'} from each",
        "update": f"{args.per_device_train_batch_size} per device × {args.gradient_accumulation_steps} micro-batches "
        f"× {processes} process{'' if processes == 1 else 'es'} = {per_update} completions",
    }


def _cost_table(run: RolloutRun) -> Table:
    units, flop = cost.forward_units(run), cost.update_flop(run)
    table = Table("one update, all processes", title="Cost if no text ends early")
    table.add_column("forward units", justify="right")
    table.add_column("TFLOP", justify="right")
    for purpose, count in asdict(units).items():
        if count:
            table.add_row(_PURPOSES[purpose], f"{count:,.0f}", significant(asdict(flop)[purpose] / 1e12))
    table.add_section()
    table.add_row("total", f"{units.total:,.0f}", significant(flop.total / 1e12))
    return table


def memory_facts(memory: cost.Memory) -> dict[str, str]:
    """Memory of one process, in its parts."""
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "reference": memory.reference,
        "rollout batch": memory.buffer,
    }
    listed = " + ".join(
        f"{name} {'unknown' if size is None else _bytes(size)}" for name, size in parts.items() if size != 0
    )
    return {"memory": f"{_bytes(memory.total)} per process without activations: {listed}"}


def _off(run: RolloutRun) -> dict[str, str]:
    args = run.args
    off = {
        "dropout": args.disable_dropout,
        "KL": not run.compares,
        "truncated completions (they do not learn)": args.mask_truncated_completions,
        "gradient clipping": not args.max_grad_norm,
        "gradient checkpointing": not args.gradient_checkpointing,
        "time limit of rewards": args.reward_timeout is None,
    }
    return {
        "off": ", ".join(name for name, is_off in off.items() if is_off),
        "refused": "vLLM, continuous batching, tools, environments, images, Liger kernels",
        "guards": f"reward_error={args.reward_error}, reward_nonfinite={args.reward_nonfinite}, "
        f"nonfinite_update={args.nonfinite_update}",
    }


def _count(number: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 2**10:.3g} KiB"


def significant(number: float) -> str:
    """A number with three digits, or all of them before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
