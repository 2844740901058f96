"""The model `trl_diffusion` for EleutherAI's lm-evaluation-harness.

The harness has no entry point for models of other packages: it finds those that are registered before it looks.
`python -m trl_diffusion.evaluation.lm_eval` is its command with this one registered.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm.auto import tqdm

from trl_diffusion.evaluation.decoding import decode_batch, fixed_batches
from trl_diffusion.evaluation.lm_eval.likelihood_bound import is_greedy, log_likelihood_bound
from trl_diffusion.evaluation.loading import load_model, merge_for_decoding, weights_checksum
from trl_diffusion.evaluation.processes import join_processes
from trl_diffusion.family import family_of
from trl_diffusion.sampling import SamplingConfig, row_generators
from trl_diffusion.sampling.arguments import OPTIONS, GreedyArguments, refuse_unknown
from trl_diffusion.sampling.positions import check_fits

logger = logging.getLogger(__name__)

# Options of the sampler that are the model's; the others have arguments of their own or are the task's.
RULE_OPTIONS = tuple(name for name in OPTIONS if name not in ("denoising_steps", "temperature", "top_k", "top_p"))


@register_model("trl_diffusion")
class DiffusionHarnessLM(TemplateLM):
    """A diffusion language model for the lm-evaluation-harness.

    `generate_until` decodes by diffusion and cuts the text at the first stop string. With one process and the same
    prompts, batch size and decoding it gives the completions of `recipes/evaluate.py`. `loglikelihood` returns a
    Monte-Carlo estimate of a lower bound, see `log_likelihood_bound`; `loglikelihood_rolling` is refused.

    Args:
        pretrained: model on the Hub or in a folder.
        adapter: PEFT adapter on the Hub or in a folder.
        revision: revision of the model on the Hub.
        dtype: type of the weights; `auto` for the checkpoint's.
        attn_implementation: as in transformers.
        block_size: attention block of a checkpoint whose config.json leaves it out; 0 for full attention.
        block_origin: where the first attention block begins, `sequence` or `completion`.
        allow_other_base: accept an adapter whose config names another base.
        merge_adapter: merge the adapter into its base; if not given, where only the rounding of float32 changes.
        canvas_length: positions to write; the task's `max_gen_toks`, in whole blocks, if not given.
        denoising_steps: network evaluations per canvas; half the canvas if not given.
        mc_num: noised views of each continuation in `loglikelihood`.
        seed: seed of sampling and of the noised views.
        batch_size: completions decoded together.
        max_batch_size: only for the harness's automatic batch size, which is refused.
        device: `cpu` to stay there. Several processes, or one without a GPU, take what accelerate gives them.
        **decoding: the other options of `trl_diffusion.sampling.SamplingArguments`: `block_length`, `unmasking`
            (`max_prob` if not given), `confidence_threshold`, `fallback`, `entropy_bound`, `cache`,
            `cache_refresh` and `position_temperature`. Temperature, top-k and top-p are the task's (`--gen_kwargs`).

    Raises:
        ValueError: for `batch_size=auto`.
        TypeError: for an option that does not exist.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        block_size: int | None = None,
        block_origin: str | None = None,
        allow_other_base: bool = False,
        merge_adapter: bool | None = None,
        canvas_length: int | None = None,
        denoising_steps: int | None = None,
        mc_num: int = 128,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **decoding: Any,
    ):
        super().__init__()
        refuse_unknown(decoding, RULE_OPTIONS, type(self).__name__)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size must be a whole number, got {batch_size!r}: a batch size found by trial would change "
                "results from machine to machine."
            )
        self.batch_size, self.seed, self.mc_num = int(batch_size), seed, mc_num
        self.canvas_length, self.denoising_steps = canvas_length, denoising_steps
        self.options = GreedyArguments(**decoding)
        self.state = join_processes(use_cpu=device == "cpu")
        self._rank, self._world_size = self.state.process_index, self.state.num_processes
        self._device = self.state.device
        if device is not None and self.state.device.type != "cpu" and self.world_size == 1:
            self._device = torch.device(device)
        elif device not in (None, str(self.state.device)):
            logger.warning("Running on %s; the harness proposed %s.", self.state.device, device)
        self.facts: dict[str, Any] = {"pretrained": pretrained, "adapter": adapter, "revision": revision}
        self.model, self.tokenizer = load_model(
            pretrained,
            adapter,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            block_size=None if block_size is None else int(block_size),
            block_origin=block_origin,
            device=self._device,
            allow_other_base=allow_other_base,
        )
        # of the weights as they are stored, before they are merged
        self.facts["weights"] = weights_checksum(self.model)
        self.model, self.facts["adapter_merged"] = merge_for_decoding(self.model, merge_adapter)

    # Facts that the harness reads

    @property
    def eot_token_id(self) -> int:
        return family_of(self.model).tail_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return the facts and settings that the harness writes together with its results."""
        return {
            **self.facts,
            "model_dtype": str(self.model.dtype),
            "canvas_length": self.canvas_length,
            "denoising_steps": self.denoising_steps,
            **{name: vars(self.options)[name] for name in RULE_OPTIONS},
            "mc_num": self.mc_num,
            "sampling_seed": self.seed,
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template writes them itself
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a context and its continuation; spaces between them belong to the continuation."""
        text = context + continuation
        context = context.rstrip(" ")
        whole, context_ids = self.tok_encode(text), self.tok_encode(context)
        if whole[: len(context_ids)] == context_ids:
            return context_ids, whole[len(context_ids) :]
        # A token reaches over the boundary; cutting the whole text there, as the harness does, loses a part.
        return context_ids, self.tok_encode(text[len(context) :], add_special_tokens=False)

    # Several processes: the harness gives each its share of the rows

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor.reshape(-1)) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.reshape(-1))
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        self.state.wait_for_everyone()

    # Requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete each request, and cut the text at its first stop string."""
        groups: dict[str, list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            # Only rows of one task, decoded in one way, share batches.
            groups[f"{request.task_name} {sorted(request.args[1].items())}"].append(position)
        texts = [""] * len(requests)
        for positions in groups.values():
            completed = self._complete([requests[position] for position in positions], disable_tqdm)
            for position, text in zip(positions, completed, strict=True):
                texts[position] = text
        return texts

    def _complete(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        options = dict(normalize_gen_kwargs(requests[0].args[1]))
        stops = [stop for stop in options.pop("until") if stop]
        config = self._decoding(options)
        task = requests[0].task_name or "these requests"
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        check_fits(self.model, max(map(len, prompts)), config.canvas_length, task)
        indices = self._indices(requests)
        texts = [""] * len(requests)
        for batch in tqdm(
            fixed_batches([len(prompt) for prompt in prompts], self.batch_size),
            desc=f"Decoding {task}",
            disable=disable_tqdm or self.rank != 0,
        ):
            generators = row_generators(self.seed, rows=[indices[item] for item in batch])
            decoded = decode_batch(self.model, self.tokenizer, [prompts[item] for item in batch], config, generators)
            for item, completion in zip(batch, decoded, strict=True):
                texts[item] = _cut(completion.text, stops)
                self.cache_hook.add_partial("generate_until", requests[item].args, texts[item])
        return texts

    def _decoding(self, options: dict[str, Any]) -> SamplingConfig:
        """Merge the task's generation options and the model's into a `SamplingConfig`."""
        budget, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature = float(options.pop("temperature", 1.0)) if sampled else 0.0
        top_k, top_p = int(options.pop("top_k", 0)), float(options.pop("top_p", 1.0))
        options.pop("temperature", None)
        if options:
            raise ValueError(
                f"The task sets generation options that diffusion decoding does not have: {options}. Remove them from "
                "the task's generation_kwargs."
            )
        block = self.options.block_length
        canvas = self.canvas_length or -(-budget // block) * block
        return self.options.sampling_on(
            canvas,
            denoising_steps=self.denoising_steps or canvas // 2,
            temperature=temperature,
            top_k=top_k if sampled else 0,
            top_p=top_p if sampled else 1.0,
            record_support=False,  # texts are all that is kept
        )

    def _indices(self, requests: list[Instance]) -> list[int]:
        """Return row · repeats + number of the repeat, which keys each completion's random stream."""
        seen: dict[int, int] = defaultdict(int)
        indices = []
        for request in requests:
            row, repeats = request.doc_id or 0, request.repeats or 1
            indices.append(row * repeats + seen[row] % repeats)
            seen[row] += 1
        return indices

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        contexts = [context for _, context, _ in requests]
        continuations = [continuation for _, _, continuation in requests]
        for context, continuation in zip(contexts, continuations, strict=True):
            if not context or not continuation:
                raise ValueError(
                    "A loglikelihood request needs at least one token of context and one of continuation; its texts "
                    f"have {len(context)} and {len(continuation)}."
                )
            check_fits(self.model, len(context), len(continuation), "a loglikelihood request")
        answers: list[tuple[float, bool]] = []
        # A few requests at a time, for the progress bar and the harness's cache.
        bar = tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm or self.rank != 0)
        for start in range(0, len(requests), self.batch_size):
            part = slice(start, start + self.batch_size)
            # The stream is keyed by the tokens, so that an estimate does not depend on what else is asked.
            generators = [
                row_generators(self.seed, *_key(context + continuation), rows=[len(context)])[0]
                for context, continuation in zip(contexts[part], continuations[part], strict=True)
            ]
            bounds = log_likelihood_bound(
                self.model, contexts[part], continuations[part], generators, self.mc_num, self.batch_size
            )
            greedy = [is_greedy(self.model, *pair) for pair in zip(contexts[part], continuations[part], strict=True)]
            for (texts, _, _), answer in zip(requests[part], zip(bounds, greedy, strict=True), strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, answer)
                answers.append(answer)
            bar.update(len(bounds))
        bar.close()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse the request: there is no perplexity of whole documents.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "loglikelihood_rolling (perplexity of whole documents) has no counterpart in a diffusion language model, "
            "which predicts no token from those to its left alone. Choose tasks of type generate_until, "
            "multiple_choice or loglikelihood."
        )


def _key(token_ids: Sequence[int]) -> tuple[int, int]:
    """Hash token ids to two 32-bit integers."""
    digest = hashlib.blake2b(repr(list(token_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def _cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
