"""Estimate the cost of an update: forward units, floating-point operations and memory, from shapes and settings alone.

The figures are those of a run whose texts fill their canvases. A text that ends early leaves its rollout after the
block in which it ends, so a real rollout costs less.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import Any

from datasets import IterableDataset
from torch import nn
from transformers.training_args import OptimizerNames

from trl_diffusion.credit.group_credit import Credit
from trl_diffusion.credit.per_view import ViewCredit
from trl_diffusion.family import DiffusionFamily
from trl_diffusion.likelihood import Likelihood
from trl_diffusion.losses import Loss
from trl_diffusion.models.experts import expert_parameters
from trl_diffusion.runtime.run import CompletionCost, RolloutRun, TrainingRun
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.cost import completion_units, head_positions

_PROMPTS_READ = 256  # rows of the data set whose prompts are measured


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


def updates_per_rollout(args: Any) -> float:
    """Optimizer updates between two rollouts; below 1 where an update takes several rollouts."""
    return int(args.steps_per_generation or 1) * args.num_iterations / args.gradient_accumulation_steps


def completions_per_update(args: Any) -> float:
    """Completions sampled for an optimizer update, on all processes together, on average."""
    return int(args.generation_batch_size or 0) / updates_per_rollout(args)


def rollout_units(config: SamplingConfig, family: DiffusionFamily, prompt_length: float, group: int) -> float:
    """Passes of one completion's rollout, each by the share of the columns that it computes."""
    if family.attention_block is None and not config.approximate:
        return config.denoising_steps
    return completion_units(config, prompt_length, family.attention_block, group)


def completion_cost(
    credit: Credit,
    likelihood: Likelihood,
    loss: Loss,
    args: Any,
    family: DiffusionFamily,
    prompt_length: float,
    probe: float,
) -> CompletionCost:
    """Estimate what one completion costs, from the choices of a method.

    Args:
        credit: of the method.
        likelihood: of the method.
        loss: of the method.
        args: the trainer's config.
        family: of the model.
        prompt_length: tokens that prompts are padded to.
        probe: passes of continuations (SAPO) per completion, at most.
    """
    length, updates = args.max_completion_length, args.num_iterations
    views = updates * likelihood.num_views
    old = views if loss.needs_old and not likelihood.records_old else 0
    reference = views if loss.needs_reference(args) else 0
    kept = likelihood.buffer_bytes(length, updates)
    if credit.estimates is not None:
        estimates = credit.estimates.num_views
        old += estimates * (updates_per_rollout(args) if credit.refreshes else 1)
        reference += estimates if credit.needs_reference else 0
        kept += credit.estimates.buffer_bytes(length, 1) if credit.refreshes else 0
    if isinstance(credit, ViewCredit) and credit.needs_fills:
        probe += views
    extra = likelihood.extra_columns(length)
    columns = 1 + extra / (prompt_length + length)
    return CompletionCost(
        rollout=rollout_units(args.sampling_config(), family, prompt_length, args.num_generations),
        probe=probe,
        old=old * columns,
        reference=reference * columns,
        training=views * columns,
        targets=likelihood.targets_per_view(length),
        extra_columns=extra,
        buffer_bytes=kept,
    )


def forward_units(run: RolloutRun) -> UpdateCost:
    """Forward units of an update, as `DiffusionGRPOTrainer.count_forwards` counts them: a pass with gradient is 3."""
    cost, completions = run.completion, completions_per_update(run.args)
    units = (cost.rollout, cost.probe, cost.old, cost.reference, 3 * cost.training)
    return UpdateCost(*(completions * each for each in units))


# ---------------------------------------------------------------- floating-point operations


@dataclass(frozen=True)
class NetworkShape:
    """Sizes that the floating-point operations of a pass follow from.

    Args:
        body: weights of the linear layers that see every token, adapters included; of experts as many as one token
            goes through.
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


def _used_by_a_token(name: str, model: Any) -> float:
    """Return which share of a layer's weights a token goes through: of experts, those that it is sent to."""
    if ".mlp.experts" not in name:
        return 1.0
    return model.config.num_experts_per_tok / model.config.num_local_experts


def _products(model: nn.Module) -> Iterator[tuple[str, float, bool]]:
    """Yield the matrix products of a pass: name of the weights, how many a token goes through, whether trained."""
    for name, layer in _linear_layers(model):
        weights = layer.in_features * layer.out_features * _used_by_a_token(name, model)
        yield name, weights, layer.weight.requires_grad
    for name, _, _, parameter in expert_parameters(model):
        yield name, numel(parameter) * _used_by_a_token(name, model), parameter.requires_grad


def network_shape(model: nn.Module, recomputes: bool = False, merged: bool = False) -> NetworkShape:
    """Shape of a native model, alone or inside PEFT; also where its weights are quantised or sharded.

    Args:
        model: the model.
        recomputes: whether it is trained with gradient checkpointing.
        merged: LoRA is merged into the weights of its layers, and needs no further product.
    """
    size = dict.fromkeys(("body", "last", "head", "trained_body", "trained_last", "trained_head"), 0)
    attention = {"attention": 0, "last_attention": 0}
    config: Any = model.config
    last = f".layers.{config.num_hidden_layers - 1}."
    for name, weights, trained in _products(model):
        if merged and ".lora_" in name:
            continue
        narrow = last in name and not re.search(r"\.[kv]_proj\b", name)
        part = "head" if "lm_head" in name else "last" if narrow else "body"
        size[part] += round(weights)
        size[f"trained_{part}"] += round(weights) * trained
    for name, layer in _linear_layers(model):
        if name.removesuffix(".base_layer").endswith(".o_proj"):
            attention["last_attention" if last in name else "attention"] += layer.in_features
    return NetworkShape(**size, **attention, recomputes=recomputes)


def padded_length(dataset: Any, tokenize: Callable[[list], list[list[int]]], together: int) -> float:
    """Tokens that prompts are padded to, on average; from the first rows of a data set.

    Args:
        dataset: rows with a `prompt`; may be a stream.
        tokenize: prompts to their ids.
        together: prompts of different rows that a process pads to one length.
    """
    taken = dataset.take(_PROMPTS_READ) if isinstance(dataset, IterableDataset) else islice(dataset, _PROMPTS_READ)
    lengths = [len(prompt) for prompt in tokenize([row["prompt"] for row in taken])]
    step = max(together, 1)
    return statistics.mean(max(lengths[start : start + step]) for start in range(0, len(lengths), step))


def update_flop(run: RolloutRun) -> UpdateCost:
    """Floating-point operations of an update in matrix products, on all processes together."""
    shape, cost = network_shape(run.model, run.args.gradient_checkpointing), run.completion
    drawing = network_shape(run.model, merged=run.merge_obstacle is None)
    sampling = run.args.sampling_config()
    tokens = run.prompt_length + sampling.canvas_length
    completions = completions_per_update(run.args)
    heads = head_positions(sampling)
    probed = drawing.forward_flop(tokens, heads / sampling.denoising_steps)
    scored = shape.forward_flop(tokens, cost.targets)
    learned = scored + shape.backward_flop(tokens, cost.targets)
    return UpdateCost(
        rollout=completions * cost.rollout * drawing.forward_flop(tokens, heads / cost.rollout),
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

    def parts(self) -> dict[str, float | None]:
        """Return its parts by their names in the report."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "reference": self.reference,
            "rollout batch": self.buffer,
        }


def memory(run: RolloutRun) -> Memory:
    """Memory on one process; sharded parts as DeepSpeed's stage, or FSDP2, divides them."""
    reference = 0.0 if run.reference is None else weight_bytes(run.reference.parameters())
    args, cost, canvas = run.args, run.completion, run.args.max_completion_length
    row = 16 * (run.prompt_length + canvas) + 4 * canvas * (cost.old + cost.reference) + cost.buffer_bytes
    return replace(
        policy_memory(run),
        reference=reference * run.launch.share(3),
        buffer=row * args.per_device_train_batch_size * int(args.steps_per_generation or 1),
    )


def policy_memory(run: TrainingRun) -> Memory:
    """Memory on one process for the model that is trained, and what its training keeps of it."""
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    gradients = weight_bytes(trained)
    count, optimizer = sum(map(numel, trained)), None
    # an optimizer that was handed over is none of those named in the arguments
    name = None if run.own_optimizer else OptimizerNames(run.args.optim).value
    if name in _STATE_SIZES:
        size = _STATE_SIZES[name]
        optimizer = 4.0 * count * (1 + size) if run.launch.deepspeed else float(gradients * size)
    elif name in _STATE_BYTES:
        optimizer = float(count * (_STATE_BYTES[name] + (4 if run.launch.deepspeed else 0)))
    return Memory(
        weights=weight_bytes(run.model.parameters()) * run.launch.share(3),
        gradients=gradients * run.launch.share(2),
        optimizer=None if optimizer is None else optimizer * run.launch.share(1),
        reference=0.0,
        buffer=0.0,
    )


def weight_bytes(parameters: Iterable) -> float:
    """Return the bytes of parameters; of those that ZeRO-3 has sharded, all shards."""
    return sum(numel(parameter) * parameter.element_size() for parameter in parameters)


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
