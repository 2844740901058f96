"""The start-up report, one panel: model, method, data, batch, length, cost, memory, and what is off or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from rich.columns import Columns
from rich.console import Group
from rich.panel import Panel
from rich.table import Table

from trl_diffusion.adapters.coverage import coverage_table, lora_coverage
from trl_diffusion.adapters.merging import merged_bytes
from trl_diffusion.runtime import cost
from trl_diffusion.runtime.activations import Activations, rollout_activations
from trl_diffusion.runtime.outlook import Length, outlook_facts, rollout_length
from trl_diffusion.runtime.run import RolloutRun, TrainingRun
from trl_diffusion.runtime.text import amount, byte_size, count, plural
from trl_diffusion.sampling import SamplingConfig

_PURPOSES = {
    "rollout": "rollout",
    "probe": "continuations, at most",
    "old": "old log-probabilities",
    "reference": "reference model",
    "training": "forward and backward",
}


@dataclass(frozen=True)
class Figures:
    """What a report is made of.

    Args:
        facts: texts by name.
        costs: what an update costs, by what it is spent on.
        flop: of an update, on all processes together.
        length: of the run.
        memory: of one process.
        activations: of one process.
    """

    facts: dict[str, str]
    costs: Table
    flop: float
    length: Length
    memory: cost.Memory
    activations: Activations


def startup_report(run: RolloutRun) -> Panel:
    """Return the panel for a run that is about to begin."""
    figures = rollout_figures(run)
    return report_panel(run, figures.facts, [figures.costs])


def rollout_figures(run: RolloutRun) -> Figures:
    """Return the figures of a run that learns from rollouts."""
    length, flop = rollout_length(run), cost.update_flop(run)
    memory, activations = cost.memory(run), rollout_activations(run)
    facts = {
        **model_facts(run),
        **_rollout_adapter(run),
        **_method(run),
        **_data(run),
        **_batch(run),
        "run": _run(run, length),
        **outlook_facts(run, length),
        **memory_facts(memory, activations),
        **_off(run),
    }
    return Figures(facts, _cost_table(run, flop), flop.total, length, memory, activations)


def report_panel(run: TrainingRun, facts: Mapping[str, Any], tables: Sequence[Table], kind: str = "") -> Panel:
    """Return the panel of any run.

    Args:
        run: the run.
        facts: texts by name.
        tables: shown after the facts, with the coverage of an adapter.
        kind: of report, for the title.
    """
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    for name, text in facts.items():
        rows.add_row(name, text)
    coverage = [coverage_table(lora_coverage(run.model))] if isinstance(run.model, PeftModel) else []
    shown = Columns([*tables, *coverage], padding=(1, 4))  # as many beside each other as the terminal has room for
    return Panel(Group(rows, "", shown), title=f"trl_diffusion · {run.name}{kind}", expand=False)


def model_facts(run: TrainingRun) -> dict[str, str]:
    """Facts of the model that is trained: size, family, attention, adapter, quantisation."""
    family, model = run.family, run.model
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    total = cost.parameter_count(model)
    trained = sum(cost.numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    attention = "full" if family.attention_block is None else f"causal over blocks of {family.attention_block}"
    return {
        "model": f"{base.config._name_or_path or type(base).__name__}, {count(total)} parameters, "
        f"{count(trained)} of them trained",
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


def _rollout_adapter(run: RolloutRun) -> dict[str, str]:
    if not isinstance(run.model, PeftModel):
        return {}
    if run.merge_obstacle is not None:
        return {"in rollouts": f"the adapter is not merged: {run.merge_obstacle}"}
    copied = byte_size(merged_bytes(run.model))
    return {"in rollouts": f"the adapter is merged, with a copy of its layers' weights ({copied})"}


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
    paper, views, sampling = run.paper, run.views, run.args.sampling_config()
    source = f", arXiv {paper['id']}: {paper['title']}" if paper else ""
    together = ", scored together" if run.backwards < views else ""
    step_aware = "; step-aware reward (SAPO, arXiv 2510.01544)" if run.step_aware else ""
    composed = {"composed of": ", ".join(f"{kind} {what}" for kind, what in run.choices.items())}
    return {
        "method": f"{run.name}{source}{step_aware}",
        **(composed if run.choices else {}),
        "canvas": canvas_text(sampling),
        "drawn": draws_text(sampling),
        "cache": _cache(run),
        "views": f"{views} per completion and update{together}",
    }


def canvas_text(sampling: SamplingConfig) -> str:
    """Describe the canvas and the order in which it is written."""
    if sampling.confidence_threshold is not None:
        else_leftmost = ", else the leftmost" if sampling.fallback == "leftmost" else ""
        order = f"every position with a probability of {sampling.confidence_threshold:g} or more{else_leftmost}"
    elif sampling.entropy_bound is not None:
        order = f"positions up to {sampling.entropy_bound:g} nats of entropy"
    else:
        order = f"{sampling.unmasking} unmasking"
    most = " at most" if sampling.parallel else ""
    return (
        f"{sampling.canvas_length} tokens in blocks of {sampling.block_length}, {sampling.denoising_steps} denoising "
        f"steps{most}, {order}"
    )


def draws_text(sampling: SamplingConfig) -> str:
    """Describe the distribution that tokens are drawn from."""
    if sampling.temperature == 0:
        return "greedily"
    top_k = f", top-k {sampling.top_k}" if sampling.top_k else ""
    top_p = f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    return f"at temperature {sampling.temperature:g}{top_k}{top_p}"


def _cache(run: RolloutRun) -> str:
    config = run.args.sampling_config()
    if config.approximate:
        refresh = f", renewed every {config.cache_refresh} steps" if config.cache_refresh else ""
        return f"{config.cache}, approximate{refresh}"
    if config.cache_for(run.family) == "none":
        return "none"
    return "keys and values of the prompt and of finished blocks, exact"


def _data(run: RolloutRun) -> dict[str, str]:
    rows = "a stream" if run.rows is None else plural(run.rows, "row")
    rewards = ", ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in run.rewards)
    return {"data": f"{rows}, prompts padded to {run.prompt_length:.0f} tokens on average", "rewards": rewards}


def _run(run: RolloutRun, length: Length) -> str:
    if length.updates is None:
        return str(length)
    completions = length.updates * cost.completions_per_update(run.args)
    canvas = run.args.max_completion_length
    return f"{length}: {count(completions)} completions, {count(completions * canvas)} tokens if no text ends early"


def _batch(run: RolloutRun) -> dict[str, str]:
    args, processes, group = run.args, run.launch.processes, run.group
    completions, updates = int(args.generation_batch_size or 0), cost.updates_per_rollout(args)
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return {
        "rollout": f"{plural(completions // group, 'prompt')} × {group} completions = {completions} completions, "
        f"{updates:g} update{'' if updates == 1 else 's'} from each",
        "update": f"{args.per_device_train_batch_size} per device × "
        f"{plural(args.gradient_accumulation_steps, 'micro-batch')} × {plural(processes, 'process')} = "
        f"{per_update} completions",
    }


def _cost_table(run: RolloutRun, flop: cost.UpdateCost) -> Table:
    units = cost.forward_units(run)
    table = Table("one update, all processes", title="Cost if no text ends early")
    table.add_column("forward units", justify="right")
    table.add_column("TFLOP", justify="right")
    for purpose, passes in asdict(units).items():
        if passes:
            table.add_row(_PURPOSES[purpose], f"{passes:,.0f}", amount(asdict(flop)[purpose] / 1e12))
    table.add_section()
    table.add_row("total", f"{units.total:,.0f}", amount(flop.total / 1e12))
    return table


def memory_facts(memory: cost.Memory, activations: Activations) -> dict[str, str]:
    """Return the memory of one process, in its parts."""
    listed = " + ".join(
        f"{name} {'unknown' if size is None else byte_size(size)}"
        for name, size in memory.parts().items()
        if size != 0
    )
    rollout = f", a rollout {byte_size(activations.rollout)}" if activations.rollout else ""
    return {
        "memory": f"{byte_size(memory.total)} per process without activations: {listed}",
        "activations": f"an estimate: forward and backward take {byte_size(activations.training)} more{rollout}",
    }


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
