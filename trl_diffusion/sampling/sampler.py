"""Block-by-block diffusion sampling that records the whole trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel

from trl_diffusion.family import DiffusionFamily, family_of
from trl_diffusion.sampling.batching import prompt_buckets
from trl_diffusion.sampling.caches import CACHE_CLASSES
from trl_diffusion.sampling.canvas import CanvasState
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.cost import prompt_share
from trl_diffusion.sampling.drawing import ScoredTokens, draw_everywhere, draw_scored, score, take
from trl_diffusion.sampling.observing import Commits, Observer
from trl_diffusion.sampling.positions import check_fits
from trl_diffusion.sampling.prompts import checked_prompts
from trl_diffusion.sampling.settling import LikeliestTokens
from trl_diffusion.sampling.shifts import ShiftRecorder
from trl_diffusion.sampling.trajectory import Trajectory
from trl_diffusion.sampling.unmasking import RULES, Candidates, Choice, step_signals
from trl_diffusion.streams import uniforms


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
    observer: Observer | None = None,
    bounds: torch.Tensor | None = None,
) -> Trajectory:
    """Draw one completion per prompt, block by block, and record its trajectory.

    A row leaves the batch after the block in which its text ended; the rest of its canvas is filled with the tail id.
    The network is in evaluation mode while sampling, and put back afterwards.

    Args:
        model: a native diffusion language model, possibly inside PEFT. A compiled model runs uncompiled, because the
            shapes of its forwards keep changing.
        input_ids: integers [B, P], left-padded prompts; B may be 0.
        attention_mask: [B, P], 0 on padding; all ones if `None`.
        config: how to draw.
        generators: B random streams, see `row_generators`.
        any_process: all-reduced "any", for weights that stay sharded over processes (ZeRO-3, FSDP2): true if any
            process still has rows to write. It makes all processes run the same number of forwards.
        state: partly denoised canvases to continue, with the same blocks and tokens per step; all masked if `None`.
            The trajectory records nothing of what was written before, except the tokens. A row whose text has ended
            costs no forward.
        end_token_ids: ids that end a text, in addition to those of the family.
        observer: called with the tokens of each denoising step, for example to show them. It changes no draw.
        bounds: float [B], an entropy bound for each row in place of `entropy_bound`, which must be set.

    Returns:
        The trajectory, on the device of `input_ids`.

    Raises:
        ValueError: if there is not one generator per prompt, a prompt is empty or its mask has a hole, prompt and
            canvas have more positions than the model, the state has another shape, or the model's attention does not
            allow the cache or the block length.
        FloatingPointError: if the network's logits are not finite.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    family = family_of(model)
    # One list of end ids serves the whole rollout: where texts end decides which rows leave the batch.
    family = replace(family, end_token_ids=(*family.end_token_ids, *end_token_ids))
    input_ids, attention_mask, lengths = checked_prompts(input_ids, attention_mask)
    batch, prompt_length = input_ids.shape
    if len(generators) != batch:
        raise ValueError(f"sample() needs one generator per prompt: {batch} prompts, {len(generators)} generators.")
    given = None if state is None else state.canvas != family.mask_token_id
    if state is None:
        state = CanvasState.empty(batch, config.canvas_length, family.mask_token_id, input_ids.device)
    state.check_shape(batch, config.canvas_length)
    config.check_family(family)
    config.check_bounds(bounds, batch)
    if batch:
        check_fits(model, max(lengths), int(state.length.max()), "this batch")
    # Where processes share the weights, all must run the same number of forwards, so their rows stay together.
    buckets = [list(range(batch))]
    if any_process is None and batch:
        buckets = prompt_buckets(lengths, config.canvas_length, prompt_share(config, family))
    parts = []
    with _evaluating(model), _uncompiled(model):
        for bucket in buckets:
            rows = torch.tensor(bucket, dtype=torch.long, device=input_ids.device)
            # The columns that are padding in every row of the bucket are cut.
            shown = slice(prompt_length - max((lengths[row] for row in bucket), default=0), None)
            rollout = _Rollout(
                model,
                family,
                config,
                input_ids[rows, shown],
                attention_mask[rows, shown],
                [generators[row] for row in bucket],
                CanvasState(state.canvas[rows], state.length[rows]),
                any_process,
                None if observer is None else partial(_report, observer, rows),
                None if bounds is None else bounds[rows].double(),
            )
            rollout.write()
            parts.append(rollout.trajectory())
    drawn = Trajectory.gather(parts, torch.tensor([row for bucket in buckets for row in bucket]).to(input_ids.device))
    return drawn if given is None or not given.any() else replace(drawn, given=given)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and back afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _uncompiled(model: torch.nn.Module) -> AbstractContextManager:
    """Run modules eagerly that were compiled in place, as DeepSpeed compiles them.

    `set_stance` is process-wide, for other threads too, so it is used only if something is compiled.
    """
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _report(observer: Observer, rows: torch.Tensor, commits: Commits) -> None:
    """Call the observer with the rows of the batch in place of those of a bucket; `rows` is long [bucket]."""
    observer(commits._replace(rows=rows[commits.rows]))


class _Rollout:
    """The growing canvases of one batch; rows may be at different blocks.

    `write` fills them, `trajectory` returns what was recorded on the way. A step works on R of the B rows, which
    `rows` (long [R]) names; the masked positions of their active blocks are given as `offsets` within the block,
    long [R, m], of which those count where `is_masked` (bool [R, m]) is true.
    """

    def __init__(
        self,
        model,
        family: DiffusionFamily,
        config: SamplingConfig,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generators: Sequence[np.random.Generator],
        state: CanvasState,
        any_process: Callable[[bool], bool] | None,
        observer: Observer | None,
        bounds: torch.Tensor | None,
    ):
        self.family, self.config, self.any_process, self.observer = family, config, any_process, observer
        self.bounds = bounds
        self.rule = RULES[config.unmasking]
        self.canvas, self.length = state.canvas.clone(), state.length
        self.block, unfinished = state.next_block(family, config.block_length)
        self.alive = unfinished.nonzero().squeeze(1)
        self.forwards = CACHE_CLASSES[config.cache_for(family)](
            model, family, config, input_ids, attention_mask, self.canvas, self.length
        )
        self._allocate_records(*self.canvas.shape)
        # All noise of a rollout is drawn here, with a shape that depends on the config alone: what a row is drawn
        # depends neither on the other rows nor on the order of the forwards. It is drawn block by block, so that a
        # block's does not depend on how many blocks follow: rows for the tokens, one that orders the positions, and
        # rows that draw them.
        tokens = config.steps_per_block if self.rule.redraws else 1
        kinds = (tokens, 1, config.steps_per_block if config.draws_positions else 0)
        noise = uniforms(generators, config.num_blocks, sum(kinds), config.block_length).to(self.canvas.device)
        self.token_noise, order_noise, position_noise = noise.split(kinds, dim=2)
        self.order_noise = order_noise.squeeze(2)
        self.position_noise = position_noise if config.draws_positions else None

    def _allocate_records(self, batch: int, length: int) -> None:
        config, device = self.config, self.canvas.device
        self.row_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.unmask_step = torch.full((batch, length), -1, dtype=torch.int32, device=device)
        self.logps = torch.zeros(batch, length, device=device)
        self.entropies = torch.zeros(batch, length, device=device)
        self.support: torch.Tensor | None = None
        if config.record_support and config.truncates:
            self.support = torch.full((batch, length, config.top_k), -1, dtype=torch.int32, device=device)
        self.step_entropy: torch.Tensor | None = None
        self.step_margin: torch.Tensor | None = None
        self.position_logps: torch.Tensor | None = None
        self.position_ranks: torch.Tensor | None = None
        if config.draws_positions:
            self.position_logps = torch.zeros(batch, length, device=device)
            self.position_ranks = torch.zeros(batch, length, dtype=torch.int32, device=device)
        self.forced: torch.Tensor | None = None
        if config.parallel:
            self.forced = torch.zeros(batch, config.denoising_steps, dtype=torch.bool, device=device)
        self.likeliest: LikeliestTokens | None = None
        if config.record_signals:
            self.likeliest = LikeliestTokens(self.canvas)
            self.step_entropy = torch.zeros(batch, config.denoising_steps, device=device)
            self.step_margin = torch.zeros(batch, config.denoising_steps, device=device)
        self.shifts = None if config.shift_window is None else ShiftRecorder(batch, config, device)

    def _any_rank(self, here: bool) -> bool:
        """All-reduced "any" over the ranks that share the weights; `here` alone if none do."""
        return here if self.any_process is None else self.any_process(here)

    def write(self) -> None:
        """Write until every text has ended or its canvas is full, on every rank that shares the weights."""
        while self._any_rank(self.alive.numel() > 0):
            self._write_block()

    def _write_block(self) -> None:
        """Commit what is left of the active block, then let the rows leave whose text has ended.

        Where ranks share the weights, each runs one forward per step, whether or not one of its rows needs it.
        """
        rows = self.forwards.batch_of(self.alive, self.block)
        self.forwards.begin_block(rows, self.block[rows] * self.config.block_length, self._any_rank)
        if self.shifts is not None:
            self.shifts.begin_block(rows)
        commits = self.config.commits()
        for step in range(len(commits)):
            offsets, is_masked = self._masked(rows)
            # With parallel unmasking a block can be written before its last step, but only if it is on every rank.
            if self.config.parallel and not self._any_rank(offsets.size(1) > 0):
                break
            min_commits = self._min_commits(is_masked.sum(1), sum(commits[step + 1 :]))
            if min_commits.any():
                active = self.forwards.active(is_masked, min_commits)
                self._write_step(rows[active], step, offsets[active], is_masked[active], min_commits[active])
            elif self.any_process is not None:
                self.forwards.sync_forward()
        ended = self.family.is_end(self.canvas[rows.unsqueeze(1), self._block_positions(rows)]).any(1)
        self.block[rows] += 1
        leave = ended | (self.block[rows] * self.config.block_length >= self.length[rows])
        self.alive = self.alive[~torch.isin(self.alive, rows[leave])]

    def _min_commits(self, num_masked: torch.Tensor, later: int) -> torch.Tensor:
        """Minimum number of tokens each row must commit now, long [R].

        Args:
            num_masked: long [R], masked positions of the row's block.
            later: tokens that the remaining steps of the block commit.

        A row that starts inside a block, or on a shorter canvas, has fewer masks than the schedule expects: it skips
        steps until what is left is its share. With parallel unmasking every row commits at least one token at once.
        """
        least = (num_masked - later).clamp(min=0)
        return torch.maximum(least, num_masked.clamp(max=1)) if self.config.parallel else least

    def _block_positions(self, rows: torch.Tensor) -> torch.Tensor:
        """Canvas positions [R, block] of the active blocks."""
        offsets = torch.arange(self.config.block_length, device=rows.device)
        return self.block[rows].unsqueeze(1) * self.config.block_length + offsets

    def _masked(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the masked positions of the active blocks: (offsets long [R, m], is_masked bool [R, m])."""
        positions = self._block_positions(rows)
        masked = self.canvas[rows.unsqueeze(1), positions] == self.family.mask_token_id
        masked &= positions < self.length[rows].unsqueeze(1)
        # A stable sort puts the masked positions first and keeps them from left to right; the columns after the most
        # that any row has are cut.
        order = masked.int().argsort(dim=1, descending=True, stable=True)
        most = int(masked.sum(1).max()) if rows.numel() else 0
        return order[:, :most], masked.gather(1, order)[:, :most]

    def _write_step(
        self,
        rows: torch.Tensor,
        step: int,
        offsets: torch.Tensor,
        is_masked: torch.Tensor,
        min_commits: torch.Tensor,
    ) -> None:
        """Choose positions, draw their tokens and commit them: at least `min_commits` [R] of each row."""
        self.row_forwards[rows] += 1
        logits = self._logits(rows, offsets) if self.config.reads_every_mask else None
        if self.shifts is not None:
            assert logits is not None
            self.shifts.observe(rows, self.block[rows] * self.config.block_length, offsets, is_masked, logits)
        choice = self.rule.choose(
            Candidates(
                is_masked,
                min_commits,
                order_noise=self.order_noise[rows, self.block[rows]].gather(1, offsets),
                logits=logits,
                bound=self.config.parallel_bound if self.bounds is None else self.bounds[rows].unsqueeze(1),
                leftmost=self.config.fallback == "leftmost",
                position_noise=self._position_noise(rows, step, offsets),
                position_temperature=self.config.position_temperature,
                draw=lambda logits: draw_everywhere(logits, self._noise(rows, step, offsets), self.config),
            )
        )
        chosen = offsets.gather(1, choice.slots)
        # Without logits of all candidates the LM head runs at the chosen positions only.
        at_chosen = self._logits(rows, chosen) if logits is None else take(logits, choice.slots)
        self._commit(rows, step, chosen, choice, self._tokens_at(rows, chosen, at_chosen, choice))
        at = (rows, self.block[rows] * self.config.steps_per_block + step)
        if self.forced is not None and choice.forced is not None:
            self.forced[at] = choice.forced
        if self.step_entropy is not None and self.step_margin is not None:
            assert logits is not None
            self.step_entropy[at], self.step_margin[at] = step_signals(logits, is_masked)
        if self.likeliest is not None:
            assert logits is not None
            row, slot = is_masked.nonzero(as_tuple=True)
            positions = self.block[rows[row]] * self.config.block_length + offsets[row, slot]
            self.likeliest.note(rows[row], positions, at[1][row], logits.argmax(-1)[row, slot])

    def _tokens_at(
        self, rows: torch.Tensor, chosen: torch.Tensor, logits: torch.Tensor, choice: Choice
    ) -> ScoredTokens:
        """Return tokens for the chosen positions: those that the rule drew to choose them, or new ones."""
        if choice.draws is None:
            # The noise of step 0 at whatever step: a position is drawn once, when it is committed. So the token of a
            # position does not depend on the order of the others, given the same canvas.
            return draw_scored(logits, self._noise(rows, 0, chosen), self.config)
        support = None if choice.draws.support is None else take(choice.draws.support, choice.slots)
        return score(logits, take(choice.draws.tokens, choice.slots), support, self.config)

    def _noise(self, rows: torch.Tensor, step: int, offsets: torch.Tensor) -> torch.Tensor:
        """Uniform noise for the tokens at offsets [R, n]; step 0 unless the rule draws anew at every step."""
        return self.token_noise[rows, self.block[rows], step].gather(1, offsets)

    def _position_noise(self, rows: torch.Tensor, step: int, offsets: torch.Tensor) -> torch.Tensor | None:
        """Uniform noise for the choice among offsets [R, m] at this step; `None` if positions are not drawn."""
        if self.position_noise is None:
            return None
        return self.position_noise[rows, self.block[rows], step].gather(1, offsets)

    def _logits(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.forwards.logits(rows, self.block[rows] * self.config.block_length, offsets)

    def _commit(
        self, rows: torch.Tensor, step: int, chosen: torch.Tensor, choice: Choice, drawn: ScoredTokens
    ) -> None:
        """Write the tokens that the choice commits of those drawn at offsets `chosen` [R, n], and record them."""
        slots = torch.arange(chosen.size(1), device=rows.device)
        row, slot = (slots < choice.counts.unsqueeze(1)).nonzero(as_tuple=True)
        block, drawn = self.block[rows[row]], drawn.pick(row, slot)
        where = (rows[row], block * self.config.block_length + chosen[row, slot])
        self.canvas[where] = drawn.tokens
        self.unmask_step[where] = (block * self.config.steps_per_block + step).int()
        self.logps[where] = drawn.logps
        self.entropies[where] = drawn.entropies
        if self.shifts is not None:
            self.shifts.wrote(rows[row], chosen[row, slot])
        if self.support is not None and drawn.support is not None:
            self.support[where] = drawn.support
        if self.observer is not None:
            self.observer(Commits(*where, self.unmask_step[where], drawn.tokens, drawn.logps))
        if choice.logps is not None and self.position_logps is not None and self.position_ranks is not None:
            self.position_logps[where] = choice.logps[row, slot]
            self.position_ranks[where] = slot.int()

    def trajectory(self) -> Trajectory:
        """Return what was written, with the tail id where nothing was."""
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
            row_units=self.forwards.row_units,
            forwards=self.forwards.forwards,
            sync_forwards=self.forwards.sync_forwards,
            prompt_columns=torch.full_like(self.row_forwards, self.forwards.input_ids.size(1)),
            confidence_shift=None if self.shifts is None else self.shifts.shift,
            forced=self.forced,
            position_logps=self.position_logps,
            position_ranks=self.position_ranks,
            settled_step=None
            if self.likeliest is None
            else self.likeliest.settled_step(self.canvas, self.unmask_step),
        )
