"""The settings in a model card: how completions are drawn, the batch, the length, and what differs from defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from trl_diffusion.runtime.run_facts import as_json, setting_facts

# Facts of the start-up report that say how a model was trained.
_FACTS = ("canvas", "drawn", "cache", "views", "rewards", "rollout", "update", "run", "learning rate")
# Settings that these facts show, and those that a config derives when they are not given.
_SHOWN = (
    "adam_beta1",
    "bf16",
    "block_length",
    "cache",
    "cache_refresh",
    "confidence_threshold",
    "denoising_steps",
    "entropy_bound",
    "generation_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "max_completion_length",
    "max_grad_norm",
    "max_steps",
    "num_generations",
    "num_iterations",
    "num_mc_samples",
    "num_train_epochs",
    "optim",
    "pad_to_multiple_of",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "reward_weights",
    "seed",
    "steps_per_generation",
    "temperature",
    "top_k",
    "top_p",
    "unmasking",
    "warmup_steps",
    "weight_decay",
    # not about the model
    "log_completions",
    "log_multimodal",
    "log_unique_prompts",
    "num_completions_to_print",
    "record_signals",
)


def settings_section(args: Any, facts: Mapping[str, str], updates: int) -> str:
    """Return the section as Markdown.

    Args:
        args: the trainer's config.
        facts: of the start-up report.
        updates: made so far.
    """
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    rows = {name: facts[name] for name in _FACTS if name in facts}
    rows |= {"updates made": f"{updates:,}", "precision": f"computed in {precision}", "seed": str(args.seed)}
    lines = ["### Settings", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items()), ""]
    config = type(args).__name__
    if changed := changed_settings(args):
        listed = ", ".join(f"`{name}={value!r}`" for name, value in changed.items())
        return "\n".join([*lines, f"Other settings that differ from the defaults of `{config}`: {listed}."])
    return "\n".join([*lines, f"All other settings are the defaults of `{config}`."])


def changed_settings(args: Any) -> dict[str, Any]:
    """Return the settings that bear on the model, are not among the facts, and differ from their config's defaults."""
    defaults = {field.name: field.default for field in fields(args)}
    return {
        name: value
        for name, value in setting_facts(args).items()
        if name not in _SHOWN and value != as_json({"default": defaults[name]})["default"]
    }
