"""The behaviour that all native diffusion language models share, on top of a stock transformers class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput
from transformers.utils.quantization_config import QuantizationMethod

from trl_diffusion.models.family import DiffusionFamily

if TYPE_CHECKING:
    from trl_diffusion.sampling import Trajectory


@dataclass
class DiffusionLMOutput(ModelOutput):
    """Result of a forward pass with `positions`.

    Args:
        logits: float32 [R, K, V] at the positions, never-sampled ids at -inf; only without `targets`.
        log_probs: float32 [R, K] of the targets, 0 where there is no target; only with `targets`.
        entropy: float32 [R, K] in nats, 0 where there is no target; only with `targets`.
    """

    logits: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class Float32InvFreq:
    """Rotary embedding whose inverse frequencies stay in float32 when the model is cast.

    `model.bfloat16()` casts buffers too, and bfloat16 frequencies make log-probabilities 3 to 10 times less exact.
    """

    inv_freq: Any  # tensor [head size / 2]

    def _apply(self, fn, recurse: bool = True):
        exact = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = exact.to(device=self.inv_freq.device, dtype=torch.float32)
        return self


def require_plain_rope(config: Any) -> None:
    """Check that a config has unscaled rotary embeddings, the only kind written back under the hub's keys.

    Args:
        config: a transformers config, after its `__post_init__`.

    Raises:
        ValueError: if its rotary embeddings are scaled (linear, yarn …).
    """
    if (rope_type := config.rope_parameters["rope_type"]) != "default":
        raise ValueError(
            f"This {config.model_type} variant has rope_scaling of type {rope_type!r}; trl_diffusion computes "
            "unscaled rotary embeddings only. Remove `rope_scaling` (or `rope_parameters`) from its config."
        )


class DiffusionLM:
    """Mixin that turns a stock `…ForCausalLM` with `config.is_causal = False` into a diffusion language model.

    It adds scoring to `forward` (so that every wrapper — DDP, PEFT, ZeRO-3, FSDP2 — passes it through), samples by
    diffusion in `generate`, and refuses the autoregressive `labels=`.
    """

    config: Any
    hf_quantizer: Any = None  # set by transformers on a quantised model
    logit_shift: int = 0

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """transformers' `from_pretrained`; 4-bit layers compute exactly on a CPU too, see `ExactLinear4bit`."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        if model.uses_bitsandbytes:
            from trl_diffusion.models.quantised_linear import make_exact  # bitsandbytes is optional

            make_exact(model)
        return loaded

    @property
    def uses_bitsandbytes(self) -> bool:
        """Whether linear layers were quantised by bitsandbytes."""
        quantizer = self.hf_quantizer
        return quantizer is not None and (
            quantizer.quantization_config.quant_method == QuantizationMethod.BITS_AND_BYTES
        )

    @staticmethod
    def native_name(name: str) -> str:
        """This class's name of a module or weight of the hub's checkpoint; its own names are returned as they are."""
        return name

    @staticmethod
    def hub_name(name: str) -> str:
        """The hub checkpoint's name of a module or weight of this class."""
        return name

    @property
    def family(self) -> DiffusionFamily:
        """The facts that sampling and scoring need, read from the config.

        Raises:
            ValueError: if the config names no mask token or no end token.
        """
        config = self.config
        for key in ("mask_token_id", "eos_token_id"):
            if getattr(config, key) is None:
                raise ValueError(
                    f"The {type(config).__name__} of this model has no `{key}`; a diffusion language model needs it. "
                    f"Set it in config.json or with `model.config.{key} = …`."
                )
        eos = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
        return DiffusionFamily(
            name=config.model_type,
            mask_token_id=config.mask_token_id,
            num_tokens=config.num_tokens,
            end_token_ids=tuple(config.end_token_ids or eos),
            tail_token_id=eos[0],
            logit_shift=self.logit_shift,
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ):
        """Logits everywhere or, with `positions`, only there; with `targets` too, their log-probabilities.

        Hidden states are gathered before the LM head, so the cost of the head is that of the positions asked for.

        Args:
            input_ids: long [R, T], noised tokens (prompt and canvas).
            attention_mask: [R, T], 0 on padding.
            labels: refused; see Raises.
            positions: long [R, K], the indices in 0..T-1 of the tokens to predict, -1 for none.
            targets: long [R, K], the tokens to score at `positions`.
            support: int [R, K, C], ids each target was drawn from (top-k, top-p), -1 for none; full vocabulary if
                not given.
            temperature: divides the logits before the softmax; > 0.

        Returns:
            The stock class's output without `positions`, else a `DiffusionLMOutput`.

        Raises:
            ValueError: if `labels` is given: the stock loss is the autoregressive one.
        """
        if labels is not None:
            raise ValueError(
                "A diffusion language model has no next-token loss, so `labels=` is refused. For supervised "
                "training use trl_diffusion.trainers.SFTTrainer; to score tokens pass `positions=` and `targets=`."
            )
        if positions is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]

        kwargs["use_cache"] = False
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state  # type: ignore[attr-defined]
        # the first token has no logits before it and, as in Dream's own code, takes those at its own position
        index = (positions - self.family.logit_shift).clamp(min=0)
        if targets is None:
            gathered = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
            return DiffusionLMOutput(logits=self._diffusion_logits(gathered))

        rows, slots = (positions >= 0).nonzero(as_tuple=True)
        logits = self._diffusion_logits(hidden[rows, index[rows, slots]])
        log_probs, entropy = score_targets(
            logits, targets[rows, slots], temperature, None if support is None else support[rows, slots]
        )

        def scatter(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(positions.shape).index_put((rows, slots), values)

        return DiffusionLMOutput(log_probs=scatter(log_probs), entropy=scatter(entropy))

    def _diffusion_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # The head is called as a module: ZeRO-3, FSDP2 and quantised heads gather their weights in its hooks. A hook
        # on its backward pass forbids changing its output in place, hence the copy (which bfloat16 needs anyway).
        logits = self.lm_head(hidden).to(torch.float32, copy=True)  # type: ignore[attr-defined]
        return self.family.exclude_never_sampled(logits)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        denoising_steps: int | None = None,
        block_length: int = 32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        unmasking: str = "max_prob",
        generator: torch.Generator | None = None,
        return_trajectory: bool = False,
    ) -> torch.Tensor | Trajectory:
        """Sample completions by diffusion on a canvas of `max_new_tokens` positions.

        Args:
            input_ids: long [B, P], left-padded prompts.
            attention_mask: [B, P], 0 on padding; all ones if not given.
            max_new_tokens: canvas length L.
            denoising_steps: S, half the canvas length if not given.
            block_length: positions per block; divides the canvas length.
            temperature: 0 is greedy.
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: keep the smallest set of tokens with this much probability; needs `top_k`.
            unmasking: how positions are chosen, see `trl_diffusion.sampling.SamplingConfig`.
            generator: source of all randomness; PyTorch's global generator if not given.
            return_trajectory: return the `Trajectory` instead of token ids.

        Returns:
            Long [B, P + L], prompts followed by their canvas (filled with the tail id behind a finished text), or
            the `Trajectory`.
        """
        from trl_diffusion.sampling import SamplingConfig, row_generators, sample  # sampling imports models

        config = SamplingConfig(
            canvas_length=max_new_tokens,
            denoising_steps=max_new_tokens // 2 if denoising_steps is None else denoising_steps,
            block_length=block_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            unmasking=unmasking,
        )
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu"))
        trajectory = sample(
            self,  # type: ignore[arg-type]
            input_ids,
            attention_mask,
            config,
            row_generators(seed, rows=range(input_ids.size(0))),
        )
        return trajectory if return_trajectory else torch.cat([input_ids, trajectory.completion_ids], dim=1)


def score_targets(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, support: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of its distribution, at a temperature, on a support.

    Args:
        logits: float32 [..., V]; -inf for ids that are never sampled.
        targets: long [...].
        temperature: divides the logits; > 0.
        support: int [..., C], the ids that could be drawn, -1 for none; every id if not given.

    Returns:
        (log-probabilities [...], entropies [...] in nats), float32. The log-probability of a target outside of its
        support is -inf.
    """
    if support is not None:
        logits = logits.gather(-1, support.clamp(min=0).long()).masked_fill(support < 0, -torch.inf)
        hit = support == targets.unsqueeze(-1)
        targets = hit.int().argmax(-1)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    chosen = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if support is not None:
        chosen = chosen.masked_fill(~hit.any(-1), -torch.inf)
    # 0 · log 0 counts as 0
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)
    return chosen, entropy
