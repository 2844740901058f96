"""The config that every method's has: TRL's, how the canvas is written, and the guards' policies."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig

from trl_diffusion.runtime.checkpoints import ResumeConfig
from trl_diffusion.runtime.fusing import FusingConfig
from trl_diffusion.runtime.guards import GuardConfig
from trl_diffusion.runtime.launch import LaunchedConfig, fit_to_cpu, launched_processes
from trl_diffusion.sampling import SamplingArguments, SamplingConfig


@dataclass
class DiffusionGRPOConfig(LaunchedConfig, SamplingArguments, GuardConfig, ResumeConfig, FusingConfig, GRPOConfig):
    """Config that every method's extends: TRL's `GRPOConfig`, the sampler's options, and the guards' policies.

    TRL's `max_completion_length` is the canvas length L. How completions are drawn is said by the options of
    `trl_diffusion.sampling.SamplingArguments`, `temperature`, `top_k` and `top_p` among them. `cache="auto"` is exact;
    with `prefix` and `dual` completions come from a slightly different policy than the network's.

    Args:
        record_signals: record entropy and confidence margin of every denoising step of the training rollouts. It
            costs no forward, but with `unmasking="random"` the LM head then runs at every masked position of the
            active block.
        merge_adapter_for_rollout: add a LoRA adapter to the weights of its layers while completions are drawn, which
            takes memory for a copy of these weights. Afterwards the layers have the weights they had, bit for bit. If
            not given, wherever that changes log-probabilities by the rounding of float32 only.
        rollout_compile: compute the denoising steps of rollouts that a cache leaves by a compiled network, on a GPU as
            one graph that the host starts at once; equal to rounding. It needs `cache="dual"`, or block-causal
            attention. The first rollout takes longer, by the time that compiling takes.
        per_device_train_batch_size: completions of a micro-batch on each process. If not given, whole groups of
            `num_generations`: as many as 8 completions hold, at least one.
        per_device_eval_batch_size: the same for evaluations, with `num_generations_eval` if that is given.
        num_mc_samples: Monte-Carlo views per completion and update. Memory does not grow with it, but for methods
            that need a completion's views together (ESPO, GDPO, GDSD, coupled-GRPO, SPG, StableDRL, WDDO).

    Raises:
        ValueError: if settings do not fit together, or one cannot work with diffusion sampling.
    """

    record_signals: bool = field(
        default=False, metadata={"help": "Record entropy and confidence margin of every denoising step."}
    )
    merge_adapter_for_rollout: bool | None = field(
        default=None,
        metadata={
            "help": "Merge a LoRA adapter into the weights of its layers while completions are drawn, with a copy of "
            "these weights. If not given, where only the rounding of float32 changes; true is refused elsewhere "
            "(bfloat16, quantised, ZeRO-3)."
        },
    )
    rollout_compile: bool = field(
        default=False,
        metadata={
            "help": "Compute the denoising steps of rollouts by a compiled network; with cache=dual, or block-causal "
            "attention. It is compiled in the first rollout."
        },
    )
    num_mc_samples: int = field(
        default=8, metadata={"help": "Monte-Carlo views (noised canvases) per completion and update."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Length of the canvas in tokens."})
    per_device_train_batch_size: int = field(
        default=0,
        metadata={
            "help": "Completions of a micro-batch on each process; if not given (0), groups of num_generations up to "
            "8 completions, at least one group."
        },
    )
    per_device_eval_batch_size: int = field(
        default=0,
        metadata={
            "help": "Completions of an evaluation batch on each process; if not given (0), groups of "
            "num_generations_eval (or num_generations) up to 8 completions, at least one group."
        },
    )
    # What the likelihood needs recorded; the trainer sets it.
    shift_window: int | None = field(default=None, init=False)
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Turn dropout off, so that ratios start at 1; with dropout they measure its noise."},
    )

    def __post_init__(self):
        fit_to_cpu(self)
        group = self.num_generations or 1
        evaluated = self.num_generations_eval or group
        self.per_device_train_batch_size = self.per_device_train_batch_size or _whole_groups(group)
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or _whole_groups(evaluated)
        processes = launched_processes()
        micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
        completions = self.generation_batch_size or self.per_device_train_batch_size * micro_batches * processes
        if self.num_generations and completions % self.num_generations:
            raise ValueError(
                f"num_generations ({self.num_generations}) must divide the rollout batch of {completions} completions "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} × {micro_batches} micro-batches × "
                f"{processes} processes): change one of these."
            )
        super().__post_init__()
        self.sampling_config()
        if self.num_mc_samples < 1:
            raise ValueError(f"num_mc_samples must be at least 1, got {self.num_mc_samples}.")
        self.check_guards()
        self._refuse_what_cannot_work()

    def sampling_config(self) -> SamplingConfig:
        """Return how completions are drawn; with the fields as they are now, since they may be changed later."""
        return self.sampling_on(
            self.max_completion_length,
            record_signals=self.record_signals,
            shift_window=self.shift_window,
            rollout_compile=self.rollout_compile,
        )

    def _refuse_what_cannot_work(self) -> None:
        autoregressive = "it generates one token after the other; completions here are drawn by diffusion"
        refused = {
            "use_vllm": (self.use_vllm, autoregressive),
            "use_transformers_continuous_batching": (self.use_transformers_continuous_batching, autoregressive),
            "cache_implementation": (self.cache_implementation is not None, autoregressive),
            "generation_kwargs": (
                self.generation_kwargs is not None,
                "they configure `transformers` generation; use the fields of this config",
            ),
            "min_p": (self.min_p is not None, "the sampler has no min_p; use top_k and top_p"),
            "repetition_penalty": (
                self.repetition_penalty != 1.0,
                "the penalised distribution is not the one that is scored",
            ),
            "max_tool_calling_iterations": (
                self.max_tool_calling_iterations is not None,
                "tools need several turns; a rollout here is one canvas",
            ),
            "use_liger_kernel": (self.use_liger_kernel, "it replaces the forward pass that scores noised views"),
            "hub_token": (
                self.hub_token is not None,
                "it would be saved in training_args.bin and pushed with it; use `hf auth login` or HF_TOKEN",
            ),
            "temperature=0": (self.temperature == 0, "greedy completions of one prompt are all equal"),
        }
        for name, (is_set, reason) in refused.items():
            if is_set:
                raise ValueError(
                    f"{type(self).__name__} does not support `{name}`: {reason}. Leave it at its default."
                )


def _whole_groups(size: int) -> int:
    """Completions of a batch of whole groups of a size: as many as fit into 8, TRL's default, but at least one."""
    return size * max(8 // size, 1)
