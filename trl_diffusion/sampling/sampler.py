"""Block-by-block diffusion sampling that records the whole trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel

from trl_diffusion.distribution import draw, score_targets, sum_before, truncate
from trl_diffusion.family import DiffusionFamily, family_of
from trl_diffusion.sampling.batching import prompt_buckets
from trl_diffusion.sampling.canvas import CanvasState
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.passes import PASSES
from trl_diffusion.sampling.positions import check_fits
from trl_diffusion.sampling.prompts import checked_prompts
from trl_diffusion.sampling.trajectory import Trajectory
from trl_diffusion.streams import uniforms

# What sums of entropies are multiples of.
_NATS = 2.0**-40

# Probabilities that low-confidence unmasking holds at once beside the logits (4 bytes each).
_CPU_CHUNK, _CHUNK = 2**22, 2**27


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: SamplingConfig,
    generators: Sequence[np.random.Generator],
    any_process: Callable[[bool], bool] | None = None,
    state: CanvasState | None = None,
    end_token_ids: Sequence[int] = (),
) -> Trajectory:
    """Draw one completion per prompt, block by block, and record its trajectory.

    A row leaves the batch behind the block in which its text ended; the rest of its canvas is filled with the tail
    id. The network is in evaluation mode while sampling, and put back after.

    Args:
        model: a native diffusion language model, possibly inside PEFT. A compiled one runs as it was before, because
            the shapes of its passes keep changing.
        input_ids: integers [B, P], left-padded prompts; B may be 0.
        attention_mask: [B, P], 0 on padding; all ones if `None`.
        config: how to draw.
        generators: B random streams, see `row_generators`.
        any_process: where weights stay sharded over processes (ZeRO-3, FSDP2), tells whether any process still has
            rows to write, so that all run the same number of forwards.
        state: partly denoised canvases to continue, at the same blocks and tokens per step; all masked if `None`. Of
            what was written before, the trajectory records nothing but the tokens. A row whose text has ended costs
            no forward.
        end_token_ids: ids that end a text in addition to those of the family.

    Returns:
        The trajectory, on the device of `input_ids`.

    Raises:
        ValueError: if there is not one generator per prompt, a prompt is empty or its mask has a hole, prompt and
            canvas have more positions than the model, the state is of another shape, or the cache or block length
            does not go with the model's attention.
        FloatingPointError: if the network's logits are not finite.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    family = family_of(model)
    family = replace(family, end_token_ids=(*family.end_token_ids, *end_token_ids))
    input_ids, attention_mask, lengths = checked_prompts(input_ids, attention_mask)
    batch, prompt_length = input_ids.shape
    if len(generators) != batch:
        raise ValueError(f"sample() needs one generator per prompt: {batch} prompts, {len(generators)} generators.")
    if state is not None and (state.canvas.shape != (batch, config.canvas_length) or state.length.shape != (batch,)):
        raise ValueError(
            f"sample() needs a state of shape {(batch, config.canvas_length)} (prompts, canvas length) with as many "
            f"lengths as prompts; got {tuple(state.canvas.shape)} with lengths {tuple(state.length.shape)}."
        )
    config.check_family(family)
    if batch:
        canvas_length = config.canvas_length if state is None else int(state.length.max())
        check_fits(model, max(lengths), canvas_length, "this batch")
    # where processes share the weights, all must run as many passes
    buckets = (
        prompt_buckets(lengths, config.canvas_length, config.prompt_share(family))
        if any_process is None and batch
        else [list(range(batch))]
    )
    was_training = model.training
    model.eval()
    try:
        parts = []
        with _uncompiled(model):
            for bucket in buckets:
                rows = torch.tensor(bucket, dtype=torch.long, device=input_ids.device)
                shown = slice(prompt_length - max((lengths[row] for row in bucket), default=0), None)
                rollout = _Rollout(
                    model,
                    family,
                    config,
                    input_ids[rows, shown],
                    attention_mask[rows, shown],
                    [generators[row] for row in bucket],
                    None if state is None else CanvasState(state.canvas[rows], state.length[rows]),
                    any_process,
                )
                rollout.write()
                parts.append(rollout.trajectory())
    finally:
        model.train(was_training)
    return Trajectory.gather(parts, torch.tensor([row for bucket in buckets for row in bucket]).to(input_ids.device))


def _uncompiled(model: torch.nn.Module) -> AbstractContextManager:
    """Where nothing runs compiled that was compiled in place, as DeepSpeed does it. The switch is the whole process's,
    also of its other threads, so it is left alone where there is nothing to switch off."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class _Drawn(NamedTuple):
    """Tokens drawn at [R, n] positions, with what is recorded of them; support [R, n, top_k]."""

    tokens: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor
    support: torch.Tensor | None

    def pick(self, rows: torch.Tensor, slots: torch.Tensor) -> _Drawn:
        """What was drawn at [N] (row, slot) pairs."""
        support = None if self.support is None else self.support[rows, slots]
        return _Drawn(self.tokens[rows, slots], self.logps[rows, slots], self.entropies[rows, slots], support)


class _Rollout:
    """The growing canvas of one batch; rows may be at different blocks."""

    def __init__(
        self,
        model,
        family: DiffusionFamily,
        config: SamplingConfig,
        input_ids,
        attention_mask,
        generators,
        state,
        any_process,
    ):
        device, batch = input_ids.device, input_ids.size(0)
        shape = (batch, config.canvas_length)
        self.family, self.config, self.any_process = family, config, any_process
        if state is None:
            state = CanvasState.empty(batch, config.canvas_length, family.mask_token_id, device)
        self.canvas, self.length = state.canvas.clone(), state.length
        self.block, unfinished = state.next_block(family, config.block_length)
        self.alive = unfinished.nonzero().squeeze(1)
        self.passes = PASSES[config.cache_for(family)](
            model, family, config, input_ids, attention_mask, self.canvas, self.length
        )
        self.row_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.unmask_step = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.logps = torch.zeros(shape, device=device)
        self.entropies = torch.zeros(shape, device=device)
        self.support: torch.Tensor | None = None
        if config.record_support and config.truncates:
            self.support = torch.full((*shape, config.top_k), -1, dtype=torch.int32, device=device)
        self.step_entropy: torch.Tensor | None = None
        self.step_margin: torch.Tensor | None = None
        if config.record_signals:
            self.step_entropy = torch.zeros(batch, config.denoising_steps, device=device)
            self.step_margin = torch.zeros(batch, config.denoising_steps, device=device)
        # Only `low_confidence` draws the same position at several steps, and only `random` needs an order.
        steps = config.steps_per_block if config.unmasking == "low_confidence" else 1
        noise = uniforms(generators, config.num_blocks, steps + 1, config.block_length).to(device)
        self.token_noise, self.order_noise = noise[:, :, :-1], noise[:, :, -1]

    def _anywhere(self, here: bool) -> bool:
        """Whether something holds here or on a process that shares the weights."""
        return here if self.any_process is None else self.any_process(here)

    def write(self) -> None:
        """Write until every text has ended or its canvas is full."""
        while self._anywhere(self.alive.numel() > 0):
            self._write_block()

    def _write_block(self) -> None:
        """Commit what is left of the current block of live rows, then let rows leave whose text has ended.

        Where processes share the weights, this one runs a pass at every step, whether or not one of its rows needs it.
        """
        group = self.passes.together(self.alive, self.block)
        first = self.block[group] * self.config.block_length
        self.passes.begin_block(group, first, self._anywhere)
        commits = self.config.commits()
        for step in range(len(commits)):
            masked, open_ = self._masked(group)
            if self.config.parallel and not self._anywhere(masked.size(1) > 0):
                break
            least = self._least(open_.sum(1), sum(commits[step + 1 :]))
            if least.any():
                working = self.passes.working(open_, least)
                self._write_step(group[working], step, masked[working], open_[working], least[working])
            elif self.any_process is not None:
                self.passes.keep_step()
        ended = self.family.is_end(self.canvas[group.unsqueeze(1), self._positions(group)]).any(1)
        self.block[group] += 1
        leave = ended | (self.block[group] * self.config.block_length >= self.length[group])
        self.alive = self.alive[~torch.isin(self.alive, group[leave])]

    def _least(self, num_open: torch.Tensor, later: int) -> torch.Tensor:
        """Tokens [R] to commit at a step, at least, so that `later` ones suffice.

        A row that starts inside a block, or on a shorter canvas, joins when its turn comes; where the network may
        commit more than this, rows never wait.
        """
        least = (num_open - later).clamp(min=0)
        return torch.maximum(least, num_open.clamp(max=1)) if self.config.parallel else least

    def _positions(self, rows) -> torch.Tensor:
        """Canvas positions [R, block] of the current blocks."""
        offsets = torch.arange(self.config.block_length, device=rows.device)
        return self.block[rows].unsqueeze(1) * self.config.block_length + offsets

    def _masked(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets [R, m] of the masked positions of the current blocks, and bool [R, m] where there is one."""
        positions = self._positions(rows)
        masked = self.canvas[rows.unsqueeze(1), positions] == self.family.mask_token_id
        masked &= positions < self.length[rows].unsqueeze(1)
        order = masked.int().argsort(dim=1, descending=True, stable=True)
        most = int(masked.sum(1).max()) if rows.numel() else 0
        return order[:, :most], masked.gather(1, order)[:, :most]

    def _write_step(self, rows, step: int, masked: torch.Tensor, open_: torch.Tensor, least: torch.Tensor) -> None:
        """Commit at least `least` [R] of the open positions among `masked` (offsets in the block, [R, m])."""
        self.row_forwards[rows] += 1
        slots, counts, drawn, signals = self._denoise(rows, step, masked, open_, least)
        kept, slot = (torch.arange(slots.size(1), device=rows.device) < counts.unsqueeze(1)).nonzero(as_tuple=True)
        offsets = masked.gather(1, slots)[kept, slot]
        own, block = rows[kept], self.block[rows]
        self._commit(
            (own, block[kept] * self.config.block_length + offsets),
            (block * self.config.steps_per_block + step)[kept],
            drawn.pick(kept, slot),
        )
        if self.step_entropy is not None and self.step_margin is not None:
            at = (rows, block * self.config.steps_per_block + step)
            self.step_entropy[at], self.step_margin[at] = signals

    def _denoise(self, rows, step: int, masked: torch.Tensor, open_: torch.Tensor, least: torch.Tensor):
        """Choose from the positions `masked` [R, m] (offsets in the block) and draw tokens there.

        Returns (the chosen, best first, as indices into `masked` [R, n]; how many of them count [R]; what was drawn
        there; signals [R] or None).
        """
        config, block = self.config, self.block[rows]
        count = int(least.max())
        if config.unmasking == "random":
            order = self.order_noise[rows, block].gather(1, masked).masked_fill(~open_, torch.inf)
            slots = order.argsort(1)[:, :count]
            if not config.record_signals:  # the LM head is needed only where tokens are committed
                chosen = masked.gather(1, slots)
                drawn = self._draw(self._logits(rows, chosen), self._noise(rows, 0, chosen))
                return slots, least, drawn, None

        logits = self._logits(rows, masked)
        signals = _signals(logits, open_) if config.record_signals else None
        if config.unmasking == "low_confidence":
            tokens, support, confidence = self._tokens_with_confidence(logits, self._noise(rows, step, masked))
            slots = confidence.masked_fill(~open_, -1.0).topk(count, dim=1).indices
            support = None if support is None else _take(support, slots)
            return slots, least, self._scored(_take(logits, slots), _take(tokens, slots), support), signals
        if config.unmasking != "random":
            certainty = _certainty(logits, config.unmasking).masked_fill(~open_, -torch.inf)
            if config.parallel:
                certainty, slots = certainty.sort(dim=1, descending=True)
                least = least.maximum(self._certain(certainty))
                slots = slots[:, : int(least.max())]
            else:
                slots = certainty.topk(count, dim=1).indices
        noise = self._noise(rows, 0, masked.gather(1, slots))
        return slots, least, self._draw(_take(logits, slots), noise), signals

    def _certain(self, certainty: torch.Tensor) -> torch.Tensor:
        """How many positions pass the rule of parallel unmasking, [R] from certainties [R, m], largest first."""
        if self.config.confidence_threshold is not None:
            return (certainty >= math.log(self.config.confidence_threshold)).sum(1)
        assert self.config.entropy_bound is not None
        # entropies in ascending order: the sum of all but the largest is the sum of those before
        open_ = certainty > -torch.inf
        before = sum_before((-certainty).masked_fill(~open_, 0.0), _NATS)
        return ((before <= self.config.entropy_bound) & open_).sum(1)

    def _noise(self, rows, step: int, offsets: torch.Tensor) -> torch.Tensor:
        return self.token_noise[rows, self.block[rows], step].gather(1, offsets)

    def _logits(self, rows, offsets: torch.Tensor) -> torch.Tensor:
        return self.passes.logits(rows, self.block[rows] * self.config.block_length, offsets)

    def _tokens(self, logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw a token from each distribution: logits [R, n, V], noise [R, n]; with the ids that it could be."""
        config = self.config
        if config.temperature == 0:
            return logits.argmax(-1), None
        if not config.truncates:
            return draw((logits if config.temperature == 1 else logits / config.temperature).softmax(-1), noise), None
        log_probs, ids = truncate(logits, config.temperature, config.top_k or logits.size(-1), config.top_p)
        tokens = ids.gather(-1, draw(log_probs.exp(), noise).unsqueeze(-1)).squeeze(-1).long()
        return tokens, torch.nn.functional.pad(ids, (0, max(config.top_k - ids.size(-1), 0)), value=-1)

    def _tokens_with_confidence(self, logits: torch.Tensor, noise: torch.Tensor):
        """What `_tokens` draws, and the probabilities [R, n] of these tokens at temperature 1; some rows at a time."""
        tokens, supports, confidence = [], [], []
        chunk = _CPU_CHUNK if logits.device.type == "cpu" else _CHUNK
        rows = max(chunk // max(logits[:1].numel(), 1), 1)
        for part, part_noise in zip(logits.split(rows), noise.split(rows), strict=True):
            probabilities = part.softmax(-1)
            if self.config.temperature == 1 and not self.config.truncates:
                drawn, support = draw(probabilities, part_noise), None
            else:
                drawn, support = self._tokens(part, part_noise)
            tokens.append(drawn)
            confidence.append(probabilities.gather(-1, drawn.unsqueeze(-1)).squeeze(-1))
            if support is not None:
                supports.append(support)
        return torch.cat(tokens), torch.cat(supports) if supports else None, torch.cat(confidence)

    def _scored(self, logits: torch.Tensor, tokens: torch.Tensor, support: torch.Tensor | None) -> _Drawn:
        """Tokens [R, n] with their log-probabilities and entropies; at temperature 0, those of temperature 1."""
        return _Drawn(tokens, *score_targets(logits, tokens, self.config.temperature or 1.0, support), support)

    def _draw(self, logits: torch.Tensor, noise: torch.Tensor) -> _Drawn:
        return self._scored(logits, *self._tokens(logits, noise))

    def _commit(self, where: tuple[torch.Tensor, torch.Tensor], steps: torch.Tensor, drawn: _Drawn) -> None:
        self.canvas[where] = drawn.tokens
        self.unmask_step[where] = steps.int()
        self.logps[where] = drawn.logps
        self.entropies[where] = drawn.entropies
        if self.support is not None and drawn.support is not None:
            self.support[where] = drawn.support

    def trajectory(self) -> Trajectory:
        return Trajectory(
            completion_ids=self.canvas.masked_fill(
                self.canvas == self.family.mask_token_id, self.family.tail_token_id
            ),
            unmask_step=self.unmask_step,
            logps=self.logps,
            entropies=self.entropies,
            support=self.support,
            temperature=self.config.temperature,
            step_entropy=self.step_entropy,
            step_margin=self.step_margin,
            row_forwards=self.row_forwards,
            row_units=self.passes.row_units,
            forwards=self.passes.forwards,
            sync_forwards=self.passes.sync_forwards,
            prompt_columns=torch.full_like(self.row_forwards, self.passes.input_ids.size(1)),
        )


def _take(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """values[r, slots[r, j]] for values [R, m, …] and slots [R, n]."""
    return values[torch.arange(values.size(0), device=values.device).unsqueeze(1), slots]


def _signals(logits: torch.Tensor, open_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy and mean p1 − p2 over the positions that are open, [R] each from logits [R, m, V]."""
    probabilities = logits.softmax(-1)
    top = probabilities.topk(2, dim=-1).values
    # Few passes over the vocabulary: the normaliser follows from the largest logit, and 0 · −inf (ids that are never
    # sampled) is taken out of the product.
    normaliser = logits.amax(-1) - top[..., 0].log()
    entropy = normaliser - (probabilities * logits).nan_to_num(nan=0.0).sum(-1)
    count = open_.sum(1)
    margin = (top[..., 0] - top[..., 1]).masked_fill(~open_, 0.0).sum(1) / count
    return entropy.masked_fill(~open_, 0.0).sum(1) / count, margin


def _certainty(logits: torch.Tensor, unmasking: str) -> torch.Tensor:
    """How certain the network is at each position, [R, m] from logits [R, m, V]; larger commits first."""
    if unmasking == "max_prob":
        return logits.amax(-1) - logits.logsumexp(-1)
    if unmasking == "entropy":
        return -_entropy(logits)
    return _margin(logits)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def _margin(logits: torch.Tensor) -> torch.Tensor:
    top = logits.softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]
