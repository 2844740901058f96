"""Refuse arguments that cannot work before anything is loaded or drawn; for reinforcement learning and masked SFT."""

from __future__ import annotations

import heapq
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import transformers
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel, PeftType
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig
from trl.trainer.utils import get_callable_name

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.family import family_of
from trl_diffusion.models import DiffusionLM
from trl_diffusion.models.meta_model import native_config
from trl_diffusion.sampling.positions import check_fits

logger = logging.getLogger(__name__)

# Keyword arguments with which TRL calls a reward function, in addition to the data set's other columns.
_FROM_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
_NOT_PASSED_ON = {"prompt", "completion", "completion_ids"}  # columns that TRL does not pass to reward functions
_IMAGES = {"image", "images"}
_LONGEST = 64  # prompts of a data set that are tokenised to check their length


# ---------------------------------------------------------------- model and adapter


def check_arguments(processing_class: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of TRL's trainer that cannot work with diffusion sampling.

    Args:
        processing_class: the trainer's argument.
        kwargs: the trainer's other arguments.

    Raises:
        ValueError: if one is given.
    """
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


def check_model(model: Any) -> None:
    """Refuse a model that is not a diffusion language model.

    Args:
        model: the trainer's argument; of a path or hub id only the config is read.

    Raises:
        TypeError: if it is another kind of model, or its checkpoint would be loaded as one.
    """
    if isinstance(model, str):
        config = native_config(model)
        for name in config.architectures or []:
            # TRL's loader builds the class that `architectures` names if transformers has it, whatever the model_type.
            if hasattr(transformers, name):
                raise TypeError(
                    f"{model} names the stock class {name} in `architectures` of its config.json. Put the diffusion "
                    f"class of model_type {config.model_type!r} there, or leave the entry out."
                )
    else:
        family_of(model)


def check_adapter(model: Any, peft_config: PeftConfig | None) -> None:
    """Refuse a kind of adapter that does not work with a diffusion language model.

    Args:
        model: the trainer's argument.
        peft_config: the trainer's argument.

    Raises:
        ValueError: for prompt tuning, P-tuning and other adapters that put virtual tokens before the prompt.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"An adapter of type {PeftType(config.peft_type).value} puts virtual tokens before the prompt, so the "
            "canvas would no longer be at the positions where it is sampled and scored. Use an adapter that changes "
            "layers, such as LoRA."
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse a model without trainable parameters.

    Raises:
        ValueError: if no parameter has `requires_grad`.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            "No parameter of the adapter can be trained: PeftModel.from_pretrained loads adapters for inference. Load "
            "it with is_trainable=True, or pass the adapter's folder as the trainer's `model`. For an adapter made "
            "from a config, set inference_mode=False there."
        )
    raise ValueError(
        "No parameter of the model can be trained: all have requires_grad=False. Unfreeze what should learn, or pass "
        "a `peft_config` to train an adapter."
    )


def check_load_arguments(model_init_kwargs: Mapping[str, Any] | str | None) -> None:
    """Refuse an argument of `from_pretrained` that TRL's loader ignores.

    Raises:
        ValueError: for `torch_dtype`; TRL reads `dtype` only, and would load float32.
    """
    if isinstance(model_init_kwargs, Mapping) and "torch_dtype" in model_init_kwargs:
        raise ValueError(
            f"model_init_kwargs has torch_dtype={model_init_kwargs['torch_dtype']!r}, now called `dtype`; under "
            "its old name the model would be loaded in float32. Rename it."
        )


def warn_of_eight_bit(model: nn.Module) -> None:
    """Warn that `load_in_8bit` makes importance ratios noisy."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, DiffusionLM) and base.uses_bitsandbytes and base.hf_quantizer.quantization_config.load_in_8bit:
        logger.warning(
            "The model is loaded in 8 bits: its layers round activations too, by the largest ones of the batch, so "
            "that a token's log-probability depends on the other rows of its batch. On policy, where ratios should be "
            "1, expect |log ratio| around 0.1 (`rollout/max_abs_log_ratio`). With load_in_4bit=True only weights are "
            "rounded, and ratios start at 1."
        )


# ---------------------------------------------------------------- data sets


def check_router_loss(coefficient: float | None) -> None:
    """Refuse TRL's load-balancing loss of mixtures of experts.

    Raises:
        ValueError: if it has a coefficient other than 0.
    """
    if coefficient:
        raise ValueError(
            f"router_aux_loss_coef={coefficient} is not supported: the load-balancing loss needs the routers' scores "
            "of all tokens with their gradients, and scoring here returns log-probabilities at single positions only. "
            "Leave it out. With LoRA the routers are not trained, so their load does not drift by themselves."
        )


def check_dataset(dataset: Any, name: str = "train_dataset", columns: Mapping[str, str] | None = None) -> None:
    """Refuse something that is no data set, a data set with images, and one without a column that is needed.

    Args:
        dataset: the trainer's argument.
        name: name of the argument, for messages.
        columns: names of the columns that are needed, and who needs each.

    Raises:
        TypeError: if it is neither a `Dataset` nor an `IterableDataset`.
        ValueError: if it has splits, columns of images, or lacks a column.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        first = next(iter(dataset), "train")
        raise ValueError(
            f"{name} has several splits ({', '.join(dataset)}). Pass one of them, for example dataset[{first!r}]."
        )
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"{name} must be a Dataset or an IterableDataset of the library `datasets`, got {type(dataset).__name__}. "
            "Dataset.from_list makes one from a list of rows."
        )
    found = columns_of(dataset)
    if found is None:
        return  # a stream without rows, which `check_rows` refuses
    if images := sorted(_IMAGES & set(found)):
        raise ValueError(
            f"{name} has a column {images[0]!r}, and images are not supported. Remove the column, or rename it if it "
            "holds something else."
        )
    for column, user in (columns or {}).items():
        if column not in found:
            raise ValueError(
                f"{name} has no column {column!r}, which {user} needs; its columns are {', '.join(found)}. Rename or "
                "add the column."
            )


def named_eval_datasets(dataset: Any) -> dict[str, Any]:
    """Return the data sets of the trainer's `eval_dataset` (none, one or several) by their names for messages."""
    if isinstance(dataset, dict):
        return {f"eval_dataset[{split!r}]": rows for split, rows in dataset.items()}
    return {} if dataset is None else {"eval_dataset": dataset}


def check_eval_datasets(dataset: Any, columns: Mapping[str, str] | None = None) -> None:
    """Check the trainer's `eval_dataset`, a data set or several by name; see `check_dataset`.

    Raises:
        TypeError: if one of them is no data set.
        ValueError: if one lacks a column or has no rows.
    """
    for name, rows in named_eval_datasets(dataset).items():
        check_dataset(rows, name, columns)
        check_rows(rows, 1, "an evaluation needs one", name)


def columns_of(dataset: Dataset | IterableDataset) -> list[str] | None:
    """Return the names of the columns; a stream that does not know them is asked for its first row.

    `None` stands for a stream without rows.
    """
    if dataset.column_names is not None:
        return list(dataset.column_names)
    row = next(iter(dataset.take(1)), None)
    return None if row is None else list(row)


def check_rows(dataset: Dataset | IterableDataset, needed: int, why: str, name: str = "train_dataset") -> None:
    """Refuse a data set with too few rows.

    Args:
        dataset: a data set; of a stream no more rows than needed are read.
        needed: number of rows that it must have.
        why: what needs them, for the message.
        name: name of the argument, for the message.

    Raises:
        ValueError: if it has fewer.
    """
    rows = sum(1 for _ in dataset.take(needed)) if isinstance(dataset, IterableDataset) else len(dataset)
    if rows < needed:
        raise ValueError(
            f"{name} has {rows} row{'' if rows == 1 else 's'}, and {why}. Add rows, or let fewer be needed at a time."
        )


def check_prompts_fit(
    model: Any, canvas_length: int, datasets: Mapping[str, Any], encode: Callable[[list], Sequence[Sequence[int]]]
) -> None:
    """Refuse prompts that are too long for the model's positions together with the canvas.

    Tokenising a large data set would take minutes, so only the 64 prompts with most characters are tokenised. The
    sampler checks every prompt again when it draws; prompts of streams are checked only then.

    Args:
        model: the trainer's model.
        canvas_length: positions to sample.
        datasets: data sets with a column `prompt`, by their names for the message.
        encode: turns prompts into token ids.

    Raises:
        ValueError: if a prompt is too long, or the canvas leaves no position for one.
    """
    check_fits(model, 1, canvas_length, "any data set")
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            longest = heapq.nlargest(_LONGEST, dataset["prompt"], key=lambda prompt: len(str(prompt)))
            check_fits(model, max(map(len, encode(longest))), canvas_length, name)


# ---------------------------------------------------------------- rollouts and rewards


def check_rollout_data(args: GRPOConfig, train_dataset: Any, eval_dataset: Any, reward_funcs: Any) -> None:
    """Check the data sets and reward functions of reinforcement learning, alone and against each other.

    Args:
        args: the trainer's config.
        train_dataset: the trainer's argument.
        eval_dataset: the trainer's argument.
        reward_funcs: the trainer's argument.

    Raises:
        TypeError: if an argument is no data set.
        ValueError: see `check_dataset`, `check_rows`, `check_rewards` and `check_eval_batch`.
    """
    columns = {"prompt": "the trainer"} | columns_of_rewards(reward_funcs)
    check_dataset(train_dataset, "train_dataset", columns)
    completions, group = int(args.generation_batch_size or 0), int(args.num_generations or 1)
    check_rows(
        train_dataset,
        completions // group,
        f"a rollout batch needs {completions // group} prompts: generation_batch_size {completions} "
        f"(per_device_train_batch_size {args.per_device_train_batch_size} × steps_per_generation "
        f"{args.steps_per_generation} × {args.world_size} processes) ÷ num_generations {group}",
    )
    check_rewards(reward_funcs, columns_of(train_dataset) or [])
    if eval_dataset is not None:
        check_eval_datasets(eval_dataset, columns)
        check_eval_batch(args)


def check_eval_batch(args: GRPOConfig) -> None:
    """Refuse an evaluation whose batches would split the group of a prompt.

    Raises:
        ValueError: if the batch of all processes is no multiple of the group.
    """
    group = int(args.num_generations_eval or args.num_generations or 1)
    if args.per_device_eval_batch_size * args.world_size % group:
        raise ValueError(
            f"per_device_eval_batch_size ({args.per_device_eval_batch_size}) × {args.world_size} processes must be a "
            f"multiple of the {group} completions per prompt in evaluation. Change it, or set num_generations_eval."
        )


def columns_of_rewards(reward_funcs: Any) -> dict[str, str]:
    """Return the columns that reward functions need, with the function that needs each.

    Args:
        reward_funcs: the trainer's argument; reward models need no column.

    Raises:
        ValueError: if a function asks for `prompt` or `completion`, which TRL never passes.
    """
    needed = {}
    for function in _functions(reward_funcs):
        for parameter in _parameters(inspect.unwrap(function)) or []:
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and parameter.name not in _FROM_TRL:
                user = f"the reward function {get_callable_name(function)}"
                if parameter.name in _NOT_PASSED_ON:
                    raise ValueError(
                        f"A parameter of {user} is called {parameter.name!r}, and TRL calls it with `prompts` and "
                        "`completions`, lists with an entry per completion. Rename the parameter."
                    )
                needed[parameter.name] = user
    return needed


def check_rewards(reward_funcs: Any, columns: Iterable[str]) -> None:
    """Refuse reward functions that cannot be called with the columns of the data set.

    Args:
        reward_funcs: the trainer's argument.
        columns: names of the data set's columns.

    Raises:
        ValueError: if a column has the name of an argument of TRL's, or a function does not accept all arguments.
    """
    columns = set(columns)
    # A column `completion_ids` is not passed on, so it hides nothing.
    if hidden := sorted(columns & (_FROM_TRL - {"completion_ids"})):
        raise ValueError(
            f"The data set has a column {hidden[0]!r}, but TRL calls reward functions with an argument of that name. "
            "Rename the column."
        )
    passed = sorted(_FROM_TRL | (columns - _NOT_PASSED_ON))
    for function in _functions(reward_funcs):
        parameters = _parameters(function)
        if parameters is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            continue
        taken = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
        if too_many := [name for name in passed if name not in taken]:
            raise ValueError(
                f"The reward function {get_callable_name(function)} does not take {', '.join(too_many)}. TRL calls "
                "reward functions with prompts, completions, every other column and more, all by name. Add `**kwargs` "
                "to its parameters."
            )


def _functions(reward_funcs: Any) -> list[Callable]:
    """Return the functions among the trainer's rewards, with those inside a `StepAwareReward`, without models."""
    given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    step_aware = [function for function in given if isinstance(function, StepAwareReward)]
    inside = [f.reward for f in step_aware] + [f.success for f in step_aware if f.success is not None]
    plain = [f for f in given if callable(f) and not isinstance(f, (nn.Module, StepAwareReward))]
    return plain + inside


def _parameters(function: Callable) -> list[inspect.Parameter] | None:
    """Return the parameters of a function, not of one that it wraps; `None` if Python does not know them."""
    try:
        return list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except ValueError:  # some built-in functions have no signature
        return None
