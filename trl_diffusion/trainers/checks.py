"""What a trainer refuses before it loads or draws anything."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.models import family_of
from trl_diffusion.models.skeleton import native_config


def check_arguments(model, processing_class, kwargs: dict[str, Any]) -> None:
    reasons = {
        "tools": "tool calls need several turns; a rollout here is one canvas",
        "environment_factory": "environments need several turns; a rollout here is one canvas",
        "rollout_func": "it replaces the sampler whose trajectory is scored",
    }
    for name, reason in reasons.items():
        if kwargs.get(name):
            raise ValueError(f"`{name}` is not supported: {reason}. Leave it out.")
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class must be a tokenizer, got {type(processing_class).__name__}: images are not supported."
        )
    if isinstance(model, str):
        config = native_config(model)
        for name in config.architectures or []:
            if hasattr(transformers, name):  # TRL's loader would build that class, whatever the model_type
                raise TypeError(
                    f"{model} names the stock class {name} in `architectures` of its config.json. Put the diffusion "
                    f"class of model_type {config.model_type!r} there, or leave the entry out."
                )
    else:
        family_of(model)


def check_columns(dataset, reward_funcs) -> None:
    """Refuse a dataset without `prompt`, or without a column that a reward function cannot do without."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # a stream may not know its columns
        return
    needed = {"prompt": "the trainer"}
    given_by_trl = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    functions = functions + [f.success for f in functions if isinstance(f, StepAwareReward)]
    for function in functions:
        function = inspect.unwrap(function)  # a StepAwareReward needs what the function in it needs
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters.values():
                required = parameter.default is parameter.empty and parameter.kind in (
                    parameter.POSITIONAL_OR_KEYWORD,
                    parameter.KEYWORD_ONLY,
                )
                if required and parameter.name not in given_by_trl:
                    needed[parameter.name] = f"the reward function {function.__name__}"
    for column, user in needed.items():
        if column not in columns:
            raise ValueError(
                f"The dataset has no column {column!r}, which {user} needs; its columns are {', '.join(columns)}. "
                "Rename or add the column."
            )
