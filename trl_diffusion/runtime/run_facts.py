"""Facts about a run that its checkpoints depend on, and how those of two runs differ.

A checkpoint holds drawn completions with their log-probabilities, positions in random streams and in the data, and
averages of gradients. All of them mean something else under other settings, another model or other data. Its manifest
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

# Of transformers' own settings those that must stay, and those of learning that may change and take effect. Its other
# settings (logging, saving, evaluation, hardware, the Hub) are not recorded.
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
    "adam_beta2",  # averages with one decay are corrected for their start with another
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
# Of the settings that TRL and this library add, all must stay but these, so that a new method's need no entry here.
_MAY_CHANGE = (
    *_LEARNING,
    "ds3_gather_for_generation",
    "log_completions",
    "log_multimodal",
    "log_unique_prompts",
    "nonfinite_update",
    "num_completions_to_print",
    "num_generations_eval",
    "record_signals",
    "reward_error",
    "reward_nonfinite",
    "reward_timeout",
    "tied_rollouts_patience",
)
# Of those, what is no part of the run. `model_init_kwargs` may hold a token; what they make of the model is compared.
_NOT_RECORDED = ("log_completions_hub_repo", "model_init_kwargs", "trust_remote_code")
# Of an adapter's config, what does not change the network that is trained.
_NOT_OF_THE_ADAPTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "runtime_config",
)
# Of a model's config, what says nothing about the network.
_NOT_OF_THE_MODEL = ("auto_map", "use_cache")

# Rows of the data set, tensors, and numbers of a tensor that enter a checksum at most; evenly spaced where there are
# more.
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
# Compared where both runs have a checksum that differs: a moved or renamed folder holds the same model.
_EXPLAINING = ("name", "checksum")
# Where these facts of the run differ, so does the whole table, which is then not listed.
_HEADS = {"settings": "trainer", "model": "network", "adapter": "adapter"}


@dataclass(frozen=True)
class Change:
    """A fact that two runs do not share.

    Args:
        name: of the fact, for messages.
        was: its value in the checkpoint.
        is_now: its value in this run.
        allowed: whether a run can go on with the other value.
    """

    name: str
    was: Any
    is_now: Any
    allowed: bool

    def __str__(self) -> str:
        return f"{self.name} was {_shown(self.was)} and is {_shown(self.is_now)}"


def changes(before: Facts, now: Facts) -> list[Change]:
    """Return what differs between two runs, among the facts that are known of both."""
    return [
        Change(_NAMES[table].format(name), before[table][name], now[table][name], name in _MAY_CHANGE)
        for table, name in _compared(before, now)
        if before[table][name] != now[table][name]
    ]


def _compared(before: Facts, now: Facts) -> Iterator[tuple[str, str]]:
    for table in [table for table in _NAMES if table in before and table in now]:
        head, run = _HEADS.get(table), before.get("run", {})
        if head in run and run[head] != now["run"][head]:
            continue
        yield from ((table, name) for name in before[table] if name in now[table] and name not in _EXPLAINING)
        sums = [facts.get("checksum") for facts in (before[table], now[table])]
        if None not in sums and sums[0] != sums[1]:
            yield from ((table, name) for name in _EXPLAINING if name in before[table] and name in now[table])


def unknown(before: Facts, now: Facts) -> list[str]:
    """Return the facts that must stay and that a checkpoint of an earlier version does not tell, by name."""
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
    added = [name for name in added if not name.startswith("vllm_")]  # which cannot be used
    names = [field.name for field in fields(args) if field.name in (*_STAY, *_LEARNING, *added)]
    return as_json({name: getattr(args, name) for name in names})


def model_facts(model: PreTrainedModel, checksum: str | None) -> dict[str, Any]:
    """Return what makes the network: the fields of its family's config, its dtype, and the model's name.

    Args:
        model: without an adapter around it.
        checksum: of weights that checkpoints do not hold, if there are any.
    """
    config, general = model.config.to_dict(), PreTrainedConfig().to_dict()
    own = {name: value for name, value in config.items() if name not in (*general, *_NOT_OF_THE_MODEL)}
    name = Path(model.config._name_or_path).name
    return as_json(own | {"dtype": str(model.dtype), "checksum": checksum, "name": name})


def adapter_facts(configs: dict[str, PeftConfig]) -> dict[str, Any]:
    """Return the shape and scale of adapters, by the names of their config's fields; several are told apart."""
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
    """Return what identifies a data set wherever it lies: rows, columns, and a checksum of up to 10,000 rows.

    Args:
        dataset: a `Dataset`; of anything else, such as a stream, only the columns are known.
        chat_template: through which conversational prompts go.
    """
    facts: dict[str, Any] = {"chat template": None if chat_template is None else text_checksum(str(chat_template))}
    if dataset is None:
        return facts
    facts["list of columns"] = (
        sorted(dataset.column_names or []) if isinstance(dataset, Dataset | IterableDataset) else []
    )
    if not isinstance(dataset, Dataset):
        return facts | {"number of rows": None, "checksum": None}
    # not `dataset._fingerprint`, which depends on how the data set was made and cached
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

    Args:
        weights: by name, in a fixed order; every process must give the same.
        whole: a context in which a parameter that is sharded by ZeRO-3 is whole.
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
    """The value as a manifest gives it back: tuples and sets are lists, and what JSON does not know is text."""
    return json.loads(json.dumps(value, default=lambda item: sorted(item) if isinstance(item, set) else str(item)))


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
