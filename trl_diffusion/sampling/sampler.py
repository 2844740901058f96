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
from trl_diffusion.sampling.active_blocks import ActiveBlocks, to_device
from trl_diffusion.sampling.batching import prompt_buckets
from trl_diffusion.sampling.block_grid import BlockGrid
from trl_diffusion.sampling.caches import CACHE_CLASSES
from trl_diffusion.sampling.canvas import CanvasState
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.cost import prompt_share
from trl_diffusion.sampling.drawing import ScoredTokens, draw_everywhere, draw_scored, score
from trl_diffusion.sampling.observing import Commits, Observer
from trl_diffusion.sampling.positions import check_fits
from trl_diffusion.sampling.prompts import checked_prompts
from trl_diffusion.sampling.recording import Recorder
from trl_diffusion.sampling.static_windows import check_compiles, is_compiled
from trl_diffusion.sampling.trajectory import Trajectory
from trl_diffusion.sampling.unmasking import RULES, Candidates, Choice
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
            shapes of its forwards keep changing; `rollout_compile` of the config compiles those that can be.
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
            canvas have more positions than the model, the state has another shape, the model's attention does not
            allow the cache or the block length, or its steps cannot be compiled as the config asks.
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
    if config.rollout_compile:
        check_compiles(model, sharded=any_process is not None)
    config.check_bounds(bounds, batch)
    if batch:
        check_fits(model, max(lengths), int(state.length.max()), "this batch")
    grid = BlockGrid.of(family, config, input_ids, attention_mask, lengths, state)
    lengths, prompt_length = grid.lengths, grid.input_ids.size(1)
    # Where processes share the weights, all must run the same number of forwards, so their rows stay together.
    buckets = [list(range(batch))]
    if any_process is None and batch:
        buckets = prompt_buckets(lengths, grid.config.canvas_length, prompt_share(grid.config, family))
    parts = []
    with _evaluating(model), _uncompiled(model):
        for bucket in buckets:
            rows = torch.tensor(bucket, dtype=torch.long, device=input_ids.device)
            # The columns that are padding in every row of the bucket are cut.
            shown = slice(prompt_length - max((lengths[row] for row in bucket), default=0), None)
            rollout = _Rollout(
                model,
                family,
                grid.config,
                grid.input_ids[rows, shown],
                grid.attention_mask[rows, shown],
                [generators[row] for row in bucket],
                grid.state.rows(rows),
                any_process,
                None if observer is None else partial(_report, observer, rows, grid.moved),
                None if bounds is None else bounds[rows].double(),
            )
            rollout.write()
            parts.append(rollout.trajectory())
    drawn = Trajectory.gather(parts, torch.tensor([row for bucket in buckets for row in bucket]).to(input_ids.device))
    drawn = grid.completions(drawn, config.canvas_length)
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
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def _report(observer: Observer, rows: torch.Tensor, moved: torch.Tensor, commits: Commits) -> None:
    """Call the observer with rows of the batch and positions of the completion.

    Args:
        observer: to call.
        rows: long [bucket], the rows of the bucket.
        moved: long [B], tokens of each prompt that lie on its canvas.
        commits: with rows of the bucket and positions of the canvas.
    """
    found = rows[commits.rows]
    observer(commits._replace(rows=found, positions=commits.positions - moved[found]))


class _Rollout:
    """The growing canvases of one batch; rows may be at different blocks.

    `write` fills them, `trajectory` returns what was recorded on the way. The host never asks the device what follows
    from the start: which rows are at which block, and how many positions are masked there. It waits for the device at
    the end of a block, and with parallel unmasking once in a step for the number of tokens that it commits.
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
        self.family, self.config, self.any_process = family, config, any_process
        self.bounds = bounds
        self.rule = RULES[config.unmasking]
        # Prompts and canvases are one tensor, of which the forwards see columns and the sampler writes the canvas.
        tokens = torch.cat([input_ids, state.canvas], dim=1)
        self.canvas, self.length = tokens[:, input_ids.size(1) :], state.length.cpu().numpy()
        self.begin = state.begin
        block, unfinished = state.next_block(family, config.block_length)
        self.block, self.alive = block.cpu().numpy(), unfinished.nonzero().squeeze(1).cpu().numpy()
        self.num_masked = state.num_masked(family, config.block_length).cpu().numpy()
        self.end_token_ids = torch.tensor(family.end_token_ids, device=tokens.device)
        self.forwards = CACHE_CLASSES[config.cache_for(family)](
            model, family, config, tokens, attention_mask, self.length
        )
        self.records = Recorder(config, self.canvas, observer)
        # All noise of a rollout is drawn here, with a shape that depends on the config alone: what a row is drawn
        # depends neither on the other rows nor on the order of the forwards. It is drawn block by block, so that a
        # block's does not depend on how many blocks follow: rows for the tokens, one that orders the positions, and
        # rows that draw them.
        self.token_draws = config.steps_per_block if self.rule.redraws else 1
        draws = self.token_draws + 1 + (config.steps_per_block if config.draws_positions else 0)
        self.noise = uniforms(generators, config.num_blocks, draws, config.block_length).to(tokens.device)
        self.at = ActiveBlocks(self.alive[:0], self.block[:0], self.length[:0], self.noise)

    def _any_rank(self, here: bool) -> bool:
        """All-reduced "any" over the ranks that share the weights; `here` alone if none do."""
        return here if self.any_process is None else self.any_process(here)

    def write(self) -> None:
        """Write until every text has ended or its canvas is full, on every rank that shares the weights."""
        while self._any_rank(len(self.alive) > 0):
            self._write_block()

    def _write_block(self) -> None:
        """Commit what is left of the active block, then let the rows leave whose text has ended.

        Where ranks share the weights, each runs one forward per step, whether or not one of its rows needs it.
        """
        rows = self.forwards.batch_of(self.alive, self.block)
        self.forwards.begin_block(rows, self.block[rows] * self.config.block_length, self._any_rank)
        if self.records.shifts is not None:
            self.records.shifts.begin_block(to_device(rows, self.canvas.device))
        commits = self.config.commits()
        for step in range(len(commits)):
            num_masked = self.num_masked[rows, self.block[rows]]
            # With parallel unmasking a block can be written before its last step, but only if it is on every rank.
            if self.config.parallel and not self._any_rank(bool(num_masked.any())):
                break
            min_commits = self._min_commits(num_masked, sum(commits[step + 1 :]))
            if min_commits.any():
                active = self.forwards.active(num_masked, min_commits)
                self._look_at(rows[active])
                self._write_step(step, int(num_masked.max()), min_commits[active])
            elif self.any_process is not None:
                self.forwards.sync_forward()
        self.forwards.check_finite()
        self._look_at(rows)
        self.block[rows] += 1
        leave = self._ended() | (self.block[rows] * self.config.block_length >= self.length[rows])
        self.alive = self.alive[~np.isin(self.alive, rows[leave])]

    def _min_commits(self, num_masked: np.ndarray, later: int) -> np.ndarray:
        """Minimum number of tokens each row must commit now, long [R].

        Args:
            num_masked: long [R], masked positions of the row's block.
            later: tokens that the remaining steps of the block commit.

        A row that starts inside a block, or on a shorter canvas, has fewer masks than the schedule expects: it skips
        steps until what is left is its share. With parallel unmasking every row commits at least one token at once.
        """
        least = (num_masked - later).clip(min=0)
        return np.maximum(least, num_masked.clip(max=1)) if self.config.parallel else least

    def _look_at(self, rows: np.ndarray) -> None:
        """Let the next step write these rows (long [R]), at their active blocks."""
        # The steps of a block mostly write the same rows, and then nothing is copied to the device.
        if not self.at.are(rows, self.block[rows]):
            self.at = ActiveBlocks(rows, self.block[rows], self.length[rows], self.noise)

    def _ended(self) -> np.ndarray:
        """Return which of the active blocks hold an end token, bool [R]."""
        written = self.canvas[self.at.column, self.at.positions].unsqueeze(-1)
        ends = (written == self.end_token_ids).any(-1)
        if self.begin is not None:  # a prompt may hold end tokens, for example of an earlier turn
            ends &= self.at.positions >= self.begin[self.at.column]
        return ends.any(1).cpu().numpy()

    def _write_step(self, step: int, most: int, min_commits: np.ndarray) -> None:
        """Choose positions, draw their tokens and commit them.

        Args:
            step: of the block.
            most: m, the most masked positions that a block has.
            min_commits: long [R], how many tokens of each row to commit at least.
        """
        offsets, is_masked = self.at.masked(self.canvas, self.family.mask_token_id, most)
        logits = self.forwards.logits(self.at, offsets) if self.config.reads_every_mask else None
        self.records.see(self.at, step, offsets, is_masked, logits)
        choice = self.rule.choose(self._candidates(step, offsets, is_masked, logits, min_commits))
        chosen = offsets.gather(1, choice.slots)
        # Without logits of all candidates the LM head runs at the chosen positions only.
        at_chosen = self.forwards.logits(self.at, chosen) if logits is None else self.at.take(logits, choice.slots)
        self.records.commit(self.at, step, chosen, choice, self._tokens_at(chosen, at_chosen, choice))
        self.num_masked[self.at.rows, self.at.blocks] -= choice.counts

    def _candidates(
        self,
        step: int,
        offsets: torch.Tensor,
        is_masked: torch.Tensor,
        logits: torch.Tensor | None,
        min_commits: np.ndarray,
    ) -> Candidates:
        """Return what the rule chooses from: the masked positions among offsets [R, m]."""
        positions = self.token_draws + 1  # the first row of noise that draws positions
        return Candidates(
            is_masked,
            min_commits,
            order_noise=self.at.uniform(self.token_draws, offsets),
            logits=logits,
            bound=self.config.parallel_bound if self.bounds is None else self.bounds[self.at.column],
            leftmost=self.config.fallback == "leftmost",
            position_noise=self.at.uniform(positions + step, offsets) if self.config.draws_positions else None,
            position_temperature=self.config.position_temperature,
            draw=lambda logits: draw_everywhere(logits, self.at.uniform(step, offsets), self.config),
        )

    def _tokens_at(self, chosen: torch.Tensor, logits: torch.Tensor, choice: Choice) -> ScoredTokens:
        """Return tokens for the chosen positions: those that the rule drew to choose them, or new ones."""
        if choice.draws is None:
            # The noise of step 0 at whatever step: a position is drawn once, when it is committed. So the token of a
            # position does not depend on the order of the others, given the same canvas.
            return draw_scored(logits, self.at.uniform(0, chosen), self.config)
        support = None if choice.draws.support is None else self.at.take(choice.draws.support, choice.slots)
        return score(logits, choice.draws.tokens.gather(1, choice.slots), support, self.config)

    def trajectory(self) -> Trajectory:
        """Return what was written, with the tail id where nothing was."""
        records, device = self.records, self.canvas.device
        row_forwards = to_device(records.row_forwards, device)
        return Trajectory(
            completion_ids=self.canvas.masked_fill(
                self.canvas == self.family.mask_token_id, self.family.tail_token_id
            ),
            unmask_step=records.unmask_step,
            logps=records.logps,
            entropies=records.entropies,
            support=records.support,
            temperature=self.config.temperature,
            step_entropy=records.step_entropy,
            step_margin=records.step_margin,
            row_forwards=row_forwards,
            row_units=to_device(self.forwards.row_units, device),
            forwards=self.forwards.forwards,
            sync_forwards=self.forwards.sync_forwards,
            prompt_columns=torch.full_like(row_forwards, self.forwards.prompt_length),
            confidence_shift=None if records.shifts is None else records.shifts.shift,
            forced=None if records.forced is None else to_device(records.forced, device),
            position_logps=records.position_logps,
            position_ranks=records.position_ranks,
            settled_step=None
            if records.likeliest is None
            else records.likeliest.settled_step(self.canvas, records.unmask_step),
        )
