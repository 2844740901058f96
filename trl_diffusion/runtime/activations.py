"""Estimate the memory of activations and logits: what a pass keeps for its backward pass, and what a rollout computes.

The formulas count the tensors of the stock decoder layers with PyTorch's fused attention. They leave out what kernels
and the allocator take, and were compared with PyTorch's own record of allocations on a CPU
(`tests/test_startup_report.py`), not yet on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from trl_diffusion.runtime.cost import weight_bytes
from trl_diffusion.runtime.run import RolloutRun, TrainingRun
from trl_diffusion.sampling import SamplingConfig

_CHUNK = 2**26  # logits that the scoring head computes at once on a GPU, see `trl_diffusion.models.scoring_head`
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Activations:
    """Bytes on one process, at the largest moment of each kind of pass.

    Args:
        training: of a forward and backward pass of a micro-batch.
        rollout: of a denoising step of all completions of a rollout, with the weights that ZeRO-3 gathers for it;
            0 without rollouts.
    """

    training: float
    rollout: float

    @property
    def largest(self) -> tuple[str, float]:
        """The kind that takes more, and its bytes; the two are never needed at once."""
        kinds = {"forward and backward": self.training, "rollout": self.rollout}
        kind = max(kinds, key=lambda name: kinds[name])
        return kind, kinds[kind]


@dataclass(frozen=True)
class _Layer:
    """Widths of a decoder layer in elements, and the bytes that an element takes.

    Args:
        hidden: of the hidden states.
        queries: of all query heads together.
        keys: of all key heads together.
        mlp: of the MLP.
        stored: bytes of an element of the hidden states between layers.
        computed: bytes of an element of what linear layers return.
        read: bytes of an element of the inputs that linear layers keep for their weights' gradients.
        copied: every linear layer keeps a copy of its own of its input, because it reads it in another type.
        trained: the layer's own weights are trained, the norms' too.
    """

    hidden: int
    queries: int
    keys: int
    mlp: int
    stored: int
    computed: int
    read: int
    copied: bool
    trained: bool

    @classmethod
    def of(cls, run: TrainingRun) -> _Layer:
        """Return the layers of a run's model."""
        config: Any = run.model.config
        adapted = isinstance(run.model, PeftModel)
        base: Any = run.model.get_base_model() if adapted else run.model
        stored, head = base.dtype.itemsize, base.model.layers[0].self_attn.head_dim
        autocast = run.mixed_precision in ("bf16", "fp16")
        own = next(weight.dtype.itemsize for weight in run.model.parameters() if weight.requires_grad)
        return cls(
            hidden=config.hidden_size,
            queries=config.num_attention_heads * head,
            keys=config.num_key_value_heads * head,
            mlp=_mlp_width(run.model),
            stored=stored,
            computed=2 if autocast else stored,
            read=2 if autocast else own,
            copied=own != stored or (autocast and stored != 2),
            trained=not adapted,
        )

    def kept(self) -> float:
        """Return the bytes per token that a layer keeps for its backward pass."""
        # A norm keeps its input in float32 and, for the gradient of its weight, what it has normalised.
        norms = 2 * self.hidden * (_FLOAT + (self.stored if self.trained else 0))
        attention = self.computed * (2 * self.queries + 2 * self.keys)
        mlp = self.computed * 3 * self.mlp
        # q, k and v read the same hidden states, and so do gate and up.
        inputs = (5 if self.copied else 2) * self.hidden + self.queries + self.mlp
        return norms + attention + mlp + self.read * inputs

    def passing(self) -> float:
        """Return the bytes per token that exist for a moment while the layer's backward pass runs."""
        copy = _FLOAT * self.mlp if self.copied and not self.trained else 0
        return self.computed * 2 * self.mlp + copy


def _mlp_width(model: Any) -> int:
    """Return the width of the widest MLP: of a mixture, of the experts that a token is sent to, together."""
    config = model.config
    if not config.has_experts:
        return config.intermediate_size
    # Every expert has the token's hidden state as its input and as its output, which counts like its own width.
    routed = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    return max(config.intermediate_size, routed + config.shared_width)


def training_bytes(run: TrainingRun, rows: float, tokens: float, targets: float) -> float:
    """Return the memory of a forward and backward pass.

    Args:
        run: the run.
        rows: rows that go through the network together.
        tokens: prompt and canvas of a row.
        targets: positions that are scored in a row.
    """
    layer, config = _Layer.of(run), run.model.config
    layers, kept = config.num_hidden_layers, layer.kept()
    if config._attn_implementation == "eager":  # the weights [heads, tokens, tokens], and their softmax in float32
        kept += config.num_attention_heads * tokens * (_FLOAT + layer.computed)
    if run.args.gradient_checkpointing:  # the inputs of all layers, and what one layer keeps
        kept += layer.stored * layer.hidden * layers
    else:
        kept *= layers
    head = 3 * _FLOAT * min(rows * targets * config.vocab_size, _CHUNK)
    return rows * tokens * (kept + layer.passing()) + head


def rollout_bytes(run: RolloutRun, rows: float) -> float:
    """Return the memory of a denoising step of the completions that a process draws together.

    Args:
        run: the run.
        rows: the completions.
    """
    sampling: SamplingConfig = run.args.sampling_config()
    layer, vocabulary = _Layer.of(run), run.model.config.vocab_size
    read = sampling.block_length if sampling.reads_every_mask else max(sampling.commits())
    # the head's logits, in float32, and three tensors of their size to choose, draw and score tokens with
    logits = rows * read * vocabulary * (4 * _FLOAT + layer.computed)
    states = layer.computed * (3 * layer.mlp + 4 * layer.hidden + layer.queries)
    return rows * (run.prompt_length + sampling.canvas_length) * states + logits


def rollout_activations(run: RolloutRun) -> Activations:
    """Return the estimate for a run that learns from rollouts."""
    args, together = run.args, run.views // run.backwards
    tokens = run.prompt_length + args.max_completion_length + run.completion.extra_columns
    rows = args.per_device_train_batch_size
    drawn = rows * int(args.steps_per_generation or 1)
    gathers = run.launch.deepspeed and run.launch.zero_stage == 3 and args.ds3_gather_for_generation
    return Activations(
        training=training_bytes(run, rows * together, tokens, run.completion.targets),
        rollout=rollout_bytes(run, drawn) + (weight_bytes(run.model.parameters()) if gathers else 0.0),
    )
