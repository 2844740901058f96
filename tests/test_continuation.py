"""Completions continued from partly denoised states: their distribution against enumeration, and what they cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest
import torch
from enumeration import enumerate_paths
from test_sampling import Enumeration, always, network, p_value
from tiny import END, MASK, TAIL, A, B, canvas_logits, coded_prompts, coded_row, forwards_of, tiny_model

from trl_diffusion.credit.step_aware_states import probe_state
from trl_diffusion.models import family_of
from trl_diffusion.sampling import CanvasState, SamplingConfig, Trajectory, row_generators, sample
from trl_diffusion.sampling.unmasking import RULES

ROWS = 20_000
KEPT, REJECTED = 1e-3, 1e-6  # p-values, as in test_sampling.py
PROMPT = [A, B]

# ------------------------------------------- the distribution of continued completions

ONE_BLOCK = SamplingConfig(4, 2, 4)
TWO_STEPS = SamplingConfig(6, 4, 3, temperature=1.2)  # commits 2, then 1
THREE_STEPS = SamplingConfig(6, 6, 3)
THREE_BLOCKS = SamplingConfig(6, 6, 2)
MAX_PROB, LOW_CONFIDENCE = (SamplingConfig(4, 4, 2, 1.4, unmasking=rule) for rule in ("max_prob", "low_confidence"))
TRUNCATED = SamplingConfig(4, 4, 2, temperature=1.4, top_k=3, top_p=0.8)


@cache
def exact(config: SamplingConfig) -> list[tuple[tuple, tuple, float]]:
    """(completion, unmask_step, probability) of every rollout, by brute force."""
    if config.unmasking == "random" and config.top_k == 0:
        with torch.no_grad():
            paths = enumerate_paths(
                tiny_model(3),
                PROMPT,
                config.canvas_length,
                config.block_length,
                config.steps_per_block,
                config.temperature,
            )
        return [(tuple(path.tokens), tuple(path.steps), path.probability.item()) for path in paths]
    return [(*cell, chance) for cell, chance in Enumeration(tiny_model(3), PROMPT, config).distribution().items()]


@cache
def rollouts(config: SamplingConfig) -> Trajectory:
    prompts = torch.tensor([PROMPT]).expand(ROWS, -1)
    return sample(tiny_model(3), prompts, None, config, [np.random.default_rng(2)] * ROWS)


def states(config: SamplingConfig, kind: str, point: int, masks: int = 64) -> CanvasState:
    points = torch.full((ROWS,), point)
    family = family_of(tiny_model(3))
    return probe_state(rollouts(config), family, kind, config.block_length, points, masks)


def continued(config: SamplingConfig, state: CanvasState) -> Trajectory:
    prompts = torch.tensor([PROMPT]).expand(len(state.canvas), -1)
    generators = [np.random.default_rng(3)] * len(state.canvas)
    return sample(tiny_model(3), prompts, None, config, generators, state=state)


def state_before(tokens: tuple, steps: tuple, step: int) -> tuple:
    return tuple(token if 0 <= own < step else MASK for token, own in zip(tokens, steps, strict=True))


def marginal(config: SamplingConfig) -> dict[tuple, float]:
    chances = defaultdict(float)
    for tokens, _, chance in exact(config):
        chances[tokens] += chance
    return chances


def joint(config: SamplingConfig, step: int) -> dict[tuple, float]:
    """Probability of each (canvas before a step, completion), one tuple."""
    chances = defaultdict(float)
    for tokens, steps, chance in exact(config):
        chances[state_before(tokens, steps, step) + tokens] += chance
    return chances


def counts(rows: torch.Tensor) -> Counter:
    unique, number = rows.unique(dim=0, return_counts=True)
    return Counter({tuple(row): count for row, count in zip(unique.tolist(), number.tolist(), strict=True)})


def check_continuations(config: SamplingConfig, state: CanvasState, step: int) -> None:
    """Marginally, given the states, and as fresh draws: continuations from the canvases before a step."""
    drawn = continued(config, state).completion_ids
    assert p_value(counts(drawn), marginal(config)) > KEPT
    # Returning the rollout, or ignoring its state, would pass so far.
    pairs = joint(config, step)
    assert p_value(counts(torch.cat([state.canvas, drawn], 1)), pairs) > KEPT
    assert p_value(counts(torch.cat([state.canvas, drawn.roll(1, 0)], 1)), pairs) < REJECTED
    of_state = defaultdict(float)
    for cell, chance in pairs.items():
        of_state[cell[: config.canvas_length]] += chance
    agreement = sum(chance**2 / of_state[cell[: config.canvas_length]] for cell, chance in pairs.items())
    agreed = (drawn == rollouts(config).completion_ids).all(1).double().mean().item()
    assert agreement < 0.95
    assert abs(agreed - agreement) < 4 * (agreement * (1 - agreement) / ROWS) ** 0.5


def every_step(configs: list[SamplingConfig]):
    return pytest.mark.parametrize(
        ("config", "step"),
        [
            pytest.param(
                config,
                step,
                id=f"{config.unmasking} {config.canvas_length}-{config.denoising_steps}-"
                f"{config.block_length}{' truncated' * (config.top_k > 0)}, step {step}",
            )
            for config in configs
            for step in range(1, config.denoising_steps)
        ],
    )


@pytest.mark.thorough
@pytest.mark.slow
@every_step([ONE_BLOCK, TWO_STEPS, THREE_STEPS, MAX_PROB, LOW_CONFIDENCE, TRUNCATED])
def test_kept_states_continue_as_the_rollout_does(config, step):
    state = states(config, "keep", step)
    completions, steps = rollouts(config).completion_ids[:2000].tolist(), rollouts(config).unmask_step[:2000].tolist()
    expected = [state_before(*row, step) for row in zip(completions, steps, strict=True)]
    assert state.canvas[:2000].tolist() == [list(canvas) for canvas in expected]
    assert (state.length == config.canvas_length).all()
    check_continuations(config, state, step)


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["the room left", 64])
@pytest.mark.parametrize(("config", "boundary"), [(THREE_BLOCKS, 1), (THREE_BLOCKS, 2), (MAX_PROB, 1), (TRUNCATED, 1)])
def test_block_boundaries_with_masks_for_all_the_room_continue_as_the_rollout_does(config, boundary, masks):
    room = config.canvas_length - boundary * config.block_length
    state = states(config, "block", boundary, room if masks == "the room left" else masks)
    assert (state.length == config.canvas_length).all()
    # Behind an ended text the finished blocks are the tail: nothing sampled, and nothing left to sample.
    finished = rollouts(config).completion_ids[:, : boundary * config.block_length]
    assert torch.equal(state.canvas[:, : boundary * config.block_length], finished)
    before = state.canvas.masked_fill((rollouts(config).unmask_step < 0), MASK)
    step = boundary * config.steps_per_block
    drawn = continued(config, state).completion_ids
    assert p_value(counts(drawn), marginal(config)) > KEPT
    assert p_value(counts(torch.cat([before, drawn], 1)), joint(config, step)) > KEPT


@pytest.mark.slow
def test_fewer_masks_than_room_are_another_distribution():
    state = states(THREE_BLOCKS, "block", 1, masks=2)
    assert (state.length == 4).all()
    first_blocks = defaultdict(float)
    for tokens, chance in marginal(THREE_BLOCKS).items():
        first_blocks[tokens[:4]] += chance
    drawn = continued(THREE_BLOCKS, state).completion_ids
    assert (drawn[:, 4:] == TAIL).all()
    assert p_value(counts(drawn[:, :4]), first_blocks) < REJECTED


@pytest.mark.slow
@pytest.mark.parametrize(("config", "step"), [(SamplingConfig(4, 4, 4), 2), (SamplingConfig(4, 4, 4), 3)])
def test_negative_control_prefixes_inside_a_block_are_rejected(config, step):
    assert p_value(counts(continued(config, states(config, "keep", step)).completion_ids), marginal(config)) > KEPT
    prefix = states(config, "prefix", step)
    assert (prefix.length == 4).all()  # so masks are not what is missing
    assert p_value(counts(continued(config, prefix).completion_ids), marginal(config)) < REJECTED


# ------------------------------------------- what a continuation costs

GRID = SamplingConfig(12, 6, 4)  # three blocks of two steps, each of which commits two tokens
TOKENS = {".": TAIL, "|": END, "a": A, "b": B, "?": MASK}


def written(*rows: tuple[str, int]) -> CanvasState:
    """States from canvases such as `ab??????????` and their lengths."""
    canvas = torch.tensor([[TOKENS[token] for token in text] for text, _ in rows])
    return CanvasState(canvas, torch.tensor([length for _, length in rows]))


COSTS = [  # canvas, length, forwards of the row, the tokens of each step of the grid that it samples
    ("????????????", 12, 6, [2, 2, 2, 2, 2, 2]),
    ("ab|a????????", 12, 0, [0, 0, 0, 0, 0, 0]),  # ended in a block before
    ("abaabbabaaab", 12, 0, [0, 0, 0, 0, 0, 0]),  # nothing is masked
    ("?b?a????????", 12, 5, [0, 2, 2, 2, 2, 2]),  # a step of the first block is done
    ("abaa?b??????", 12, 4, [0, 0, 1, 2, 2, 2]),  # three positions of the second block are left
    ("abaabbabaa?b", 12, 1, [0, 0, 0, 0, 0, 1]),  # one position is left: only the last step takes it
    ("abaa????????", 8, 2, [0, 0, 2, 2, 0, 0]),  # room for one block
    ("abaa????????", 6, 1, [0, 0, 0, 2, 0, 0]),  # room for half a block
    ("abaa|???????", 12, 2, [0, 0, 1, 2, 0, 0]),  # the block of an end is written to its end
    ("abaabbab????", 8, 0, [0, 0, 0, 0, 0, 0]),  # no room
]


def test_rows_take_part_only_in_the_forwards_they_need():
    model, (prompts, mask) = always(A, B), coded_prompts(len(COSTS))
    state = written(*[row[:2] for row in COSTS])
    before = state.canvas.clone()
    with forwards_of(model) as calls:
        trajectory = sample(model, prompts, mask, GRID, row_generators(0, rows=range(len(COSTS))), state=state)
    assert torch.equal(state.canvas, before)  # it is not written to
    assert trajectory.row_forwards.tolist() == [row[2] for row in COSTS]
    taking_part = [[coded_row(prompt) for prompt in call["input_ids"][:, :8]] for call in calls]
    # Each row starts in the first block with a mask, so rows at different blocks share a forward.
    assert taking_part == [[0, 4, 6, 8], [0, 3, 4, 5, 6, 7, 8], [0, 3, 4], [0, 3, 4], [0, 3], [0, 3]]
    assert trajectory.forwards == 6 and trajectory.sync_forwards == 0
    for row, (text, length, _, tokens) in enumerate(COSTS):
        steps = trajectory.unmask_step[row]
        assert [(steps == step).sum().item() for step in range(6)] == tokens
        kept = torch.tensor([token != "?" for token in text])
        assert torch.equal(trajectory.completion_ids[row][kept], before[row][kept])
        assert (steps[kept] == -1).all() and not trajectory.logps[row][kept].any()
        assert (trajectory.completion_ids[row, length:] == TAIL).all()
        assert not (trajectory.completion_ids[row] == MASK).any()


def test_rows_that_cannot_change_cost_nothing():
    model, (prompts, mask) = network(), coded_prompts(3)
    state = written(("ab|a????????", 12), ("abaabbabaaab", 12), ("abaabbab????", 8))
    with forwards_of(model) as calls:
        trajectory = sample(model, prompts, mask, GRID, row_generators(0, rows=range(3)), state=state)
    assert calls == [] and trajectory.forwards == 0 and not trajectory.row_forwards.any()
    expected = [
        [A, B, END, A] + [TAIL] * 8,
        [A, B, A, A, B, B, A, B, A, A, A, B],
        [A, B, A, A, B, B, A, B] + [TAIL] * 4,
    ]
    assert trajectory.completion_ids.tolist() == expected
    assert (trajectory.unmask_step == -1).all()


# ------------------------------------------- rows do not depend on each other, nor on what is not there


def mixed_states(model, rows: int) -> CanvasState:
    """States at different blocks, with gaps, of different lengths, some of texts that ended."""
    prompts, mask = coded_prompts(rows)
    drawn = sample(model, prompts, mask, GRID, row_generators(1, rows=range(rows)))
    point = torch.arange(rows) % 6
    length = torch.tensor([12, 10, 12, 8, 7, 12, 11])[torch.arange(rows) % 7]
    hidden = (drawn.unmask_step >= point.unsqueeze(1)) | (drawn.unmask_step < 0)
    hidden |= torch.arange(12) >= length.unsqueeze(1)
    return CanvasState(drawn.completion_ids.masked_fill(hidden, MASK), length)


def rows_of(state: CanvasState, rows: slice) -> CanvasState:
    return CanvasState(state.canvas[rows], state.length[rows])


@pytest.mark.parametrize("unmasking", RULES)
def test_mixed_batches_equal_rows_done_alone(unmasking):
    model, rows = network(), 28
    config = SamplingConfig(12, 6, 4, 1.2, unmasking=unmasking, record_signals=True)
    (prompts, mask), state = coded_prompts(rows), mixed_states(model, rows)
    together = sample(model, prompts, mask, config, row_generators(5, rows=range(rows)), state=state)
    assert {0, 1, 2, 3, 4} <= set(together.row_forwards.tolist())
    total = 0
    for row in range(rows):
        one = slice(row, row + 1)
        streams = row_generators(5, rows=[row])
        alone = sample(model, prompts[one], mask[one], config, streams, state=rows_of(state, one))
        for name in ("completion_ids", "unmask_step", "row_forwards"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[one]), name
        for name in ("logps", "entropies", "step_entropy", "step_margin"):
            torch.testing.assert_close(getattr(alone, name), getattr(together, name)[one], rtol=1e-4, atol=1e-5)
        total += alone.forwards
    assert together.forwards < total


@pytest.mark.parametrize("unmasking", RULES)
def test_a_row_on_fewer_masks_is_a_row_on_a_shorter_canvas(unmasking):
    model, rows = network(), 16
    prompts, mask = coded_prompts(rows)
    long = SamplingConfig(12, 6, 4, 1.2, unmasking=unmasking)
    short = SamplingConfig(8, 4, 4, 1.2, unmasking=unmasking)
    start = sample(model, prompts, mask, short, row_generators(1, rows=range(rows)))
    canvas = start.completion_ids.masked_fill((start.unmask_step >= 1) | (start.unmask_step < 0), MASK)
    eight, twelve = torch.full((rows,), 8), torch.full((rows,), 12)
    streams = row_generators(5, rows=range(rows))
    expected = sample(model, prompts, mask, short, streams, state=CanvasState(canvas, eight))
    state = CanvasState(torch.cat([canvas, torch.full((rows, 4), MASK)], 1), eight.clone())
    # One row with the whole canvas, so that the others' forwards have positions that they must not see.
    state.length[-1] = 12
    trajectory = sample(model, prompts, mask, long, row_generators(5, rows=range(rows)), state=state)
    assert torch.equal(trajectory.completion_ids[:-1, :8], expected.completion_ids[:-1])
    assert torch.equal(trajectory.unmask_step[:-1, :8], expected.unmask_step[:-1])
    torch.testing.assert_close(trajectory.logps[:-1, :8], expected.logps[:-1], rtol=1e-4, atol=1e-5)
    assert (trajectory.completion_ids[:-1, 8:] == TAIL).all()
    # negative control: seen whole, the same canvases go on differently
    streams = row_generators(5, rows=range(rows))
    whole = sample(model, prompts, mask, long, streams, state=CanvasState(state.canvas, twelve))
    sampled = expected.unmask_step >= 0
    assert (whole.logps[:, :8] - expected.logps)[sampled].abs().max() > 0.05
    torch.testing.assert_close(whole.logps[-1], trajectory.logps[-1], rtol=1e-4, atol=1e-5)


def test_log_probabilities_are_those_of_the_visible_canvas():
    model, rows = network(), 28
    (prompts, mask), state = coded_prompts(rows), mixed_states(model, rows)
    drawn = sample(model, prompts, mask, GRID, row_generators(5, rows=range(rows)), state=state)
    checked = hidden_matters = 0
    for row in range(rows):
        steps, length = drawn.unmask_step[row], int(state.length[row])
        for step in sorted(set(steps.tolist()) - {-1}):
            sampled_before = (steps >= 0) & (steps < step)
            canvas = torch.where(sampled_before, drawn.completion_ids[row], state.canvas[row])
            with torch.no_grad():
                seen = canvas_logits(model, prompts[row, None], mask[row, None], canvas[None, :length])[0]
                whole = canvas_logits(model, prompts[row, None], mask[row, None], canvas[None])[0]
            for position in (steps == step).nonzero().flatten().tolist():
                assert position < length and state.canvas[row, position] == MASK
                token = drawn.completion_ids[row, position]
                expected = seen[position].log_softmax(-1)[token].item()
                assert drawn.logps[row, position].item() == pytest.approx(expected, abs=2e-5)
                hidden_matters += abs(whole[position].log_softmax(-1)[token].item() - expected) > 0.05
                checked += 1
    assert checked > 60 and hidden_matters > 5


def test_the_network_runs_only_as_far_as_the_longest_row():
    model, (prompts, mask) = always(A, B), coded_prompts(2)
    state = written(("abaa????????", 8), ("????????????", 6))
    with forwards_of(model) as calls:
        sample(model, prompts, mask, GRID, row_generators(0, rows=range(2)), state=state)
    # rows that need each forward, and the longest of their canvases; the prompt has 8 positions
    assert [tuple(call["input_ids"].shape) for call in calls] == [(2, 16), (2, 16), (1, 14)]


@pytest.mark.parametrize("unmasking", RULES)
def test_a_block_that_is_cut_off_beside_a_row_with_more_to_write(unmasking):
    """The second row has four open positions in its block, the first three, behind which its canvas ends."""
    (prompts, mask), state = coded_prompts(2), written(("abaa????????", 7), ("????????????", 6))
    config = SamplingConfig(12, 6, 4, unmasking=unmasking)
    model = always(A, B)
    together = sample(model, prompts, mask, config, row_generators(0, rows=range(2)), state=state)
    assert [[(row == step).sum().item() for step in range(6)] for row in together.unmask_step] == [
        [0, 0, 1, 2, 0, 0],
        [2, 2, 0, 2, 0, 0],
    ]
    for row in range(2):
        one = slice(row, row + 1)
        alone = sample(
            model, prompts[one], mask[one], config, row_generators(0, rows=[row]), state=rows_of(state, one)
        )
        assert torch.equal(alone.completion_ids, together.completion_ids[one])
        assert torch.equal(alone.unmask_step, together.unmask_step[one])


def test_text_of_a_state_is_given_in_the_trajectory():
    prompts, mask = coded_prompts(2)
    state = written(("abaabbab????", 12), ("?b??????????", 12))
    drawn = sample(always(A, B), prompts, mask, GRID, row_generators(0, rows=range(2)), state=state)
    assert drawn.given is not None and torch.equal(drawn.given, state.canvas != MASK)
    assert torch.equal(drawn.completion_ids[drawn.given], state.canvas[drawn.given])
    assert (drawn.unmask_step[drawn.given] == -1).all() and (drawn.unmask_step[~drawn.given] >= 0).all()
    assert sample(always(A, B), prompts, mask, GRID, row_generators(0, rows=range(2))).given is None


# ------------------------------------------- where it starts


@pytest.mark.parametrize("unmasking", RULES)
def test_all_masked_states_are_where_rollouts_start(unmasking):
    model, rows = network(), 16
    prompts, mask = coded_prompts(rows)
    config = SamplingConfig(12, 6, 4, 1.2, top_k=3, top_p=0.9, unmasking=unmasking, record_signals=True)
    plain = sample(model, prompts, mask, config, row_generators(5, rows=range(rows)))
    empty = CanvasState.empty(rows, 12, MASK, torch.device("cpu"))
    assert empty.canvas.tolist() == [[MASK] * 12] * rows and empty.length.tolist() == [12] * rows
    given = sample(model, prompts, mask, config, row_generators(5, rows=range(rows)), state=empty)
    for name, value in vars(plain).items():
        other = getattr(given, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert (empty.canvas == MASK).all()
    assert plain.row_forwards.tolist() == plain.steps_taken.tolist()


@pytest.mark.parametrize(
    ("state", "shape"),
    [
        (CanvasState.empty(3, 12, MASK, torch.device("cpu")), r"\(3, 12\)"),
        (CanvasState.empty(2, 8, MASK, torch.device("cpu")), r"\(2, 8\)"),
        (CanvasState(torch.full((2, 12), MASK), torch.tensor([12])), r"\(1,\)"),
    ],
    ids=["rows", "canvas length", "lengths"],
)
def test_states_that_do_not_fit_are_refused(state, shape):
    prompts, mask = coded_prompts(2)
    with pytest.raises(ValueError, match=rf"state of shape \(2, 12\) \(prompts, canvas length\).*{shape}"):
        sample(network(), prompts, mask, GRID, row_generators(0, rows=range(2)), state=state)


# ------------------------------------------- sharded weights


@pytest.mark.parametrize(
    ("rows", "own"),
    [  # what this process holds, and the forwards that one of its rows needs
        ([("????????????", 12)], 6),
        ([("abaabbabaa?b", 12), ("ab|a????????", 12)], 1),
        ([("abaa????????", 8), ("abaa????????", 6)], 2),
        ([("ab|a????????", 12)], 0),
        ([("abaabbab????", 8), ("ab|a????????", 12)], 0),
        ([("abaa|???????", 12), ("?b?a????????", 12)], 6),
    ],
    ids=["all", "the last position", "short canvases", "none", "none, short", "mixed"],
)
def test_processes_run_the_same_number_of_forwards(rows, own):
    model, (prompts, mask) = always(A, B), coded_prompts(len(rows))

    def run(any_process=None):
        with forwards_of(model) as calls:
            streams = row_generators(0, rows=range(len(rows)))
            return sample(model, prompts, mask, GRID, streams, any_process, state=written(*rows)), len(calls)

    votes = []

    def three_blocks(here: bool) -> bool:
        """Some other process has three blocks to write."""
        votes.append(here)
        return len(votes) <= 3

    trajectory, calls = run(three_blocks)
    alone, calls_alone = run()
    assert votes[-1] is False and len(votes) == 4
    assert calls == trajectory.forwards == 6
    assert trajectory.sync_forwards == 6 - own
    assert calls_alone == alone.forwards == own and alone.sync_forwards == 0
    assert torch.equal(trajectory.completion_ids, alone.completion_ids)
    assert torch.equal(trajectory.unmask_step, alone.unmask_step)
    assert torch.equal(trajectory.row_forwards, alone.row_forwards)  # forwards that only keep step are nobody's
