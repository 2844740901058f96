"""What an update will cost: forward units, floating-point operations and memory, from shapes and settings alone.

The figures are those of a run whose texts fill their canvases. A text that ends early leaves its rollout after the
block in which it ends, so a real rollout costs less.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import IterableDataset
from torch import nn
from transformers.training_args import OptimizerNames

if TYPE_CHECKING:
    from trl_diffusion.trainers.diffusion_grpo import DiffusionGRPOTrainer
    from trl_diffusion.trainers.sft import SFTTrainer

_PROMPTS_READ = 256  # rows of the data set whose prompts are measured


@dataclass(frozen=True)
class CompletionCost:
    """Forward passes of prompt and whole canvas that one completion of a rollout costs, at most.

    Args:
        rollout: passes of the rollout.
        probe: passes of continuations (SAPO), if every completion is continued.
        old: passes without gradient before the first update, for the old log-probabilities.
        reference: passes of the reference model.
        training: passes with gradient, in all inner updates together.
        targets: tokens scored in a pass of the last three kinds.
        buffer_bytes: what is kept of it until the last inner update, beside tokens and the log-probabilities that the
            passes above compute.
    """

    rollout: float
    probe: float
    old: float
    reference: float
    training: float
    targets: float
    buffer_bytes: float = 0.0


@dataclass(frozen=True)
class UpdateCost:
    """A quantity of one optimizer update on all processes together, by what it is spent on."""

    rollout: float
    probe: float
    old: float
    reference: float
    training: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def updates_per_rollout(trainer: DiffusionGRPOTrainer) -> float:
    """Optimizer updates between two rollouts; below 1 where an update takes several rollouts."""
    args = trainer.args
    return int(args.steps_per_generation or 1) * trainer.num_iterations / args.gradient_accumulation_steps


def rollout_units(trainer: DiffusionGRPOTrainer) -> float:
    """Passes of one completion's rollout, each by the share of the columns that it computes."""
    config, block = trainer.args.sampling_config(), trainer.family.attention_block
    if block is None and not config.approximate:
        return config.denoising_steps
    return config.forward_units(prompt_length(trainer), block, trainer.group_size("train"))


def forward_units(trainer: DiffusionGRPOTrainer) -> UpdateCost:
    """Forward units of an update, as `DiffusionGRPOTrainer.count_forwards` counts them: a pass with gradient is 3."""
    cost = trainer.completion_cost()
    completions = int(trainer.args.generation_batch_size or 0) / updates_per_rollout(trainer)
    units = (cost.rollout, cost.probe, cost.old, cost.reference, 3 * cost.training)
    return UpdateCost(*(completions * each for each in units))


# ---------------------------------------------------------------- floating-point operations


@dataclass(frozen=True)
class NetworkShape:
    """Sizes that the floating-point operations of a pass follow from.

    Args:
        body: weights of the linear layers that see every token, adapters included.
        trained_body: those of them that are trained.
        last: the same of the layers that see only what is read: in the last layer, all but its keys and values.
        trained_last: those of them that are trained.
        head: weights of the LM head.
        trained_head: the same if it is trained, else 0.
        attention: query heads × head size, summed over the layers but the last.
        last_attention: the same of the last layer.
        recomputes: whether gradient checkpointing repeats the forward pass.
    """

    body: int
    trained_body: int
    last: int
    trained_last: int
    head: int
    trained_head: int
    attention: int
    last_attention: int
    recomputes: bool

    def forward_flop(self, tokens: float, read: float) -> float:
        """FLOP of a forward pass over `tokens`, with logits at `read` positions; 2 per multiplication."""
        return self._layers_flop(tokens, read) + 2 * self.head * read

    def backward_flop(self, tokens: float, read: float) -> float:
        """FLOP of the backward pass: every layer's input gradient, and the weight gradients of what is trained.

        The first layer's input gradient, which a frozen embedding does not ask for, is counted too.
        """
        weights = 2 * self.trained_body * tokens + 2 * (self.trained_last + self.trained_head) * read
        repeated = self._layers_flop(tokens, read) if self.recomputes else 0.0
        return self.forward_flop(tokens, read) + self._attention_flop(tokens, read) + weights + repeated

    def _layers_flop(self, tokens: float, read: float) -> float:
        return 2 * self.body * tokens + 2 * self.last * read + self._attention_flop(tokens, read)

    def _attention_flop(self, tokens: float, read: float) -> float:
        return 4 * tokens * (self.attention * tokens + self.last_attention * read)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        # PEFT keeps the layer that `modules_to_save` replaces
        if isinstance(module, nn.Linear) and "original_module" not in name:
            yield name, module


def network_shape(model: nn.Module, recomputes: bool = False) -> NetworkShape:
    """Shape of a native model, alone or inside PEFT; also where its weights are quantised or sharded.

    Args:
        model: the model.
        recomputes: whether it is trained with gradient checkpointing.
    """
    size = dict.fromkeys(("body", "last", "head", "trained_body", "trained_last", "trained_head"), 0)
    attention = {"attention": 0, "last_attention": 0}
    config: Any = model.config
    last = f".layers.{config.num_hidden_layers - 1}."
    for name, layer in _linear_layers(model):
        narrow = last in name and not re.search(r"\.[kv]_proj\b", name)
        part = "head" if "lm_head" in name else "last" if narrow else "body"
        weights = layer.in_features * layer.out_features
        size[part] += weights
        size[f"trained_{part}"] += weights * layer.weight.requires_grad
        if name.removesuffix(".base_layer").endswith(".o_proj"):
            attention["last_attention" if last in name else "attention"] += layer.in_features
    return NetworkShape(**size, **attention, recomputes=recomputes)


def prompt_length(trainer: DiffusionGRPOTrainer) -> float:
    """Tokens that a process's prompts are padded to, on average over rollouts; from the data set's first rows."""
    dataset: Any = trainer.train_dataset
    args = trainer.args
    taken = dataset.take(_PROMPTS_READ) if isinstance(dataset, IterableDataset) else islice(dataset, _PROMPTS_READ)
    ids = trainer._tokenize_prompts([row["prompt"] for row in taken])[0]
    together = args.per_device_train_batch_size * int(args.steps_per_generation or 1) // trainer.group_size("train")
    lengths = [len(prompt) for prompt in ids]
    step = max(together, 1)
    return statistics.mean(max(lengths[start : start + step]) for start in range(0, len(lengths), step))


def update_flop(trainer: DiffusionGRPOTrainer) -> UpdateCost:
    """Floating-point operations of an update in matrix products, on all processes together."""
    shape, cost = network_shape(trainer.model, trainer.args.gradient_checkpointing), trainer.completion_cost()
    sampling = trainer.args.sampling_config()
    tokens = prompt_length(trainer) + sampling.canvas_length
    completions = int(trainer.args.generation_batch_size or 0) / updates_per_rollout(trainer)
    heads = sampling.head_positions()
    probed = shape.forward_flop(tokens, heads / sampling.denoising_steps)
    scored = shape.forward_flop(tokens, cost.targets)
    learned = scored + shape.backward_flop(tokens, cost.targets)
    return UpdateCost(
        rollout=completions * cost.rollout * shape.forward_flop(tokens, heads / cost.rollout),
        probe=completions * cost.probe * probed,
        old=completions * cost.old * scored,
        reference=completions * cost.reference * scored,
        training=completions * cost.training * learned,
    )


# ---------------------------------------------------------------- memory

# Optimizer state of a trained parameter: in units of the parameter's own size, or in bytes.
_STATE_SIZES = {"adamw_torch": 2, "adamw_torch_fused": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0}
_STATE_BYTES = {
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one process, without activations, logits and what libraries allocate.

    Args:
        weights: of the policy.
        gradients: of what is trained.
        optimizer: its state, with the float32 copies that DeepSpeed keeps; `None` for an optimizer not known here.
        reference: a separate reference model.
        buffer: the rollout batch.
    """

    weights: float
    gradients: float
    optimizer: float | None
    reference: float
    buffer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + (self.optimizer or 0.0) + self.reference + self.buffer


def memory(trainer: DiffusionGRPOTrainer) -> Memory:
    """Memory on one process; sharded parts as DeepSpeed's stage, or FSDP2, divides them."""
    of_policy, reference = policy_memory(trainer), 0.0
    if trainer.ref_model is not None:
        reference = sum(numel(parameter) * parameter.element_size() for parameter in trainer.ref_model.parameters())
    args, cost, canvas = trainer.args, trainer.completion_cost(), trainer.args.max_completion_length
    row = 16 * (prompt_length(trainer) + canvas) + 4 * canvas * (cost.old + cost.reference) + cost.buffer_bytes
    return replace(
        of_policy,
        reference=reference * _shares(trainer)[3],
        buffer=row * args.per_device_train_batch_size * int(args.steps_per_generation or 1),
    )


def policy_memory(trainer: DiffusionGRPOTrainer | SFTTrainer) -> Memory:
    """Memory on one process for the model that is trained, and what its training keeps of it."""
    args, share = trainer.args, _shares(trainer)
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    weights = sum(numel(parameter) * parameter.element_size() for parameter in trainer.model.parameters())
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    gradients = sum(numel(parameter) * parameter.element_size() for parameter in trained)
    count, optimizer = sum(map(numel, trained)), None
    # an optimizer that was passed in is none of those named in the arguments
    name = None if trainer.optimizer is not None else OptimizerNames(args.optim).value
    if name in _STATE_SIZES:
        size = _STATE_SIZES[name]
        optimizer = 4.0 * count * (1 + size) if plugin is not None else float(gradients * size)
    elif name in _STATE_BYTES:
        optimizer = float(count * (_STATE_BYTES[name] + (4 if plugin is not None else 0)))
    return Memory(
        weights=weights * share[3],
        gradients=gradients * share[2],
        optimizer=None if optimizer is None else optimizer * share[1],
        reference=0.0,
        buffer=0.0,
    )


def _shares(trainer: DiffusionGRPOTrainer | SFTTrainer) -> dict[int, float]:
    """Share that a process holds of what DeepSpeed's stage 1 (optimizer), 2 (gradients) and 3 (weights) divide."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    stage = 3 if trainer.is_fsdp_enabled else 0 if plugin is None else plugin.zero_stage
    return {part: 1 / trainer.accelerator.num_processes if stage >= part else 1.0 for part in (1, 2, 3)}


def numel(parameter) -> int:
    """Stored elements of a parameter; of one that ZeRO-3 has sharded, those of all shards."""
    # Weights of an adapter are made outside of ZeRO's init and stay whole until DeepSpeed starts.
    return vars(parameter).get("ds_numel", parameter.numel())


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, counting those of quantised layers that are packed."""
    packed = {
        id(layer.weight): layer.in_features * layer.out_features
        for _, layer in _linear_layers(model)
        if not layer.weight.is_floating_point()
    }
    return sum(packed.get(id(parameter), numel(parameter)) for parameter in model.parameters())
