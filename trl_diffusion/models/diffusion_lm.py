"""Turn a stock transformers class into a diffusion language model: attention, scoring, sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import GenerationConfig
from transformers.utils import ModelOutput
from transformers.utils.quantization_config import QuantizationMethod

from trl_diffusion.distribution import score_targets
from trl_diffusion.family import DiffusionFamily, HasFamily
from trl_diffusion.models.block_attention import block_causal_bias, copied_tail, position_ids, sees_all
from trl_diffusion.models.compiled_windows import compiled_window_states
from trl_diffusion.models.layers import CACHE_KEYWORD, take
from trl_diffusion.models.scoring_head import ScoringHead
from trl_diffusion.models.whole_weights import WholeWeights
from trl_diffusion.sampling import DiffusionGenerateOutput, Trajectory, generation
from trl_diffusion.sampling.prompts import checked_prompts
from trl_diffusion.sampling.static_windows import StaticWindowCache
from trl_diffusion.sampling.window_cache import WindowCache


@dataclass
class DiffusionLMOutput(ModelOutput):
    """Result of a forward pass with `positions`.

    Args:
        logits: float32 [R, K, V] at the positions, never-sampled ids at -inf; only without `targets`.
        log_probs: float32 [R, K] of the targets, 0 where there is no target; only with `targets`.
        entropy: float32 [R, K] in nats, 0 where there is no target; only with `targets`.
        largest: float32 [R, K], log of the largest probability at each position, at temperature 1 on the full
            vocabulary, 0 where there is no position; only with `largest`.
    """

    logits: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    largest: torch.Tensor | None = None


class DiffusionLM(HasFamily, WholeWeights):
    """Mixin that turns a stock `…ForCausalLM` with `config.is_causal = False` into a diffusion language model.

    Attention is full unless a class sets `attention_block`, the block size of block-causal attention, and
    `block_origin`, where blocks are counted from. The mixin adds scoring to `forward`, samples by diffusion in
    `generate`, and refuses the autoregressive `labels=`. Scoring is part of `forward` because wrappers (DDP, PEFT,
    ZeRO-3, FSDP2) synchronise and gather weights there alone: calling submodules past the wrapper gives wrong
    gradients without an error.
    """

    config: Any
    config_class: Any  # the family's own
    model: Any  # the stock class's network
    lm_head: Any
    # the family's overrides of layers, see `trl_diffusion.models.layers`
    rotary_class: type
    attention_class: type
    last_layer_class: type
    hf_quantizer: Any = None  # set by transformers on a quantised model
    training: bool
    logit_shift: int = 0
    attention_block: int | None = None
    block_origin: str = "completion"

    def __init__(self, config: Any):
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got a {type(config).__name__}: the "
                "checkpoint is of another family. Load it with AutoModelForCausalLM."
            )
        super().__init__(config)  # type: ignore[call-arg]  # the stock class comes next
        # Layers keep their weights and names and only change their class, so that whatever transformers sets up by
        # name or type (initialisation, FSDP wrapping, device maps) still holds.
        self.lm_head.__class__ = ScoringHead
        self.model.embed_tokens.padding_idx = None  # pad and end of text share an id, and the latter must learn
        self.model.rotary_emb = self.rotary_class(config)
        for layer in self.model.layers:
            layer.self_attn.__class__ = self.attention_class
            layer.self_attn.is_causal = False
        self.model.layers[-1].__class__ = self.last_layer_class

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """Load a model as transformers does; 4-bit layers compute exactly on a CPU too, see `ExactLinear4bit`."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        if model.uses_bitsandbytes:
            from trl_diffusion.models.quantised_linear import make_exact  # bitsandbytes is optional

            make_exact(model)
        return loaded

    @property
    def uses_bitsandbytes(self) -> bool:
        """True if linear layers were quantised by bitsandbytes."""
        quantizer = self.hf_quantizer
        return quantizer is not None and (
            quantizer.quantization_config.quant_method == QuantizationMethod.BITS_AND_BYTES
        )

    @staticmethod
    def native_name(name: str) -> str:
        """Return this class's name of a module or weight of the hub's checkpoint; its own names stay as they are."""
        return name

    @staticmethod
    def hub_name(name: str) -> str:
        """Return the hub checkpoint's name of a module or weight of this class."""
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
                    f"Set it in config.json, as an argument of from_pretrained, or with `model.config.{key} = …`."
                )
        eos = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
        ends = tuple(config.end_token_ids or eos)
        return DiffusionFamily(
            name=config.model_type,
            mask_token_id=config.mask_token_id,
            num_tokens=config.num_tokens,
            end_token_ids=ends,
            tail_token_id=ends[0],
            logit_shift=self.logit_shift,
            attention_block=self.attention_block,
            block_origin=self.block_origin,
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
        canvas_start: int = 0,
        noisy_copy: int = 0,
        cache: WindowCache | None = None,
        largest: bool = False,
        padded: bool | None = None,
        **kwargs: Any,
    ):
        """Compute logits everywhere or, with `positions`, only there; with `targets` too, their log-probabilities.

        With `positions` the last layer and the LM head compute these positions alone.

        Args:
            input_ids: long [R, T], noised tokens (prompt and canvas).
            attention_mask: [R, T], 0 on padding.
            labels: refused; see Raises.
            positions: long [R, K], the indices in 0..T-1 of the tokens to predict, -1 for none.
            targets: long [R, K], the tokens to score at `positions`, -1 for none.
            support: int [R, K, C], ids each target was drawn from (top-k, top-p), -1 for none; full vocabulary if
                not given.
            temperature: divides the logits before the softmax; > 0.
            canvas_start: the first column of the completion, where an attention block begins. Full attention does not
                depend on it, nor do blocks that are counted from the start of the sequence, the first column that
                `attention_mask` shows.
            noisy_copy: number of tokens at the end that are a noised copy of those before them, see
                `block_causal_bias`; with block-causal attention only.
            cache: keys and values of other columns. `input_ids` and `positions` are then those of its window, and
                `attention_mask` [R, visible] covers all visible columns. For forward passes without gradient.
            largest: with `targets`, also compute the largest probability at every position.
            padded: whether `attention_mask` hides anything, where the caller knows. The host then need not wait for
                the mask to be read.

        Returns:
            The stock class's output without `positions`, else a `DiffusionLMOutput`.

        Raises:
            ValueError: if `labels` is given: the stock loss is the autoregressive one; a noised copy with full
                attention, which would see the clean tokens; or a cache in training mode.
            TypeError: for transformers' growing caches (`use_cache=True`, `past_key_values`).
        """
        self._check_call(labels, noisy_copy, cache)
        assert input_ids is not None
        if noisy_copy and self.block_origin == "sequence":
            assert self.attention_block is not None  # a noised copy was refused else
            input_ids, attention_mask, tail = copied_tail(input_ids, attention_mask, noisy_copy, self.attention_block)
            noisy_copy += tail
            positions = None if positions is None else positions + tail * (positions >= 0)
        kwargs.setdefault("use_cache", False)  # the hub's configs ask for the growing cache of autoregressive models
        if cache is not None or noisy_copy:
            first_column = 0 if cache is None else cache.start
            kwargs["position_ids"] = position_ids(input_ids, first_column, noisy_copy)
            kwargs[CACHE_KEYWORD] = cache
        if padded is False:
            attention_mask = None
        start = self._block_start(attention_mask, canvas_start)
        attention = self._attention(input_ids, attention_mask, start, noisy_copy, cache, padded)
        if positions is None:
            return super().forward(input_ids=input_ids, attention_mask=attention, **kwargs)  # type: ignore[misc]

        read = self._columns_before(positions, start, noisy_copy)
        if isinstance(cache, StaticWindowCache) and cache.columns is not None:
            hidden = take(compiled_window_states(self, input_ids, attention, cache), read)
            return DiffusionLMOutput(logits=self._diffusion_logits(hidden))
        hidden = self._hidden_at(read, input_ids=input_ids, attention_mask=attention, **kwargs)
        if targets is None:
            return DiffusionLMOutput(logits=self._diffusion_logits(hidden))
        scores = self._score_at(positions, hidden, targets, support, temperature)
        if largest:
            scores.largest = self._largest_at(positions, hidden)
        return scores

    def _check_call(self, labels: torch.Tensor | None, noisy_copy: int, cache: WindowCache | None) -> None:
        """Refuse calls of `forward` whose result would be wrong, see its Raises."""
        if labels is not None:
            raise ValueError(
                "A diffusion language model has no next-token loss, so `labels=` is refused. For supervised "
                "training use trl_diffusion.trainers.SFTTrainer; to score tokens pass `positions=` and `targets=`."
            )
        if cache is not None and self.training:
            raise ValueError(
                "A forward pass with a cache is for sampling, but this model is in training mode, in which gradient "
                "checkpointing drops caches. Call `model.eval()` before it."
            )
        if noisy_copy and self.attention_block is None:
            raise ValueError(
                "A noised copy next to the clean tokens needs block-causal attention: with full attention the copy "
                f"would see the tokens to predict. {type(self).__name__} has full attention; score one noised view "
                "per forward pass."
            )

    def _block_start(self, attention_mask: torch.Tensor | None, canvas_start: int) -> int | torch.Tensor:
        """Return a column at which an attention block begins: one for all rows, or long [R]."""
        if self.block_origin == "completion":
            return canvas_start
        return 0 if attention_mask is None else attention_mask.long().argmax(1)  # the first column that is shown

    def _attention(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        start: int | torch.Tensor,
        noisy_copy: int,
        cache: WindowCache | None,
        padded: bool | None,
    ) -> torch.Tensor | None:
        """Return the mask for the stock network: as given with full attention, else a bias for every query and key."""
        if self.attention_block is None:
            if attention_mask is None or not padded or self.config._attn_implementation != "sdpa":
                return attention_mask
            # transformers would make the same, after reading whether anything is hidden at all.
            return attention_mask.bool()[:, None, None, :].expand(-1, -1, input_ids.size(1), -1)
        if attention_mask is None:
            first, visible = (0, input_ids.size(1)) if cache is None else (cache.start, cache.visible)
            # Without padding a window inside the last visible block sees everything. No mask is cheaper than an empty
            # one: sdpa then takes a kernel that reads neither a mask nor repeated keys.
            if isinstance(start, int) and not noisy_copy and sees_all(self.attention_block, start, first, visible):
                return None
            attention_mask = input_ids.new_ones(len(input_ids), visible)
        return block_causal_bias(
            attention_mask,
            self.attention_block,
            self.get_input_embeddings().weight.dtype,  # type: ignore[attr-defined]
            start,
            0 if cache is None else cache.start,
            noisy_copy,
        )

    def _columns_before(self, positions: torch.Tensor, start: int | torch.Tensor, noisy_copy: int) -> torch.Tensor:
        """Return the columns whose hidden states predict the tokens at `positions` (long [R, K], -1 for none)."""
        # Under a shift of 1 the first token has no logits before it; as in Dream's own code, it takes those at its
        # own position.
        read = (positions - self.logit_shift).clamp(min=0)
        if not (noisy_copy and self.logit_shift):
            return read
        # The first token of a noised block is predicted from the block before it, which is finished: its last column
        # is read in the clean stream.
        assert self.attention_block is not None
        begin = start.unsqueeze(1) if isinstance(start, torch.Tensor) else start
        clean = positions - noisy_copy
        return torch.where((clean - begin) % self.attention_block == 0, (clean - 1).clamp(min=0), read)

    def _hidden_at(self, read: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run the network and return the last hidden states [R, K, H] of columns.

        Args:
            read: long [R, K].
            **kwargs: for the stock network.
        """
        # Nothing to predict: a forward pass for its keys and values alone. Attention needs at least one query.
        count = read.size(1)
        if count == 0:
            read = read.new_zeros(len(read), 1)
        return self.model(read=read, **kwargs).last_hidden_state[:, :count]

    def _score_at(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        support: torch.Tensor | None,
        temperature: float,
    ) -> DiffusionLMOutput:
        """Score targets [R, K] from hidden states [R, K, H]; the LM head computes only those other than -1."""
        rows, slots = ((positions >= 0) & (targets >= 0)).nonzero(as_tuple=True)
        log_probs, entropy = self._score(
            hidden[rows, slots],
            targets[rows, slots],
            None if support is None else support[rows, slots],
            temperature,
        )

        def scatter(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(positions.shape).index_put((rows, slots), values)

        return DiffusionLMOutput(log_probs=scatter(log_probs), entropy=scatter(entropy))

    def _largest_at(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Log of the largest probability [R, K] from hidden states [R, K, H], with gradient; 0 at positions of -1."""
        rows, slots = (positions >= 0).nonzero(as_tuple=True)
        log_probs, _ = self._score(hidden[rows, slots], None, None, 1.0)
        return log_probs.new_zeros(positions.shape).index_put((rows, slots), log_probs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any):
        """Resize as transformers does; the new LM head scores too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        if type(self.lm_head) is nn.Linear:
            self.lm_head.__class__ = ScoringHead
        return embeddings

    def _score(self, hidden, targets, support, temperature) -> tuple[torch.Tensor, torch.Tensor]:
        """Score targets [N], `None` for the most likely ids, from hidden states [N, H].

        Returns:
            Log-probabilities and entropies, [N] each.
        """
        head = inner = self.lm_head
        if isinstance(head, ModulesToSaveWrapper):
            inner = head.original_module
        if isinstance(inner, ScoringHead) and not any("forward" in vars(module) for module in (head, inner)):
            return head(hidden, targets, support, temperature, self.family)
        # Anything else computes the logits its own way, so they are computed in full: LoRA on the head adds to them, a
        # quantised head dequantises, and TRL's `cast_lm_head_to_fp32` replaces the head's `forward`.
        return score_targets(self._diffusion_logits(hidden), targets, temperature, support)

    def _diffusion_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # Called as a module, because ZeRO-3, FSDP2 and quantised heads gather the weights in its hooks. A hook on its
        # backward pass forbids changing its output in place, hence the copy (which bfloat16 needs anyway).
        logits = self.lm_head(hidden).to(torch.float32, copy=torch.is_grad_enabled())
        return self.family.exclude_never_sampled(logits)

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        generation_config: GenerationConfig | None = None,
        return_trajectory: bool = False,
        **settings: Any,
    ) -> torch.Tensor | Trajectory | DiffusionGenerateOutput:
        """Sample completions by diffusion on a canvas of `max_new_tokens` positions.

        A setting that transformers' `generate` has under the same name means the same here. If it is not given, it is
        read from `generation_config`, then from the model's own, which comes from the checkpoint. The last resort is
        greedy decoding on a canvas of 256 positions. The other settings are the options of
        `trl_diffusion.sampling.SamplingArguments`.

        Args:
            input_ids: integers [B, P], left-padded prompts.
            attention_mask: [B, P], 0 on padding; all ones if not given.
            generator: source of all randomness; PyTorch's global generator if not given.
            generation_config: defaults for the settings that it has fields for.
            return_trajectory: return the `Trajectory` instead of token ids.
            max_new_tokens: canvas length L, any number from 1.
            max_length: P + L, in place of it.
            do_sample: `False` is greedy, `True` without a temperature means temperature 1.
            temperature: 0 is greedy, any other samples.
            top_k: keep the k most likely tokens; 0 keeps all, and is the default also when sampling.
            top_p: keep the smallest set of tokens with this much probability. Where a trajectory is returned, it
                needs `top_k`.
            num_return_sequences: completions per prompt n; those of a prompt follow each other.
            pad_token_id: fills the canvas after a finished text; the family's tail id if not given.
            eos_token_id: further ids that end a text. The family's own always do, because the network writes only
                padding after them.
            return_dict_in_generate: return a `DiffusionGenerateOutput` with ids and trajectory.
            denoising_steps: S. If not given, every step commits two tokens.
            block_length: positions per block; the last block is shorter if L is no multiple of it. If not given, 32,
                or with block-causal attention the block size of that; with `denoising_steps`, the largest up to 32
                for which L and S are multiples of blocks.
            unmasking: how positions are chosen, `max_prob` if not given.
            confidence_threshold: commit every position whose largest probability reaches this.
            entropy_bound: commit positions up to this much entropy, in nats.
            cache: keys and values to reuse between steps.
            cache_refresh: steps between two full forwards with an approximate cache.
            fallback: what commits where nothing reaches `confidence_threshold`, `surest` or `leftmost`.
            position_temperature: of the draw of positions by `unmasking="plackett_luce"`.

        Returns:
            Long [B · n, P + L], prompts followed by their completions (the pad id after the id that ends a text), or
            the `Trajectory`, whose `completion_ids` are the canvas as it was written, or both.

        Raises:
            ValueError: for settings that diffusion sampling does not have or that contradict each other, prompts
                that are not padded on the left, or prompt and canvas of more positions than the model has.
        """
        if input_ids is None:
            raise ValueError("generate() needs at least one token of a prompt as `input_ids`; got none.")
        input_ids, attention_mask, _ = checked_prompts(input_ids, attention_mask)
        read = generation.read_settings(
            settings,
            generation_config,
            self.generation_config,  # type: ignore[attr-defined]  # transformers sets it
            self.family,
            input_ids.size(1),
        )
        config = read.sampling_config(self.attention_block, return_trajectory)
        output = generation.complete(self, input_ids, attention_mask, read, config, generator)
        if read.return_dict:
            return output
        kept = output.trajectory if return_trajectory else output.sequences
        assert kept is not None
        return kept
