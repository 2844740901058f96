"""The inner parts of TRL, transformers, accelerate and PEFT that this library uses, and what for.

They may change with any release and without notice. The lists below are complete: the package's source is searched
for what it uses, and a use that is not listed fails, as does an entry that is no longer used. A release that renames
one of them, or changes its parameters, fails here with its name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, masking_utils
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from trl import GRPOTrainer, TrlParser
from trl.trainer.base_config import _BaseConfig

import trl_diffusion
from trl_diffusion.models import WindowCache
from trl_diffusion.models.layers import CACHE_KEYWORD
from trl_diffusion.trainers import DiffusionGRPOTrainer

for extra in ("bitsandbytes", "lm_eval"):  # all modules of the package are read
    pytest.importorskip(extra)

LIBRARIES = ("trl", "transformers", "accelerate", "peft")

# (class, method) → its parameters, and why it is overridden or called
METHODS: dict[tuple[type, str], tuple[list[str], str]] = {
    (GRPOTrainer, "_generate_single_turn"): (
        ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        "overridden: completions are sampled by diffusion",
    ),
    (GRPOTrainer, "_generate_and_score_completions"): (["inputs"], "overridden: views are planned for the rollout"),
    (GRPOTrainer, "_calculate_rewards"): (
        ["inputs", "prompts", "completions", "completion_ids_list"],
        "overridden: guards of the rewards; SAPO's probe sees the finished batch",
    ),
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): (
        ["model", "input_ids", "attention_mask", "logits_to_keep"],
        "overridden: TRL's loss is given the scores of a noised view; only these come by position",
    ),
    (GRPOTrainer, "_prepare_inputs"): (["generation_batch"], "overridden: all views of an update have the same rows"),
    (GRPOTrainer, "_compute_loss"): (["model", "inputs"], "overridden and called: TRL's loss of one view"),
    (GRPOTrainer, "compute_loss"): (
        ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "overridden: the loss is checked before it is used",
    ),
    (Trainer, "_run_epoch"): (["model", "epoch"], "overridden: the sampler is told the epoch; the rest is passed on"),
    (GRPOTrainer, "_tokenize_prompts"): (["prompts"], "called: lengths of prompts for the estimate of cost"),
    (GRPOTrainer, "_get_train_sampler"): (["dataset"], "overridden: the order is a function of seed and epoch"),
    (GRPOTrainer, "_save_checkpoint"): (["model", "trial"], "overridden: the rollout buffer is in the checkpoint"),
    (GRPOTrainer, "_load_optimizer_and_scheduler"): (["checkpoint"], "overridden: the buffer is read back"),
    (GRPOTrainer, "training_step"): (
        ["model", "inputs", "num_items_in_batch"],
        "overridden, between TRL's and transformers': one pass per view",
    ),
    (Trainer, "_prepare_inputs"): (["inputs"], "called in SFT: rows to the device"),
    (Trainer, "compute_loss"): (
        ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "overridden in SFT: the masked loss",
    ),
    (Trainer, "prediction_step"): (
        ["model", "inputs", "prediction_loss_only", "ignore_keys"],
        "overridden in SFT: the masked loss of evaluation",
    ),
    (Trainer, "_set_signature_columns_if_needed"): ([], "overridden in SFT: which columns are kept"),
    (Trainer, "_get_grad_norm"): (["model", "grad_norm"], "overridden: updates with a bad gradient are skipped"),
    (Trainer, "_load_from_checkpoint"): (["resume_from_checkpoint", "model"], "overridden: dtypes of adapters"),
    (Trainer, "_push_from_checkpoint"): (["checkpoint_folder"], "overridden: the uploaded copy is sealed"),
    (Trainer, "_finish_current_push"): ([], "called: before files that are being uploaded are overwritten"),
    (Trainer, "_get_output_dir"): (["trial"], "called: where the checkpoint goes"),
    (Trainer, "_init_training_state"): (
        ["max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"],
        "overridden: a run killed after its last update is at its end",
    ),
    (Trainer, "_finalize_training"): (
        ["trial", "num_train_samples", "start_time"],
        "overridden: loss and speed are those of the whole run, not of the part after a resume",
    ),
    (GradientState, "_set_sync_gradients"): (["sync_gradients"], "called: only the last view synchronises"),
    (PreTrainedModel, "_load_pretrained_model"): (
        ["state_dict", "checkpoint_files", "load_config", "expected_keys"],
        "overridden: unexpected weights under ZeRO-3; static, the model comes first",
    ),
    (PreTrainedModel, "_finalize_model_loading"): (
        ["load_config", "loading_info"],
        "overridden: missing and unexpected weights are errors; static, the model comes first",
    ),
    (PreTrainedModel, "_can_set_experts_implementation"): ([], "overridden: it looks into the file of the class"),
    (Trainer, "train"): (["resume_from_checkpoint", "trial", "ignore_keys_for_eval"], "overridden: what is resumed"),
    (Trainer, "_save"): (["output_dir", "state_dict"], "overridden: cards next to adapters name the Hub's id"),
    (Trainer, "create_scheduler"): (
        ["num_training_steps", "optimizer"],
        "overridden: the rates of a resumed run are those of its own settings",
    ),
    (GRPOTrainer, "log"): (["logs", "start_time"], "overridden: completions are shown once; SFT's metrics are added"),
    (Trainer, "evaluate"): (["eval_dataset", "ignore_keys", "metric_key_prefix"], "overridden: the same noise again"),
    (GRPOTrainer, "create_model_card"): (["model_name", "dataset_name", "tags"], "overridden: the method's facts"),
}

REST_IS_PASSED_ON = {"_get_per_token_logps_and_entropies", "_run_epoch"}

# attribute → the class that has it, and what it is for
ATTRIBUTES: dict[str, tuple[Any, str]] = {
    # TRL's state of a run, kept in checkpoints
    "_step": (GRPOTrainer, "position in the rollout buffer"),
    "_buffered_inputs": (GRPOTrainer, "the rollout buffer"),
    "_metrics": (GRPOTrainer, "metrics of this library are logged with TRL's"),
    "_logs": (GRPOTrainer, "tables of completions"),
    "_last_world_entropy": (GRPOTrainer, "state of the adaptive entropy coefficient"),
    "entropy_coef": (GRPOTrainer, "the adaptive entropy coefficient"),
    # transformers', likewise
    "_tr_loss": (Trainer, "loss since the last log"),
    "_total_loss_scalar": (Trainer, "loss of the run"),
    "_globalstep_last_logged": (Trainer, "steps that the logged loss is averaged over"),
    "_initial_global_step": (Trainer, "the step from which speed is counted"),
    # what is set to something else than TRL would
    "beta": (GRPOTrainer, "0 while TRL generates, so that it does not score the reference model itself"),
    "args": (Trainer, "set before transformers does, because the choices of a method read it"),
    "ref_model": (GRPOTrainer, "a copy of the model given, where TRL would load a path"),
    "reward_funcs": (GRPOTrainer, "guarded and step-aware rewards in place of those given"),
    "eos_token_ids": (GRPOTrainer, "all ids that end a text, for TRL's test of truncated completions"),
    "loss_is_scaled_for_ga": (GRPOTrainer, "off in SFT, whose loss is divided by transformers"),
    "log_completions": (GRPOTrainer, "off in logs between rollouts, so that completions are shown once"),
    "lr_scheduler": (Trainer, "not loaded from a checkpoint, whose rates it would bring back"),
    "_signature_columns": (Trainer, "columns that SFT keeps"),
    # what is read
    "_dist": (GRPOTrainer, "gathers FSDP's outermost weights for sampling"),
    "_tokenizer": (GRPOTrainer, "the tokenizer, where the processing class is a processor"),
    "_name": (GRPOTrainer, "name of the method in model cards"),
    "_paper": (GRPOTrainer, "citation of the method in model cards"),
    "_tag_names": (GRPOTrainer, "tags of models on the Hub"),
    "_attn_implementation": (PreTrainedConfig, "which attention runs"),
    "_VALID_DICT_FIELDS": (_BaseConfig, "fields that SFT's command line gives as JSON"),
    "_name_or_path": (PreTrainedConfig, "where a model came from"),
    "_actions": (TrlParser, "names and defaults of options, for short helps and spellings meant"),
    "_from_config": (PreTrainedModel, "a model on the meta device in the dtype of its weights"),
    "_keys_to_ignore_on_load_unexpected": (PreTrainedModel, "unexpected weights of a mixture are not ignored"),
    "_dynamo": (torch, "sizes of compiled steps are marked as symbols, addresses as static"),
    "_compiled_call_impl": (torch.nn.Module, "networks compiled in place are sampled uncompiled"),
}

PRIVATE_IMPORTS = {
    "trl.trainer.base_trainer._BaseTrainer": "SFT's trainer is none of TRL's, and has its model cards",
    "trl.trainer.base_config._BaseConfig": "and its config has TRL's defaults",
}

# keys of the rows that TRL's rollout gives and its loss reads
INPUT_KEYS = {
    "prompt_ids": "read, and given to the loss",
    "prompt_mask": "read, and given to the loss",
    "completion_ids": "replaced by the whole canvas",
    "completion_mask": "replaced by the targets of a view",
    "advantages": "read, changed by methods, and given to the loss for every token",
    "num_items_in_batch": "replaced: tokens that may learn",
    "old_per_token_logps": "replaced by those of the views",
    "ref_per_token_logps": "replaced by those of the views",
    "tool_mask": "weights of views in the KL",
    "importance_sampling_ratio": "weights of tokens drawn under an approximate cache, for vespo",
}

_HIDDEN = ["hidden_states", "attention_mask", "position_ids", CACHE_KEYWORD, "use_cache", "position_embeddings"]
# functions of the stock networks → the keywords by which they are called, or call what replaces a part of them
FORWARDS = {
    "{}ForCausalLM": [
        *["input_ids", "attention_mask", "position_ids", CACHE_KEYWORD, "inputs_embeds", "labels", "use_cache"],
        *["logits_to_keep", "kwargs"],
    ],
    "{}Model": [
        *["input_ids", "attention_mask", "position_ids", CACHE_KEYWORD, "inputs_embeds", "use_cache", "kwargs"],
    ],
    "{}DecoderLayer": [*_HIDDEN, "kwargs"],
    "{}Attention": ["hidden_states", "position_embeddings", "attention_mask", CACHE_KEYWORD, "kwargs"],
    "{}RotaryEmbedding": ["x", "position_ids"],
}
ATTENTION_PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling", "attention_dropout"]
LAYER_PARTS = ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"]
STOCK = {"Llama": llama, "Qwen2": qwen2, "Qwen3": qwen3}


# ---------------------------------------------------------------- the lists are right


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_methods(owner, name):
    parameters = list(inspect.signature(getattr(owner, name)).parameters)[1:]
    expected = METHODS[owner, name][0]
    assert parameters[: len(expected) if name in REST_IS_PASSED_ON else None] == expected


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name):
    owner = ATTRIBUTES[name][0]
    if inspect.ismodule(owner):
        assert hasattr(owner, name)
    else:
        assert any(name in vars(base) or name in assigned(base) for base in owner.__mro__)


def test_input_keys():
    assert used_input_keys() == INPUT_KEYS.keys()


@pytest.mark.parametrize("family", STOCK)
def test_networks(family):
    module = STOCK[family]
    for name, expected in FORWARDS.items():
        parameters = list(inspect.signature(vars(module)[name.format(family)].forward).parameters)[1:]
        assert parameters == expected, name
    attention, layer = vars(module)[f"{family}Attention"], vars(module)[f"{family}DecoderLayer"]
    assert {*ATTENTION_PARTS, *(["q_norm", "k_norm"] if family == "Qwen3" else [])} <= assigned(attention)
    assert assigned(layer) >= {*LAYER_PARTS}
    passed = {keyword.arg for call in calls_of(layer, "self_attn") for keyword in call.keywords}
    assert passed == {*_HIDDEN, None}  # None: the layer hands its **kwargs on, and with them `read`


def test_a_cache_has_what_is_called():
    """Attributes of the cache that the masks, networks and attention of the families use."""
    sources = [masking_utils.create_causal_mask, vars(masking_utils)["_preprocess_mask_arguments"], *STOCK.values()]
    used = {
        node.attr
        for source in sources
        for node in ast.walk(tree_of(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == CACHE_KEYWORD
    }
    assert {"update", "get_seq_length", "get_mask_sizes", "get_query_offset"} == used
    for name in used - {"update"}:
        ours = list(inspect.signature(getattr(WindowCache, name)).parameters)
        assert len(ours) == len(inspect.signature(getattr(Cache, name)).parameters), name


# ---------------------------------------------------------------- the lists are complete


@pytest.mark.slow
def test_nothing_is_missing_and_nothing_is_stale():
    listed = {name for _, name in METHODS} | ATTRIBUTES.keys()
    used = overridden() | touched() | unknown_private_names() | loss_flags()
    assert used - listed == set(), "used by the package and not listed"
    assert listed - used == set(), "listed and no longer used"


def test_private_imports():
    imported = {
        f"{node.module}.{alias.name}"
        for tree in package_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in LIBRARIES
        for alias in node.names
        if any(map(is_private, (*str(node.module).split("."), alias.name)))
    }
    assert imported == PRIVATE_IMPORTS.keys()


# ---------------------------------------------------------------- reading the package


@cache
def package_modules() -> tuple[ModuleType, ...]:
    names = [module.name for module in pkgutil.walk_packages(trl_diffusion.__path__, "trl_diffusion.")]
    return tuple(importlib.import_module(name) for name in names)


def package_trees() -> Iterator[ast.AST]:
    for path in Path(trl_diffusion.__file__).parent.rglob("*.py"):
        yield ast.parse(path.read_text())


@cache
def package_classes() -> tuple[type, ...]:
    found = (value for module in package_modules() for value in vars(module).values() if inspect.isclass(value))
    return tuple(dict.fromkeys(value for value in found if value.__module__.startswith("trl_diffusion.")))


@cache
def foreign_bases(ours: type) -> tuple[type, ...]:
    """Library classes that a class extends, itself or, if it is a mixin, in the classes that are built with it."""
    families = (other for other in package_classes() if issubclass(other, ours))
    bases = dict.fromkeys(base for other in families for base in other.__mro__)
    return tuple(base for base in bases if base.__module__.partition(".")[0] in LIBRARIES)


@cache
def tree_of(source) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(source)))


@cache
def assigned(owner: type) -> frozenset[str]:
    """Attributes that a class assigns to `self` or `cls`."""
    if owner is object:
        return frozenset()
    return frozenset(node.attr for node in own_attributes(tree_of(owner)) if isinstance(node.ctx, ast.Store))


def own_attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            yield node


def calls_of(owner: type, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree_of(owner)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
            yield node


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def overridden() -> set[str]:
    """Private names of library classes, and all of trainers, that a class of the package has too."""
    found = set()
    for ours in package_classes():
        for name in vars(ours).keys() - NOT_OURS:
            bases = [base for base in foreign_bases(ours) if name in vars(base) and not name.startswith("__")]
            if any(is_private(name) or issubclass(base, Trainer) for base in bases):
                found.add(name)
    return found


# Made by Python, and by transformers when it is first asked for.
NOT_OURS = {"_abc_impl", "_can_set_experts_implementation_cached_value"}


def touched() -> set[str]:
    """Attributes of library classes that a class of the package assigns, or reads though they are private."""
    found = set()
    for ours in package_classes():
        for node in own_attributes(tree_of(ours)):
            if isinstance(node.ctx, ast.Store) or is_private(node.attr):
                bases = [base for base in foreign_bases(ours) if issubclass(base, Trainer) or is_private(node.attr)]
                if any(node.attr in vars(base) or node.attr in assigned(base) for base in bases):
                    found.add(node.attr)
    return found


def unknown_private_names() -> set[str]:
    """Private attributes of any object that nothing in the package defines."""
    known, used = set(), set()
    for tree in package_trees():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                known.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                known.add(node.attr)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                used.add(node.attr)
    return used - known


def string_constants(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def loss_flags() -> set[str]:
    """Attributes of TRL's trainer that are set by name while its loss runs."""
    return string_constants(tree_of(DiffusionGRPOTrainer._token_loss)) & assigned(GRPOTrainer)


def used_input_keys() -> set[str]:
    """Keys of TRL's rows that occur in the trainers and losses."""
    of_trl = set()
    for node in ast.walk(tree_of(GRPOTrainer)):
        match node:
            case ast.Subscript(value=ast.Name(id="inputs" | "output"), slice=ast.Constant(value=str(key))):
                of_trl.add(key)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="inputs")), args=[ast.Constant(value=str(key)), *_]):
                of_trl.add(key)
            case ast.Compare(left=ast.Constant(value=str(key)), comparators=[ast.Name(id="inputs")]):
                of_trl.add(key)
            case ast.Assign(targets=[ast.Name(id="output")], value=ast.Dict() as table):
                of_trl |= string_constants(table)
    parts = ("trl_diffusion.trainers.", "trl_diffusion.losses.")
    trainers = [tree_of(module) for module in package_modules() if module.__name__.startswith(parts)]
    return of_trl & set().union(*map(string_constants, trainers))
