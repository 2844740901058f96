"""Collect the facts about a run that its checkpoints depend on, and compare those of two runs.

A checkpoint holds drawn completions with their log-probabilities, positions in random streams and in the data, and
averages of gradients. All of them would be wrong under other settings, with another model or other data. Its manifest
therefore keeps the facts below in tables, and a run that resumes compares them with its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

# transformers' own settings that must stay as they were. Those of learning may change, and then take effect. All its
# others (logging, saving, evaluation, hardware, the Hub) are not recorded.
_STAY = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",  # Adam's bias correction assumes that its averages had one decay from the start
    "train_sampling_strategy",
    "length_column_name",
    "dataloader_drop_last",
    "neftune_noise_alpha",
    "label_smoothing_factor",
)
_LEARNING = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
)
# Settings that may change. All others that TRL and this library add must stay, so settings of a new method need no
# entry here to be safe.
_MAY_CHANGE = (
    *_LEARNING,
    "ds3_gather_for_generation",
    "log_completions",
    "log_multimodal",
    "log_unique_prompts",
    "merge_adapter_for_rollout",
    "nonfinite_update",
    "num_completions_to_print",
    "num_generations_eval",
    "record_signals",
    "reward_error",
    "reward_nonfinite",
    "reward_timeout",
    "rollout_compile",
    "tied_rollouts_patience",
)
# Added settings that say nothing about the run. `model_init_kwargs` may hold a token, and the model that they give is
# compared in its own table.
_NOT_RECORDED = ("log_completions_hub_repo", "model_init_kwargs", "trust_remote_code")
# Fields of an adapter's config that do not change the network that is trained.
_NOT_OF_THE_ADAPTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "runtime_config",
)
# Fields of a model's config that say nothing about the network.
_NOT_OF_THE_MODEL = ("auto_map", "use_cache")

# At most this many rows of the data set, tensors, and numbers of a tensor enter a checksum, evenly spaced.
_ROWS, _TENSORS, _NUMBERS = 10_000, 16, 1024
_SHOWN = 200  # characters of a value in a message

Facts = dict[str, dict[str, Any]]
# The tables, and how a message names a fact of each.
_NAMES = {
    "run": "the {}",
    "settings": "`{}`",
    "model": "the model's `{}`",
    "adapter": "the adapter's `{}`",
    "data": "the data set's {}",
}
# Reported only if the checksums differ: a model or data set keeps its checksum when its folder is moved or renamed.
_EXPLAINING = ("name", "checksum")
# If one of these facts of the run differs, the whole table does too, and its entries are not listed one by one.
_HEADS = {"settings": "trainer", "model": "network", "adapter": "adapter"}


@dataclass(frozen=True)
class Change:
    """A fact in which two runs differ.

    Args:
        name: of the fact, for messages.
        was: its value in the checkpoint.
        is_now: its value in this run.
        allowed: whether a run can continue with the other value.
    """

    name: str
    was: Any
    is_now: Any
    allowed: bool

    def __str__(self) -> str:
        return f"{self.name} was {_shown(self.was)} and is {_shown(self.is_now)}"


def changes(before: Facts, now: Facts) -> list[Change]:
    """Return the facts that differ between two runs, out of those known of both."""
    return [
        Change(_NAMES[table].format(name), before[table][name], now[table][name], name in _MAY_CHANGE)
        for table, name in _compared(before, now)
        if before[table][name] != now[table][name]
    ]


def _compared(before: Facts, now: Facts) -> Iterator[tuple[str, str]]:
    """Yield (table, name) of the facts that are compared, see `_EXPLAINING` and `_HEADS`."""
    for table in [table for table in _NAMES if table in before and table in now]:
        head, run = _HEADS.get(table), before.get("run", {})
        if head in run and run[head] != now["run"][head]:
            continue
        yield from ((table, name) for name in before[table] if name in now[table] and name not in _EXPLAINING)
        sums = [facts.get("checksum") for facts in (before[table], now[table])]
        if None not in sums and sums[0] != sums[1]:
            yield from ((table, name) for name in _EXPLAINING if name in before[table] and name in now[table])


def unknown(before: Facts, now: Facts) -> list[str]:
    """Return the names of facts that must stay but that a checkpoint of an earlier version does not hold."""
    names = []
    for table, facts in now.items():
        if table in before or table in ("run", "settings"):
            missing = [name for name in facts if name not in before.get(table, {}) and name not in _MAY_CHANGE]
            names += [_NAMES[table].format(name) for name in missing]
        else:
            names.append(f"the {'data set' if table == 'data' else table}")
    return names


# ---------------------------------------------------------------- the tables


def setting_facts(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings that are compared or whose change is reported, by name."""
    of_transformers = {field.name for field in fields(TrainingArguments)}
    added = [field.name for field in fields(args) if field.name not in (*of_transformers, *_NOT_RECORDED)]
    added = [name for name in added if not name.startswith("vllm_")]  # vLLM cannot be used, so they have no effect
    names = [field.name for field in fields(args) if field.name in (*_STAY, *_LEARNING, *added)]
    return as_json({name: getattr(args, name) for name in names})


def model_facts(model: PreTrainedModel, checksum: str | None) -> dict[str, Any]:
    """Return the facts that define the network: the fields of its family's config, its dtype, and the model's name.

    Args:
        model: the model without an adapter around it.
        checksum: checksum of the weights that checkpoints do not hold, if there are any.
    """
    # Fields that every transformers config has are about generation, outputs and so on, not about the network.
    config, general = model.config.to_dict(), PreTrainedConfig().to_dict()
    own = {name: value for name, value in config.items() if name not in (*general, *_NOT_OF_THE_MODEL)}
    name = Path(model.config._name_or_path).name
    return as_json(own | {"dtype": str(model.dtype), "checksum": checksum, "name": name})


def adapter_facts(configs: dict[str, PeftConfig]) -> dict[str, Any]:
    """Return the shape and scale of adapters by the fields of their configs, with the adapter's name if several."""
    several = len(configs) > 1
    return as_json(
        {
            f"{adapter}.{name}" if several else name: value
            for adapter, config in configs.items()
            for name, value in config.to_dict().items()
            if name not in _NOT_OF_THE_ADAPTER
        }
    )


def data_facts(dataset: Any, chat_template: Any) -> dict[str, Any]:
    """Return facts that identify a data set wherever it is stored: rows, columns, a checksum of up to 10,000 rows.

    Args:
        dataset: a `Dataset`; of anything else, such as a stream, only the columns are known.
        chat_template: the tokenizer's template for conversational prompts.
    """
    facts: dict[str, Any] = {"chat template": None if chat_template is None else text_checksum(str(chat_template))}
    if dataset is None:
        return facts
    facts["list of columns"] = (
        sorted(dataset.column_names or []) if isinstance(dataset, Dataset | IterableDataset) else []
    )
    if not isinstance(dataset, Dataset):
        return facts | {"number of rows": None, "checksum": None}
    # Not `dataset._fingerprint`, which also depends on how the data set was made and cached.
    state, rows = xxhash.xxh3_64(), len(dataset)
    sample = dataset.select(range(0, rows, -(-rows // _ROWS) or 1)).with_format("arrow")
    for table in sample.iter(1000):
        for row in table.to_pylist():
            state.update(json.dumps(row, sort_keys=True, default=str).encode())
    return facts | {"number of rows": rows, "checksum": state.hexdigest()}


def trained_weights(model: torch.nn.Module) -> str:
    """Return the number of tensors that are trained, and a checksum of their names."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return f"{len(names)} tensors (checksum of their names {text_checksum(' '.join(names))})"


def weights_checksum(
    weights: Iterable[tuple[str, torch.nn.Parameter]],
    whole: Callable[[torch.nn.Parameter], AbstractContextManager],
) -> str:
    """Return a checksum of a sample of weights: some numbers of some tensors, in float32.

    A sample, because all weights of a large model would have to be gathered and copied to the CPU.

    Args:
        weights: by name, in a fixed order; the same on every process, because gathering them is collective.
        whole: makes a context in which a parameter that ZeRO-3 shards is whole.
    """
    real = [(name, weight) for name, weight in weights if weight.is_floating_point() and not weight.is_meta]
    state = xxhash.xxh3_64()
    for name, weight in real[:: -(-len(real) // _TENSORS) or 1]:
        with whole(weight), torch.no_grad():
            values = weight.full_tensor() if isinstance(weight, DTensor) else weight
            numbers = values.flatten()[:: -(-values.numel() // _NUMBERS) or 1].float().cpu().numpy()
        state.update(f"{name} {tuple(values.shape)}".encode())
        state.update(numbers.tobytes())
    return state.hexdigest()


def text_checksum(text: str) -> str:
    return xxhash.xxh3_64(text.encode()).hexdigest()


def as_json(value: Any) -> Any:
    """Return the value as it is read back from a manifest: tuples and sets as lists, unknown types as text."""
    return json.loads(json.dumps(value, default=lambda item: sorted(item) if isinstance(item, set) else str(item)))


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
