"""Block-by-block diffusion sampling that records the whole trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from trl_diffusion.models import DiffusionFamily, family_of, score_targets
from trl_diffusion.sampling.distribution import draw, truncate
from trl_diffusion.sampling.noise import uniforms
from trl_diffusion.sampling.state import CanvasState
from trl_diffusion.sampling.trajectory import Trajectory

UNMASKING = ("random", "max_prob", "entropy", "margin", "low_confidence")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Args:
        canvas_length: L, positions to write.
        denoising_steps: S, split evenly over the blocks; each step commits the same share of its block (the first
            steps one more where it does not divide).
        block_length: positions per block; blocks are written from left to right.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: number of tokens to draw from; 0 for all.
        top_p: probability mass to draw from; below 1 it needs `top_k`, so that the recorded support stays small.
        unmasking: which masked positions of the block are committed at a step. `random`: uniformly;
            `max_prob`, `entropy`, `margin`: where the network's distribution (temperature 1, full vocabulary) has the
            largest top probability, the lowest entropy, the largest gap between its two largest probabilities. The
            token is drawn after its position is chosen, so the recorded log-probability is that of the policy.
            `low_confidence` is LLaDA's rule: draw a token everywhere and commit those with the largest probability.
            It is biased: committed tokens are mostly modes, and the recorded log-probability is not the policy's.
        record_signals: also record `step_entropy` and `step_margin`; needs the LM head at every masked position of
            the block, which `random` does not.

    Raises:
        ValueError: if the numbers do not fit together.
    """

    canvas_length: int = 256
    denoising_steps: int = 128
    block_length: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    unmasking: str = "random"
    record_signals: bool = False

    def __post_init__(self) -> None:
        if min(self.canvas_length, self.denoising_steps, self.block_length) < 1:
            raise ValueError(
                f"canvas_length ({self.canvas_length}), denoising_steps ({self.denoising_steps}) and block_length "
                f"({self.block_length}) must be at least 1."
            )
        if self.canvas_length % self.block_length:
            raise ValueError(
                f"block_length ({self.block_length}) must divide the canvas length ({self.canvas_length}); choose "
                f"a canvas of {-(-self.canvas_length // self.block_length) * self.block_length} or another block."
            )
        if self.denoising_steps % self.num_blocks or self.denoising_steps > self.canvas_length:
            raise ValueError(
                f"denoising_steps ({self.denoising_steps}) must be a multiple of the number of blocks "
                f"({self.num_blocks} = {self.canvas_length} / {self.block_length}) and at most the canvas length "
                f"({self.canvas_length}), so that every step of every block commits at least one token."
            )
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps every token), got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if self.top_p < 1 and self.top_k == 0 and self.temperature > 0:
            raise ValueError(
                f"top_p={self.top_p} needs top_k > 0, so that the recorded support stays small; the AGRPO paper uses "
                "top_k=150 with top_p=0.99."
            )
        if self.unmasking not in UNMASKING:
            raise ValueError(f"unmasking must be one of {', '.join(UNMASKING)}; got {self.unmasking!r}.")

    @property
    def num_blocks(self) -> int:
        return self.canvas_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.denoising_steps // self.num_blocks

    def commits(self) -> list[int]:
        """Tokens committed at each step of a block; sums to the block length."""
        share, extra = divmod(self.block_length, self.steps_per_block)
        return [share + (step < extra) for step in range(self.steps_per_block)]

    def head_positions(self) -> int:
        """Positions at which the LM head runs for one completion that fills its canvas."""
        if self.unmasking == "random" and not self.record_signals:
            return self.canvas_length
        commits = self.commits()
        return self.num_blocks * sum(sum(commits[step:]) for step in range(len(commits)))


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: SamplingConfig,
    generators: Sequence[np.random.Generator],
    any_process: Callable[[bool], bool] | None = None,
    state: CanvasState | None = None,
) -> Trajectory:
    """Draw one completion per prompt, block by block, and record its trajectory.

    A row leaves the batch behind the block in which its text ended; the rest of its canvas is filled with the tail
    id. The network is in evaluation mode while sampling, and put back after.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        input_ids: long [B, P], left-padded prompts.
        attention_mask: [B, P], 0 on padding; all ones if `None`.
        config: how to draw.
        generators: B random streams, see `row_generators`.
        any_process: where weights stay sharded over processes (ZeRO-3, FSDP2), tells whether any process still has
            rows to write, so that all run the same number of forwards.
        state: partly denoised canvases to continue, at the same blocks and tokens per step; all masked if `None`. Of
            what was written before, the trajectory records nothing but the tokens. A row whose text has ended costs
            no forward.

    Returns:
        The trajectory, on the device of `input_ids`.

    Raises:
        ValueError: if there is not one generator per prompt, a prompt is empty, or the state is of another shape.
        FloatingPointError: if the network's logits are not finite.
    """
    family = family_of(model)
    batch, prompt_length = input_ids.shape
    if len(generators) != batch:
        raise ValueError(f"sample() needs one generator per prompt: {batch} prompts, {len(generators)} generators.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if prompt_length == 0 or not attention_mask[:, -1].all():
        raise ValueError(
            "sample() needs left-padded, non-empty prompts: the last column of attention_mask must be 1 in every row."
        )
    if state is not None and (state.canvas.shape != (batch, config.canvas_length) or state.length.shape != (batch,)):
        raise ValueError(
            f"sample() needs a state of shape {(batch, config.canvas_length)} (prompts, canvas length) with as many "
            f"lengths as prompts; got {tuple(state.canvas.shape)} with lengths {tuple(state.length.shape)}."
        )
    rollout = _Rollout(model, family, input_ids, attention_mask, config, generators, state)
    was_training = model.training
    model.eval()
    try:
        while True:
            alive = rollout.alive.numel() > 0
            if not (alive if any_process is None else any_process(alive)):
                break
            rollout.write_block(lockstep=any_process is not None)
    finally:
        model.train(was_training)
    return rollout.trajectory()


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

    def at(self, slots: torch.Tensor) -> _Drawn:
        """What was drawn at some of the positions, [R, k] slots."""
        support = None if self.support is None else _take(self.support, slots)
        return _Drawn(_take(self.tokens, slots), _take(self.logps, slots), _take(self.entropies, slots), support)


class _Rollout:
    """The growing canvas of one batch; rows may be at different blocks."""

    def __init__(self, model, family: DiffusionFamily, input_ids, attention_mask, config, generators, state):
        device, batch = input_ids.device, input_ids.size(0)
        shape = (batch, config.canvas_length)
        self.model, self.family, self.config = model, family, config
        self.input_ids, self.attention_mask = input_ids, attention_mask
        if state is None:
            state = CanvasState.empty(batch, config.canvas_length, family.mask_token_id, device)
        self.canvas, self.length = state.canvas.clone(), state.length
        self.block, unfinished = state.next_block(family, config.block_length)
        self.alive = unfinished.nonzero().squeeze(1)
        self.forwards = self.sync_forwards = 0
        self.row_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.unmask_step = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.logps = torch.zeros(shape, device=device)
        self.entropies = torch.zeros(shape, device=device)
        self.support: torch.Tensor | None = None
        if config.top_k and config.temperature > 0:
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

    def write_block(self, lockstep: bool) -> None:
        """Commit what is left of the current block of every live row, then let rows leave whose text has ended.

        With `lockstep` this process runs a forward at every step, whether or not one of its rows needs it.
        """
        commits = self.config.commits()
        for step in range(len(commits)):
            masked, open_ = self._masked(self.alive)
            # A row that starts inside a block, or on a shorter canvas, joins when its turn comes.
            counts = (open_.sum(1) - sum(commits[step + 1 :])).clamp(min=0)
            rows = self.alive[counts > 0]
            if rows.numel() > 0:
                self._write_step(rows, step, masked[counts > 0], open_[counts > 0], counts[counts > 0])
            elif lockstep:
                self.sync_forwards += 1
                first = self.alive.new_zeros(1)
                self._logits(first, first.unsqueeze(1))
        rows = self.alive
        ended = self.family.is_end(self.canvas[rows.unsqueeze(1), self._positions(rows)]).any(1)
        self.block[rows] += 1
        self.alive = rows[~ended & (self.block[rows] * self.config.block_length < self.length[rows])]

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

    def _write_step(self, rows, step: int, masked: torch.Tensor, open_: torch.Tensor, counts: torch.Tensor) -> None:
        """Commit `counts` [R] of the open positions among `masked` (offsets in the block, [R, m])."""
        self.row_forwards[rows] += 1
        slots, drawn, signals = self._denoise(rows, step, masked, open_, int(counts.max()))
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

    def _denoise(self, rows, step: int, masked: torch.Tensor, open_: torch.Tensor, count: int):
        """Choose `count` of the positions `masked` [R, m] (offsets in the block) and draw their tokens.

        Returns (the chosen, as indices into `masked` [R, count]; what was drawn there; signals [R] or None).
        """
        config, block = self.config, self.block[rows]
        if config.unmasking == "random":
            order = self.order_noise[rows, block].gather(1, masked).masked_fill(~open_, torch.inf)
            slots = order.argsort(1)[:, :count]
            if not config.record_signals:  # the LM head is needed only where tokens are committed
                chosen = masked.gather(1, slots)
                drawn = self._draw(self._logits(rows, chosen), self._noise(rows, 0, chosen))
                return slots, drawn, None

        logits = self._logits(rows, masked)
        signals = _signals(logits, open_) if config.record_signals else None
        if config.unmasking == "low_confidence":
            drawn = self._draw(logits, self._noise(rows, step, masked))
            confidence = score_targets(logits, drawn.tokens)[0].masked_fill(~open_, -torch.inf)
            slots = confidence.topk(count, dim=1).indices
            return slots, drawn.at(slots), signals
        if config.unmasking != "random":
            certainty = _certainty(logits, config.unmasking).masked_fill(~open_, -torch.inf)
            slots = certainty.topk(count, dim=1).indices
        noise = self._noise(rows, 0, masked.gather(1, slots))
        return slots, self._draw(_take(logits, slots), noise), signals

    def _noise(self, rows, step: int, offsets: torch.Tensor) -> torch.Tensor:
        return self.token_noise[rows, self.block[rows], step].gather(1, offsets)

    def _logits(self, rows, offsets: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        prompt_length = self.input_ids.size(1)
        canvas = self.canvas[rows, : int(self.length[rows].max())]
        visible = torch.arange(canvas.size(1), device=rows.device) < self.length[rows].unsqueeze(1)
        # An offset that only fills up a row with less to write, or keeps step, may lie behind the canvas; nothing of
        # what the network says there is read.
        positions = (self.block[rows].unsqueeze(1) * self.config.block_length + offsets).clamp(max=canvas.size(1) - 1)
        logits = self.model(
            input_ids=torch.cat([self.input_ids[rows], canvas], dim=1),
            attention_mask=torch.cat([self.attention_mask[rows], visible.to(self.attention_mask)], dim=1),
            positions=prompt_length + positions,
        ).logits
        finite = logits.amax(-1).isfinite().all(1)
        if not finite.all():  # some id would be drawn all the same
            raise FloatingPointError(
                f"The network's logits are not finite for {int((~finite).sum())} of {len(rows)} rows in forward "
                f"{self.forwards} of this rollout, so no token can be drawn. Its weights or activations have "
                "overflowed: go back to a checkpoint with a lower learning_rate, or use bfloat16 or float32 in place "
                "of float16."
            )
        return logits

    def _draw(self, logits: torch.Tensor, noise: torch.Tensor) -> _Drawn:
        """Draw a token from each distribution: logits [R, n, V], noise [R, n]."""
        config = self.config
        if config.temperature == 0:
            tokens = logits.argmax(-1)
            return _Drawn(tokens, *score_targets(logits, tokens), None)
        if config.top_k == 0:
            tokens = draw((logits / config.temperature).log_softmax(-1), noise)
            return _Drawn(tokens, *score_targets(logits, tokens, config.temperature), None)
        log_probs, ids = truncate(logits, config.temperature, config.top_k, config.top_p)
        tokens = ids.gather(-1, draw(log_probs, noise).unsqueeze(-1)).squeeze(-1).long()
        support = torch.nn.functional.pad(ids, (0, config.top_k - ids.size(-1)), value=-1)
        return _Drawn(tokens, *score_targets(logits, tokens, config.temperature, support), support)

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
            forwards=self.forwards,
            sync_forwards=self.sync_forwards,
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
