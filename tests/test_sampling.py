"""The sampler against brute force: which completions, in which order, with which probabilities, at which cost."""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations, product
from math import comb

import numpy as np
import pytest
import torch
from launching import SILENCE
from scipy.stats import chisquare
from tiny import (
    END,
    MASK,
    TAIL,
    A,
    B,
    canvas_logits,
    coded_prompts,
    coded_row,
    forwards_of,
    set_bias,
    tiny_model,
    tiny_sdar,
)
from transformers import TopKLogitsWarper, TopPLogitsWarper

from trl_diffusion.distribution import draw, truncate
from trl_diffusion.models import DreamModel, score_targets
from trl_diffusion.sampling import SamplingConfig, drawing, row_generators, sample
from trl_diffusion.sampling.cost import head_positions
from trl_diffusion.sampling.unmasking import RULES, Candidates, Choice, Rule
from trl_diffusion.streams import uniforms

WORD_IDS = range(4)
ENDS = {TAIL, END}
ROWS = 20_000
KEPT, REJECTED = 1e-3, 1e-6  # p-values: of the true distribution above the first, of a false one below the second
TRUE_POLICY = [rule for rule in RULES if rule != "low_confidence"]


# ------------------------------------------- brute force; shares no code with the sampler


def tempered(probabilities: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Temperature, then top-k, then top-p with the token that crosses it, of one distribution [V]."""
    weights = probabilities ** (1 / temperature)
    kept, mass = np.zeros_like(weights), 0.0
    order = np.argsort(-weights)[: top_k or None]
    for token in order:
        if mass < top_p:
            kept[token] = weights[token]
        mass += weights[token] / weights[order].sum()
    return kept / kept.sum()


def entropy_of(probabilities: np.ndarray) -> float:
    positive = probabilities[probabilities > 0]
    return -(positive * np.log(positive)).sum()


def margin_of(probabilities: np.ndarray) -> float:
    second, first = np.sort(probabilities)[-2:]
    return first - second


CERTAINTY = {"max_prob": np.max, "entropy": lambda probabilities: -entropy_of(probabilities), "margin": margin_of}


def most_certain(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` largest; refuses near ties, which two right programs may break differently."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert count == len(scores) or scores[order[count - 1]] - scores[order[count]] > 1e-5, "pick another model"
    return order[:count]


class Enumeration:
    """Every rollout on a canvas of two blocks of two positions, from the model's logits for all 5⁴ canvases."""

    def __init__(self, model, prompt: list[int], config: SamplingConfig):
        canvases = torch.tensor(list(product(range(5), repeat=4)))
        prompts = torch.tensor([prompt]).expand(len(canvases), -1)
        with torch.no_grad():
            logits = canvas_logits(model, prompts, torch.ones_like(prompts), canvases)
        table = logits.double().softmax(-1)[..., :4].numpy()
        self.probabilities = {tuple(canvas): row for canvas, row in zip(canvases.tolist(), table, strict=True)}
        self.config = config
        self.commits = [2] if config.denoising_steps == 2 else [1, 1]

    def policy(self, canvas: tuple[int, ...], position: int) -> np.ndarray:
        config = self.config
        return tempered(self.probabilities[canvas][position], config.temperature, config.top_k, config.top_p)

    def outcomes(self, seen: tuple[int, ...], masked: list[int], count: int):
        """({position: token}, probability) of all that a step may commit, having seen the canvas `seen`."""
        rule = self.config.unmasking
        if rule == "low_confidence":
            for tokens in product(WORD_IDS, repeat=len(masked)):
                chosen = most_certain(
                    [self.probabilities[seen][i][t] for i, t in zip(masked, tokens, strict=True)], count
                )
                chance = np.prod([self.policy(seen, i)[t] for i, t in zip(masked, tokens, strict=True)])
                yield {masked[j]: tokens[j] for j in chosen}, chance
            return
        if rule == "random":
            subsets = [(subset, 1 / comb(len(masked), count)) for subset in combinations(masked, count)]
        elif rule == "plackett_luce":
            subsets = [(order, self.in_order(seen, masked, order)) for order in permutations(masked, count)]
        else:
            scores = [CERTAINTY[rule](self.probabilities[seen][i]) for i in masked]
            subsets = [([masked[j] for j in most_certain(scores, count)], 1.0)]
        for subset, share in subsets:
            for tokens in product(WORD_IDS, repeat=count):
                chance = np.prod([self.policy(seen, i)[t] for i, t in zip(subset, tokens, strict=True)])
                yield dict(zip(subset, tokens, strict=True)), chance * share

    def in_order(self, seen: tuple[int, ...], masked: Sequence[int], order: Sequence[int]) -> float:
        """Probability of drawing these positions of the masked ones in this order."""
        weight = {i: self.probabilities[seen][i].max() ** (1 / self.config.position_temperature) for i in masked}
        chance = 1.0
        for position in order:
            chance *= weight[position] / sum(weight.values())
            del weight[position]
        return chance

    def distribution(self, stale: bool = False) -> dict[tuple, float]:
        """Probability of every (completion, unmask_step); `stale` shows each step the canvas of the step before."""
        empty = (MASK,) * 4
        alive, finished = {(empty, (-1,) * 4, empty): 1.0}, defaultdict(float)
        for block, (step_in_block, count) in product(range(2), enumerate(self.commits)):
            step, positions = block * len(self.commits) + step_in_block, (2 * block, 2 * block + 1)
            following = defaultdict(float)
            for (canvas, steps, before), chance in alive.items():
                masked = [i for i in positions if canvas[i] == MASK]
                for written, factor in self.outcomes(before if stale else canvas, masked, count):
                    new_canvas = tuple(written.get(i, token) for i, token in enumerate(canvas))
                    new_steps = tuple(step if i in written else old for i, old in enumerate(steps))
                    following[new_canvas, new_steps, canvas] += chance * factor
            alive = following
            if step_in_block == len(self.commits) - 1:
                for canvas, steps, before in list(alive):
                    if block == 1 or ENDS & {canvas[i] for i in positions}:
                        completion = tuple(TAIL if token == MASK else token for token in canvas)
                        finished[completion, steps] += alive.pop((canvas, steps, before))
        assert not alive
        assert sum(finished.values()) == pytest.approx(1)
        return {cell: chance for cell, chance in finished.items() if chance > 0}

    def rescored(self, late: int = 0) -> dict[tuple, float]:
        """The same rollouts, each token's probability taken from the canvas `late` steps after its own."""
        return {cell: self._rescore(*cell, late) for cell in self.distribution()}

    def _rescore(self, tokens, steps, late: int) -> float:
        chance = 1.0
        if self.config.unmasking == "random" and len(self.commits) == 2:
            chance = 0.5 ** (sum(step >= 0 for step in steps) // 2)  # the order inside of each block
        for position, step in enumerate(steps):
            if step >= 0:
                shown = [0 <= other < step + late for other in steps]
                canvas = tuple(token if show else MASK for token, show in zip(tokens, shown, strict=True))
                if self.config.unmasking == "plackett_luce":
                    block = range(position // 2 * 2, position // 2 * 2 + 2)
                    chance *= self.in_order(canvas, {position, *(i for i in block if not shown[i])}, [position])
                chance *= self.policy(canvas, position)[tokens[position]]
        return chance


def p_value(observed: Counter, expected: dict[tuple, float]) -> float:
    """χ² of observed counts against cell probabilities; the rarest cells are pooled until 10 are expected."""
    if set(observed) - {cell for cell, chance in expected.items() if chance > 0}:
        return 0.0
    scale = sum(observed.values()) / sum(expected.values())
    counts, expectations, count, expectation = [], [], 0, 0.0
    for cell in sorted(expected, key=expected.__getitem__):
        count, expectation = count + observed[cell], expectation + expected[cell] * scale
        if expectation >= 10:
            counts, expectations = [*counts, count], [*expectations, expectation]
            count, expectation = 0, 0.0
    counts[-1], expectations[-1] = counts[-1] + count, expectations[-1] + expectation
    return chisquare(counts, expectations).pvalue


# ------------------------------------------- the joint distribution of completions and orders

PROMPT = [A, B]


def small(unmasking: str = "random", steps: int = 4, top_k: int = 0, top_p: float = 1.0) -> SamplingConfig:
    return SamplingConfig(4, steps, 2, temperature=1.4, top_k=top_k, top_p=top_p, unmasking=unmasking)


@cache
def enumerated(config: SamplingConfig) -> Enumeration:
    return Enumeration(tiny_model(3), PROMPT, config)


@cache
def sampled(config: SamplingConfig) -> tuple[Counter, dict[tuple, float]]:
    """Counts of (completion, unmask_step) in 20,000 rollouts, and exp Σ of the recorded log-probabilities."""
    prompts = torch.tensor([PROMPT]).expand(ROWS, -1)
    trajectory = sample(tiny_model(3), prompts, None, config, [np.random.default_rng(1)] * ROWS)
    rows = torch.cat([trajectory.completion_ids, trajectory.unmask_step], dim=1)
    unique, inverse, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    logps = trajectory.logps.sum(1)
    if trajectory.position_logps is not None:
        logps = logps + trajectory.position_logps.sum(1)
    recorded = torch.empty(len(unique)).scatter(0, inverse, logps).exp().tolist()
    cells = [(tuple(row[:4]), tuple(row[4:])) for row in unique.tolist()]
    return Counter(dict(zip(cells, counts.tolist(), strict=True))), dict(zip(cells, recorded, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 0.8)])
@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("unmasking", RULES)
def test_completions_and_orders_have_the_enumerated_distribution(unmasking, steps, top_k, top_p):
    config = small(unmasking, steps, top_k, top_p)
    observed, _ = sampled(config)
    assert p_value(observed, enumerated(config).distribution()) > KEPT
    early = sum(count for (_, unmask_step), count in observed.items() if unmask_step[2] == -1)
    assert 0.1 < early / ROWS < 0.9  # rows of both kinds: ended in the first block, and written to the end
    if top_k:
        assert p_value(observed, enumerated(small(unmasking, steps)).distribution()) < REJECTED
    else:
        assert len(observed) > 60
        assert p_value(observed, enumerated(small(unmasking, steps, top_k=3, top_p=0.8)).distribution()) < REJECTED


@pytest.mark.slow
@pytest.mark.parametrize("unmasking", TRUE_POLICY)
def test_recorded_log_probabilities_are_the_behaviour(unmasking):
    config = small(unmasking)
    (_, recorded), exact = sampled(config), enumerated(config).distribution()
    blocks = {cell: sum(step >= 0 for step in cell[1]) // 2 for cell in recorded}
    order = 0.5 if unmasking == "random" else 1.0
    for cell, chance in recorded.items():
        assert chance * order ** blocks[cell] == pytest.approx(exact[cell], rel=1e-4)
    assert enumerated(config).rescored() == pytest.approx(exact)


@pytest.mark.slow
def test_low_confidence_is_not_the_policy_it_records():
    config = small("low_confidence")
    observed, recorded = sampled(config)
    assert p_value(observed, enumerated(small("max_prob")).distribution()) < REJECTED
    # its own record, as if that were the behaviour; what is left of the mass belongs to rollouts not seen
    rest = {("not seen",): max(1 - sum(recorded.values()), 1e-9)}
    assert p_value(observed, recorded | rest) < REJECTED
    honest, honest_record = sampled(small("max_prob"))
    assert p_value(honest, honest_record | {("not seen",): 1 - sum(honest_record.values())}) > KEPT


@pytest.mark.slow
@pytest.mark.parametrize("unmasking", TRUE_POLICY)
def test_states_one_step_off_are_rejected(unmasking):
    config = small(unmasking)
    observed, _ = sampled(config)
    assert p_value(observed, enumerated(config).rescored(late=1)) < REJECTED
    assert p_value(observed, enumerated(config).rescored(late=-1)) < REJECTED
    assert p_value(observed, enumerated(config).distribution(stale=True)) < REJECTED


@pytest.mark.slow
def test_rows_with_streams_of_their_own_have_the_same_distribution():
    config = small("max_prob", steps=2)
    prompts = torch.tensor([PROMPT]).expand(ROWS, -1)
    trajectory = sample(tiny_model(3), prompts, None, config, row_generators(7, rows=range(ROWS)))
    rows = torch.cat([trajectory.completion_ids, trajectory.unmask_step], dim=1).tolist()
    assert p_value(Counter((tuple(row[:4]), tuple(row[4:])) for row in rows), enumerated(config).distribution()) > KEPT


# ------------------------------------------- what is recorded of each token


FAMILIES = ["llada", "dream"]


def network(family: str = "llada", **overrides):
    """Seeds picked so that texts end in different blocks and differ between prompts."""
    if family == "llada":
        return tiny_model(5, 10.0, **overrides)
    return tiny_model(2, 10.0, DreamModel, **overrides)


def rollout(model, config: SamplingConfig, rows: int = 16, seed: int = 0):
    prompts, mask = coded_prompts(rows)
    return sample(model, prompts, mask, config, row_generators(seed, rows=range(rows)))


def canvas_before(trajectory, step: int) -> torch.Tensor:
    hidden = (trajectory.unmask_step >= step) | (trajectory.unmask_step < 0)
    return torch.where(hidden, MASK, trajectory.completion_ids)


def distributions(model, trajectory, step: int) -> np.ndarray:
    """[B, L, V] probabilities at temperature 1 given each row's canvas before a step, by the ordinary forward."""
    prompts, mask = coded_prompts(len(trajectory.completion_ids))
    with torch.no_grad():
        logits = canvas_logits(model, prompts, mask, canvas_before(trajectory, step))
    return logits.double().softmax(-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.6, 0, 1.0), (1.5, 3, 0.8), (1.5, 9, 0.9), (0.0, 3, 1.0)]
)
@pytest.mark.parametrize("unmasking", RULES)
def test_logps_entropies_and_support_of_every_token(family, temperature, top_k, top_p, unmasking):
    model = network(family)
    config = SamplingConfig(8, 4, 4, temperature, top_k, top_p, unmasking)
    trajectory = rollout(model, config, rows=192)
    assert trajectory.temperature == temperature
    assert (trajectory.support is None) == (top_k == 0 or temperature == 0)
    off_by_a_step = 0.0
    for step in range(4):
        probabilities = distributions(model, trajectory, step)
        stale = distributions(model, trajectory, step - 1) if step else probabilities
        for row, position in (trajectory.unmask_step == step).nonzero().tolist():
            policy = probabilities[row, position]
            if temperature > 0:
                policy = tempered(policy, temperature, top_k, top_p)
            token = trajectory.completion_ids[row, position]
            logp = trajectory.logps[row, position].item()
            assert logp == pytest.approx(np.log(policy[token]), abs=2e-5)
            assert trajectory.entropies[row, position].item() == pytest.approx(entropy_of(policy), abs=2e-5)
            off_by_a_step = max(off_by_a_step, abs(logp - np.log(stale[row, position, token])))
            if trajectory.support is not None:
                support = trajectory.support[row, position].tolist()
                assert len(support) == top_k
                assert sorted(i for i in support if i >= 0) == np.flatnonzero(policy).tolist()
    assert off_by_a_step > 0.05
    filled = trajectory.unmask_step < 0
    assert temperature == 0 or (filled.any() and not filled.any(1).all())  # some rows ended early, some did not
    assert not trajectory.logps[filled].any() and not trajectory.entropies[filled].any()
    assert trajectory.support is None or (trajectory.support[filled] == -1).all()


@pytest.mark.parametrize("unmasking", CERTAINTY)
def test_the_most_certain_positions_at_temperature_one_are_committed(unmasking):
    model = network()
    trajectory = rollout(model, SamplingConfig(8, 4, 4, 1.8, 3, 0.9, unmasking), rows=32)
    tempered_rule_differs = 0
    for step in range(4):
        probabilities, block = distributions(model, trajectory, step)[..., :4], range(step // 2 * 4, step // 2 * 4 + 4)
        for row in range(32):
            steps = trajectory.unmask_step[row].tolist()
            chosen = [i for i in block if steps[i] == step]
            rest = [i for i in block if steps[i] > step]
            if chosen and rest:
                score = {i: CERTAINTY[unmasking](probabilities[row, i]) for i in block}
                assert min(score[i] for i in chosen) > max(score[i] for i in rest) - 1e-5
                tempered_score = {i: CERTAINTY[unmasking](tempered(probabilities[row, i], 1.8, 3, 0.9)) for i in block}
                tempered_rule_differs += min(tempered_score[i] for i in chosen) < max(tempered_score[i] for i in rest)
    assert tempered_rule_differs > 3


@pytest.mark.parametrize("unmasking", RULES)
def test_step_signals_equal_brute_force_and_change_nothing(unmasking):
    model = network()
    plain = SamplingConfig(8, 4, 4, 1.3, unmasking=unmasking)
    trajectory = rollout(model, SamplingConfig(8, 4, 4, 1.3, unmasking=unmasking, record_signals=True))
    without = rollout(model, plain)
    assert without.step_entropy is None and without.step_margin is None
    assert torch.equal(trajectory.completion_ids, without.completion_ids)
    assert torch.equal(trajectory.unmask_step, without.unmask_step)
    assert torch.allclose(trajectory.logps, without.logps, atol=1e-5)
    for step in range(4):
        probabilities, canvas = distributions(model, trajectory, step), canvas_before(trajectory, step)
        block = slice(step // 2 * 4, step // 2 * 4 + 4)
        for row in range(16):
            entropy = margin = 0.0
            if step < trajectory.steps_taken[row]:
                masked = probabilities[row, block][canvas[row, block] == MASK]
                assert len(masked) == 4 - 2 * (step % 2)
                entropy, margin = np.mean([[entropy_of(p), margin_of(p)] for p in masked], axis=0)
            assert trajectory.step_entropy[row, step].item() == pytest.approx(entropy, abs=1e-5)
            assert trajectory.step_margin[row, step].item() == pytest.approx(margin, abs=1e-5)


# ------------------------------------------- one draw


def test_top_p_keeps_the_token_that_crosses_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    log_probs, ids = truncate(logits, 1.0, 4, 0.6)
    assert ids.tolist() == [0, 1, -1, -1]
    assert log_probs.exp().tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert truncate(logits, 1.0, 4, 0.49)[1].tolist() == [0, -1, -1, -1]
    assert truncate(logits, 1.0, 4, 1e-9)[1].tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.99, 1.0])
def test_truncation_equals_transformers(top_p):
    logits = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(20)(None, logits / 0.8)) if top_p < 1 else None
    scores = TopKLogitsWarper(20)(None, logits / 0.8) if scores is None else scores
    log_probs, ids = truncate(logits, 0.8, 20, top_p)
    ours = torch.zeros(200, 51).scatter(1, ids.long() % 51, log_probs.exp())  # -1 goes to a column of its own
    assert torch.allclose(ours[:, :50], scores.softmax(-1), atol=1e-6)
    assert torch.equal(ours[:, :50] > 0, scores > -torch.inf)


def test_ties_at_the_kth_place_are_settled_by_the_recorded_support():
    logits = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])  # three ids share the third place
    log_probs, ids = truncate(logits, 0.5, 3, 1.0)
    tied = {0, 2, 4}
    assert len(tied & set(ids.tolist())) == 1
    for token in range(5):
        score = score_targets(logits, torch.tensor(token), 0.5, ids)[0]
        recorded = log_probs[ids == token]
        assert score.item() == (pytest.approx(recorded.item(), abs=1e-6) if len(recorded) else -np.inf)
    assert (TopKLogitsWarper(3)(None, logits[None]) > -torch.inf).all()  # without a record, all five would count


def test_draw_frequencies():
    probabilities = [0.1, 0.0, 0.35, 0.55, 0.0]
    log_probs = torch.tensor(probabilities).log().expand(ROWS, -1)
    grid = (torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS
    assert draw(log_probs.exp(), grid).bincount(minlength=5).tolist() == [2000, 0, 7000, 11000, 0]
    counts = Counter(draw(log_probs.exp(), torch.from_numpy(np.random.default_rng(0).random(ROWS))).tolist())
    assert p_value(counts, dict(enumerate(probabilities))) > KEPT
    assert p_value(counts, {0: 0.12, 2: 0.35, 3: 0.53}) < REJECTED


@pytest.mark.parametrize("size", [512, 513, 5000, 126_464])
def test_draw_inverts_the_cumulative_distribution(size):
    probabilities = torch.randn(size, generator=torch.Generator().manual_seed(0)).softmax(0)
    probabilities[::7] = 0.0
    uniform = torch.from_numpy(np.random.default_rng(0).random(2000))
    drawn = draw(probabilities.expand(2000, -1), uniform)
    assert (probabilities[drawn] > 0).all() and drawn.unique().numel() > 200
    cumulative = probabilities.double().cumsum(0)
    point, upper = uniform * cumulative[-1], cumulative[drawn]
    lower = upper - probabilities[drawn].double()
    # sums of parts are float32: the ends of a token's share of the unit interval are off by their rounding
    assert (lower - 1e-6 < point).all() and (point < upper + 1e-6).all()
    off = torch.searchsorted(cumulative, point, right=True) != drawn
    assert off.sum() <= (0 if size <= 512 else 4)


@pytest.mark.parametrize("total", [0.0, -1e-4, 1e-4])
def test_draw_never_returns_an_impossible_index(total):
    """`total` is the log of the sum that float32 rounding leaves instead of 1."""
    logits = torch.randn(126_464, generator=torch.Generator().manual_seed(0)) * 4
    logits[:7], logits[-1000:], logits[5000:6000] = -torch.inf, -torch.inf, -torch.inf
    log_probs = logits.log_softmax(-1) + total
    extreme = torch.tensor([0.0, 2.0**-1074, 0.5, 1 - 2.0**-24, np.nextafter(1, 0), 1.0], dtype=torch.float64)
    drawn = draw(log_probs.exp().expand(len(extreme), -1), extreme)
    assert log_probs[drawn].isfinite().all()
    assert drawn[0] == 7 and drawn[-1] == 126_464 - 1001
    if total < 0:  # what inverting without care does
        assert torch.searchsorted(log_probs.exp().double().cumsum(0), extreme[-1], right=True) == 126_464


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (1.0, 8)])
@pytest.mark.parametrize("unmasking", RULES)
def test_mask_and_unused_ids_are_never_sampled(temperature, top_k, unmasking):
    model = network(vocab_size=8, num_tokens=5)
    with torch.no_grad():  # whatever the hidden state, one of 5 and 6 is likely, and so is one of mask and 7
        direction = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 15
        model.lm_head.weight[5:7] = torch.stack([direction, -direction])
        model.lm_head.weight[[MASK, 7]] = torch.stack([direction.flip(0), -direction.flip(0)])
        prompts, mask = coded_prompts(16)
        likely = model(input_ids=prompts, attention_mask=mask).logits.argmax(-1)[mask == 1]
    assert (likely >= MASK).float().mean() > 0.9
    trajectory = rollout(model, SamplingConfig(8, 4, 4, temperature, top_k, unmasking=unmasking))
    assert trajectory.completion_ids.max() < MASK
    assert trajectory.support is None or trajectory.support.max() < MASK
    sampled_logps = trajectory.logps[trajectory.unmask_step >= 0]
    assert sampled_logps.isfinite().all() and (sampled_logps <= 0).all()


# ------------------------------------------- private random streams


def test_streams_are_keyed_by_everything():
    keys = [(seed, purpose, number) for seed in (1, 2, 1 + 2**32) for purpose in (0, 1) for number in (0, 1, 300)]
    firsts = {row_generators(*key, rows=[row])[0].random() for key in keys for row in range(4)}
    assert len(firsts) == 4 * len(keys)
    assert row_generators(1, 2, rows=[5, 3])[1].random() == row_generators(1, 2, rows=[3])[0].random()
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1 + 2**32)]
    assert len({torch.rand((), generator=seed).item() for seed in seeds}) == 1  # why torch's generator is not used


@pytest.mark.slow
def test_streams_of_neighbouring_rows_are_independent():
    noise = uniforms(row_generators(3, 1, rows=range(ROWS)), 2)
    assert noise.dtype == torch.float64 and noise.shape == (ROWS, 2)
    cells = (noise * 5).long()
    uniform = {pair: 1.0 for pair in product(range(5), repeat=2)}
    assert p_value(Counter(map(tuple, cells.tolist())), uniform) > KEPT
    assert p_value(Counter(zip(cells[1:, 0].tolist(), cells[:-1, 0].tolist(), strict=True)), uniform) > KEPT
    repeated = uniforms(row_generators(3, 1, rows=(row // 2 for row in range(ROWS))), 2)[:, 0].mul(5).long()
    pairs = Counter(zip(repeated[1:].tolist(), repeated[:-1].tolist(), strict=True))
    assert p_value(pairs, uniform) < REJECTED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unmasking", RULES)
def test_a_row_depends_on_its_prompt_and_stream_alone(unmasking, family):
    model, rows = network(family), 12
    config = SamplingConfig(8, 4, 4, 1.3, top_k=3, top_p=0.95, unmasking=unmasking)
    prompts, mask = coded_prompts(rows)

    def run(order: list[int], columns: slice = slice(None), streams: list[int] | None = None):
        generators = row_generators(5, rows=order if streams is None else streams)
        return sample(model, prompts[order, columns], mask[order, columns], config, generators)

    def agree(trajectory, order: list[int]) -> bool:
        same = torch.equal(trajectory.completion_ids, together.completion_ids[order])
        same &= torch.equal(trajectory.unmask_step, together.unmask_step[order])
        return same and torch.allclose(trajectory.logps, together.logps[order], atol=1e-5)

    together = run(list(range(rows)))
    shuffled = [7, 2, 11, 0, 5, 3, 10, 1, 9, 4, 8, 6]
    assert agree(run(shuffled), shuffled)
    assert agree(run([3, 8, 3]), [3, 8, 3])
    for row in range(rows):  # alone, without the padding
        assert agree(run([row], slice(row % 4, None)), [row])
    assert not agree(run(shuffled, streams=list(range(rows))), shuffled)  # streams by place in the batch
    other = run(list(range(rows)), streams=[row + 100 for row in range(rows)])
    assert not agree(other, list(range(rows)))


def global_states() -> tuple:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_sampling_leaves_the_global_random_state_alone():
    model, prompts = network(), torch.tensor([[A, B]] * 4)
    before = global_states()
    for unmasking in RULES:
        rollout(model, SamplingConfig(4, 4, 2, unmasking=unmasking))
    model.generate(
        prompts, max_new_tokens=4, block_length=2, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert global_states() == before
    model.generate(prompts, max_new_tokens=4, block_length=2, temperature=1.0)  # asked to use the global one
    assert global_states() != before


def test_generate_is_reproducible_from_its_generator():
    model = network()
    prompts, mask = coded_prompts(8)

    def run(seed: int, **kwargs):
        settings = dict(max_new_tokens=8, denoising_steps=4, block_length=4, temperature=1.0, unmasking="random")
        return model.generate(prompts, mask, generator=torch.Generator().manual_seed(seed), **settings | kwargs)

    first = run(0)
    assert first.shape == (8, 16) and torch.equal(first[:, :8], prompts)
    assert torch.equal(run(0), first)
    assert not torch.equal(run(1), first)
    trajectory = run(0, return_trajectory=True)
    ended = (torch.isin(trajectory.completion_ids, torch.tensor([TAIL, END])).cumsum(1) > 0).roll(1, 1)
    ended[:, 0] = False
    assert torch.equal(trajectory.completion_ids.masked_fill(ended, TAIL), first[:, 8:])
    assert torch.equal(run(0, temperature=0.0, unmasking="max_prob"), run(1, temperature=0.0, unmasking="max_prob"))
    assert run(0, denoising_steps=None, return_trajectory=True).unmask_step.max() == 3  # half the canvas


# ------------------------------------------- the network's mode


def test_sampling_runs_in_evaluation_mode_without_autograd():
    model = network(attention_dropout=0.5)
    config = SamplingConfig(8, 4, 4)
    expected = rollout(model.eval(), config)
    model.train()
    modes = []
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, _: modes.append((module.training, torch.is_grad_enabled()))
    )
    trajectory = rollout(model, config)
    handle.remove()
    assert set(modes) == {(False, False)}
    assert torch.equal(trajectory.completion_ids, expected.completion_ids)
    assert torch.allclose(trajectory.logps, expected.logps, atol=1e-6)
    assert not trajectory.logps.requires_grad and not trajectory.entropies.requires_grad
    assert model.training and model.model.layers[1].training and torch.is_grad_enabled()
    prompts, mask = coded_prompts(4)
    noisy = [model(input_ids=prompts, attention_mask=mask).logits for _ in range(2)]
    assert not torch.allclose(*noisy, atol=1e-2)  # dropout was there to be seen
    rollout(model.eval(), config)
    assert not model.training


def test_training_mode_is_restored_when_the_network_raises():
    model = network().train()

    def fail(*_):
        raise RuntimeError("out of memory")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        rollout(model, SamplingConfig(8, 4, 4))
    assert model.training and model.lm_head.training


# ------------------------------------------- greedy


def greedy(model, prompt: torch.Tensor, mask: torch.Tensor, unmasking: str) -> tuple[list[int], list[int]]:
    """Canvas of 8, blocks of 4, two tokens per step, one row, written out by hand."""
    canvas, steps = [MASK] * 8, [-1] * 8
    for step in range(4):
        start = step // 2 * 4
        if start and ENDS & set(canvas[start - 4 : start]):
            break
        with torch.no_grad():
            logits = canvas_logits(model, prompt[None], mask[None], torch.tensor([canvas]))[0]
        probabilities = logits.double().softmax(-1).numpy()[:, :4]
        masked = [i for i in range(start, start + 4) if canvas[i] == MASK]
        rule = CERTAINTY["max_prob" if unmasking == "low_confidence" else unmasking]
        for j in most_certain([rule(probabilities[i]) for i in masked], 2):
            canvas[masked[j]], steps[masked[j]] = int(probabilities[masked[j]].argmax()), step
    return [TAIL if token == MASK else token for token in canvas], steps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unmasking", ["max_prob", "entropy", "margin", "low_confidence"])
def test_greedy_equals_a_loop_written_by_hand(unmasking, family):
    model = network(family)
    prompts, mask = coded_prompts(32)
    trajectory = rollout(model, SamplingConfig(8, 4, 4, 0.0, unmasking=unmasking), rows=32)
    expected = [greedy(model, *row, unmasking) for row in zip(prompts, mask, strict=True)]
    assert trajectory.completion_ids.tolist() == [tokens for tokens, _ in expected]
    assert trajectory.unmask_step.tolist() == [steps for _, steps in expected]
    assert len({tuple(tokens) for tokens, _ in expected}) > 3
    warm = rollout(model, SamplingConfig(8, 4, 4, 1.0, unmasking=unmasking), rows=32)
    assert warm.completion_ids.tolist() != [tokens for tokens, _ in expected]


def test_greedy_in_random_order_commits_modes():
    model = network()
    trajectory = rollout(model, SamplingConfig(8, 4, 4, 0.0))
    for step in range(4):
        modes = distributions(model, trajectory, step).argmax(-1)
        now = (trajectory.unmask_step == step).numpy()
        assert (trajectory.completion_ids.numpy() == modes)[now].all()


# ------------------------------------------- rows that end, and the cost


def test_finished_rows_leave_the_batch():
    model, rows = network(), 32
    with forwards_of(model) as calls:
        trajectory = rollout(model, SamplingConfig(12, 6, 4, 1.3), rows)
    blocks = trajectory.completion_ids.view(rows, 3, 4)
    ended = [[bool(ENDS & set(block)) for block in row] for row in blocks.tolist()]
    expected = [[row for row in range(rows) if not any(ended[row][:block])] for block in (0, 0, 1, 1, 2, 2)]
    assert len(expected[0]) == rows and 0 < len(expected[4]) < len(expected[2]) < rows
    assert [[coded_row(prompt) for prompt in call["input_ids"][:, :8]] for call in calls] == expected
    assert trajectory.forwards == len(calls) == 6
    for row in range(rows):
        written = 4 * (1 + (ended[row].index(True) if True in ended[row] else 2))
        assert (trajectory.unmask_step[row, :written] >= 0).all()
        assert (trajectory.unmask_step[row, written:] == -1).all()
        assert (trajectory.completion_ids[row, written:] == TAIL).all()
        assert trajectory.steps_taken[row] == written // 2
    text_behind_the_end = (trajectory.completion_ids >= A)[:, 1:] & torch.isin(
        trajectory.completion_ids, torch.tensor([TAIL, END])
    )[:, :-1]
    assert (text_behind_the_end & (trajectory.unmask_step[:, 1:] >= 0)).any()  # a block is always written to its end


def always(*words: int, model=None):
    """A network that all but surely writes one of `words`, wherever it is asked."""
    return set_bias(model or network(), 50.0 * torch.isin(torch.arange(5), torch.tensor(words)))


def test_completions_that_are_all_end_or_never_end():
    config = SamplingConfig(8, 4, 4)
    trajectory = rollout(always(TAIL), config)
    assert (trajectory.completion_ids == TAIL).all()
    assert (trajectory.unmask_step[:, :4] >= 0).all() and (trajectory.unmask_step[:, 4:] == -1).all()
    assert trajectory.forwards == 2 and trajectory.steps_taken.tolist() == [2] * 16
    trajectory = rollout(always(END), config)
    assert trajectory.completion_ids.tolist() == [[END] * 4 + [TAIL] * 4] * 16
    trajectory = rollout(always(A, B), config)
    assert (trajectory.completion_ids >= A).all() and (trajectory.unmask_step >= 0).all()
    assert trajectory.forwards == 4 and trajectory.steps_taken.tolist() == [4] * 16


@pytest.mark.parametrize("signals", [False, True])
@pytest.mark.parametrize("unmasking", RULES)
def test_lm_head_is_evaluated_only_where_tokens_may_be_committed(unmasking, signals):
    model = always(A, B)
    with forwards_of(model.lm_head) as calls:
        rollout(model, SamplingConfig(8, 4, 4, unmasking=unmasking, record_signals=signals))
    positions = [call["args"][0].shape[:-1].numel() for call in calls]
    expected = [2, 2, 2, 2] if unmasking == "random" and not signals else [4, 2, 4, 2]
    assert positions == [16 * count for count in expected]


@pytest.mark.parametrize(
    ("block", "steps", "commits"), [(5, 3, [2, 2, 1]), (5, 5, [1] * 5), (7, 2, [4, 3]), (6, 1, [6])]
)
def test_uneven_split_of_a_block_over_steps(block, steps, commits):
    config = SamplingConfig(2 * block, 2 * steps, block)
    assert config.commits() == commits and sum(commits) == block
    trajectory = rollout(always(A, B), config)
    for row in trajectory.unmask_step:
        assert row.bincount().tolist() == commits * 2
        assert row[:block].max() < row[block:].min()


def test_prompt_shorter_than_a_block():
    model, prompts = network(), torch.tensor([[A], [B]])
    trajectory = sample(model, prompts, None, SamplingConfig(8, 8, 4), row_generators(0, rows=range(2)))
    assert (trajectory.unmask_step[:, :4].sort(1).values == torch.arange(4)).all()
    padded = torch.tensor([[TAIL, TAIL, A], [TAIL, TAIL, B]])
    same = sample(model, padded, (padded != TAIL).long(), SamplingConfig(8, 8, 4), row_generators(0, rows=range(2)))
    assert torch.equal(same.completion_ids, trajectory.completion_ids)


# ------------------------------------------- sharded weights


def lockstep(run) -> list:
    """Results of `run(rank, any_process)` on two threads, which stand for processes that share their weights."""
    barrier, votes = threading.Barrier(2, timeout=SILENCE), [False, False]

    def collective(rank: int):
        def any_process(here: bool) -> bool:
            votes[rank] = here
            barrier.wait()
            answer = any(votes)
            barrier.wait()
            return answer

        return any_process

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: run(rank, collective(rank)), range(2)))
    assert not barrier.broken and votes == [False, False]  # both asked equally often, up to the last answer
    return results


def test_processes_run_the_same_number_of_forwards():
    model, config = network(), SamplingConfig(12, 6, 4, 1.3)
    prompts, mask = coded_prompts(16)
    blocks = rollout(model, config).steps_taken // 2
    shares = [(blocks == 1).nonzero().flatten().tolist(), (blocks == 2).nonzero().flatten().tolist()]

    def run(rows: list[int], any_process=None):
        own = copy.deepcopy(model)
        with forwards_of(own) as calls:
            generators = row_generators(0, rows=rows)
            trajectory = sample(own, prompts[rows], mask[rows], config, generators, any_process)
        assert trajectory.forwards == len(calls)
        return trajectory, calls

    alone = [run(rows) for rows in shares]
    assert [trajectory.forwards for trajectory, _ in alone] == [2, 4]
    together = lockstep(lambda rank, any_process: run(shares[rank], any_process))
    assert [trajectory.forwards for trajectory, _ in together] == [4, 4]  # and not the 6 that no row needs
    assert [len(call["input_ids"]) for call in together[0][1]] == [len(shares[0])] * 2 + [1, 1]
    for (trajectory, _), (expected, _) in zip(together, alone, strict=True):
        for name in ("completion_ids", "unmask_step", "logps", "entropies"):
            assert torch.equal(getattr(trajectory, name), getattr(expected, name))


# ------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(canvas_length=10, denoising_steps=4), r"block_length \(4\) must divide the canvas length \(10\).*of 12"),
        (dict(denoising_steps=3), r"denoising_steps \(3\) must be a multiple of the number of blocks \(2 = 8 / 4\)"),
        (dict(denoising_steps=10), r"denoising_steps \(10\).*at most the canvas length \(8\)"),
        (dict(denoising_steps=0), r"denoising_steps \(0\).*must be at least 1"),
        (dict(block_length=0), r"block_length \(0\) must be at least 1"),
        (dict(temperature=-0.1), r"temperature must be at least 0, got -0.1"),
        (dict(temperature=float("nan")), r"temperature must be at least 0, got nan; it must be finite"),
        (dict(temperature=float("inf")), r"temperature must be at least 0, got inf; it must be finite"),
        (dict(top_k=-1), r"top_k must be at least 0.*got -1"),
        (dict(top_k=5, top_p=0.0), r"top_p must lie in \(0, 1\], got 0.0"),
        (dict(top_k=5, top_p=1.1), r"top_p must lie in \(0, 1\], got 1.1"),
        (dict(top_k=5, top_p=float("nan")), r"top_p must lie in \(0, 1\], got nan"),
        (dict(top_p=0.9), r"top_p=0.9 needs top_k > 0.*set record_support=False"),
        (dict(unmasking="entropy", entropy_bound=float("nan")), r"entropy_bound must be at least 0 nats, got nan"),
        (dict(unmasking="confidence"), r"unmasking must be one of random, max_prob.*got 'confidence'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings, message):
    valid = dict(canvas_length=8, denoising_steps=4, block_length=4)
    SamplingConfig(**valid)
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**valid | settings)


def test_batches_that_do_not_fit_are_refused():
    model, config = network(), SamplingConfig(8, 4, 4)
    prompts, mask = coded_prompts(4)
    with pytest.raises(ValueError, match="one generator per prompt: 4 prompts, 3 generators"):
        sample(model, prompts, mask, config, row_generators(0, rows=range(3)))
    right_padded = mask.clone()
    right_padded[2, -1] = 0
    for broken in ((prompts, right_padded), (prompts[:, :0], mask[:, :0])):
        with pytest.raises(ValueError, match="left-padded, non-empty prompts: the last column of attention_mask"):
            sample(model, *broken, config, row_generators(0, rows=range(4)))


def test_masks_with_holes_and_other_values_are_refused():
    model, config = network(), SamplingConfig(8, 4, 4)
    prompts, mask = coded_prompts(4)

    def run(prompts, mask):
        return sample(model, prompts, mask, config, row_generators(0, rows=range(len(prompts))))

    holed = mask.clone()
    holed[2, 5] = 0
    with pytest.raises(ValueError, match=r"hole in row 2: a 0 follows a 1.*zeros, then ones"):
        run(prompts, holed)
    with pytest.raises(ValueError, match=r"must hold 0 \(padding\) and 1 \(prompt\) only"):
        run(prompts, mask * 0.5)
    with pytest.raises(ValueError, match=r"shape of the prompts, \(4, 8\); got \(4, 7\)"):
        run(prompts, mask[:, 1:])
    with pytest.raises(ValueError, match=r"ids of shape \[prompts, tokens\]; got torch.int64.*input_ids\[None\]"):
        run(prompts[0], None)
    with pytest.raises(ValueError, match=r"must be token ids of shape .* got torch.float32"):
        run(prompts.float(), mask)


def test_prompts_and_canvases_that_do_not_fit_are_refused():
    model, (prompts, mask) = network(max_position_embeddings=16), coded_prompts(4)  # of 8, 7, 6 and 5 words
    sample(model, prompts, mask, SamplingConfig(8, 4, 4), row_generators(0, rows=range(4)))
    message = "canvas of 10 does not fit: the longest prompt of this batch has 7 tokens.*16 positions.*at most 9"
    with pytest.raises(ValueError, match=message):
        sample(model, prompts[1:], mask[1:], SamplingConfig(10, 5, 10), row_generators(0, rows=range(3)))
    sample(model, prompts[2:], mask[2:], SamplingConfig(10, 5, 10), row_generators(0, rows=range(2)))  # padding is cut


@pytest.mark.parametrize("unmasking", RULES)
def test_an_empty_batch_is_an_empty_trajectory(unmasking):
    config = SamplingConfig(8, 4, 4, top_k=2, unmasking=unmasking, record_signals=True)
    full = rollout(network(), config, rows=2)
    with forwards_of(model := network()) as calls:
        for prompts in (torch.empty(0, 5, dtype=torch.long), torch.empty(0, 0, dtype=torch.long)):
            empty = sample(model, prompts, None, config, [])
            for name, value in vars(full).items():
                if isinstance(value, torch.Tensor):
                    assert vars(empty)[name].shape == (0, *value.shape[1:]), name
                    assert vars(empty)[name].dtype == value.dtype, name
    assert calls == [] and empty.forwards == 0


@pytest.mark.parametrize("cache", ["none", "prefix", "block"])
def test_a_process_without_rows_keeps_step(cache):
    model, config = (tiny_sdar() if cache == "block" else network()), SamplingConfig(12, 6, 4, cache=cache)
    prompts, mask = coded_prompts(4)

    def run(rank, any_process):
        rows = range(4 * rank)
        own = copy.deepcopy(model)
        with forwards_of(own) as calls:
            trajectory = sample(own, prompts[rows], mask[rows], config, row_generators(0, rows=rows), any_process)
        return trajectory, len(calls)

    (empty, alone), (full, calls) = lockstep(run)
    assert alone == calls == full.forwards == empty.forwards == empty.sync_forwards > 2
    assert empty.completion_ids.shape == (0, 12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_at_which_nothing_can_be_scored(temperature):
    model, logits = network(), torch.zeros(2, 5)
    message = f"finite temperature above 0, got {temperature}.*greedy trajectory.*score it with temperature=1.0"
    with pytest.raises(ValueError, match=message):
        score_targets(logits, torch.tensor([A, B]), temperature)
    positions = torch.tensor([[1]])
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.tensor([[A, MASK]]), positions=positions, targets=positions, temperature=temperature)


def test_a_greedy_trajectory_is_scored_again_at_temperature_one():
    model, (prompts, mask) = network(), coded_prompts(8)
    trajectory = rollout(model, SamplingConfig(8, 4, 4, 0.0, unmasking="max_prob"), rows=8)
    for step in range(4):
        targets = trajectory.unmask_step == step
        positions = torch.where(targets, 8 + torch.arange(8), -1)
        ids = torch.cat([prompts, canvas_before(trajectory, step)], dim=1)
        seen = torch.cat([mask, torch.ones_like(mask)], dim=1)
        with torch.no_grad():
            scored = model(ids, seen, positions=positions, targets=trajectory.completion_ids).log_probs
        torch.testing.assert_close(scored[targets], trajectory.logps[targets])


def test_all_of_the_probability_mass_keeps_every_id():
    """Unlikely ids are cut where the likely ones add up to 1 by rounding."""
    logits = torch.tensor([40.0, 39.0, 2.0, 1.0, -torch.inf])
    log_probs, ids = truncate(logits, 1.0, 5, 1.0)
    assert ids.tolist() == [0, 1, 2, 3, -1]
    assert log_probs[:4].tolist() == pytest.approx(logits.log_softmax(-1)[:4].tolist(), abs=1e-5)
    assert truncate(logits, 1.0, 4, 1 - 1e-6)[1].tolist() == [0, 1, -1, -1]
    whole = rollout(network(), SamplingConfig(8, 4, 4, 0.2, top_k=4))
    assert (whole.support[whole.unmask_step >= 0] >= 0).all()


@pytest.mark.parametrize("top_k", [0, 3])
def test_without_a_record_of_the_support_the_same_tokens_are_drawn(top_k):
    recorded = rollout(network(), SamplingConfig(8, 4, 4, 1.3, top_k=top_k or 4, top_p=0.8))
    without = rollout(network(), SamplingConfig(8, 4, 4, 1.3, top_k=top_k, top_p=0.8, record_support=False))
    assert without.support is None and recorded.support is not None
    assert torch.equal(without.completion_ids, recorded.completion_ids)
    torch.testing.assert_close(without.logps, recorded.logps)


def test_every_key_has_a_stream_of_its_own():
    keys = [(1,), (1, 0), (1, 0, 0), (2**32 + 1,), (1, 1), (0, 1), (0, 0, 1)]
    draws = {tuple(row_generators(*key, rows=[row])[0].random(4)) for key in keys for row in (0, 1)}
    assert len(draws) == 2 * len(keys)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.9}], ids=str
)
def test_tokens_with_confidence_are_drawn_some_rows_at_a_time(settings, monkeypatch):
    model, (prompts, mask) = tiny_model(), coded_prompts(9)
    config = replace(SamplingConfig(12, 6, 4, 1.0, unmasking="low_confidence"), **settings)
    softmax, most = torch.Tensor.softmax, []
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: most.append(len(self)) or softmax(self, dim))
    whole = sample(model, prompts, mask, config, row_generators(0, rows=range(9)))
    assert max(most) == 9
    most.clear()
    monkeypatch.setattr(drawing, "_CPU_PART", 2 * 4 * model.config.vocab_size)
    parts = sample(model, prompts, mask, config, row_generators(0, rows=range(9)))
    assert min(most) <= 2 and max(most) == 4  # of 4 masked positions, then of 2
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(parts, name), value), name


def test_a_new_unmasking_rule_is_a_function_and_a_line_of_the_table(monkeypatch):
    def right_to_left(candidates: Candidates) -> Choice:
        place = torch.arange(candidates.is_masked.size(1)).expand_as(candidates.is_masked)
        place = place.masked_fill(~candidates.is_masked, -1)
        return Choice(place.topk(int(candidates.min_commits.max()), 1).indices, candidates.min_commits)

    with pytest.raises(ValueError, match=r"unmasking must be one of random, .*; got 'right_to_left'"):
        SamplingConfig(8, 8, 4, unmasking="right_to_left")
    monkeypatch.setitem(RULES, "right_to_left", Rule(right_to_left, "from right to left", reads_logits=False))
    config = SamplingConfig(8, 8, 4, unmasking="right_to_left")
    assert head_positions(config) == 8
    assert head_positions(replace(config, record_signals=True)) == 2 * (4 + 3 + 2 + 1)
    for signals in (False, True):
        trajectory = rollout(always(A), replace(config, record_signals=signals), rows=2)
        assert trajectory.unmask_step.tolist() == [[3, 2, 1, 0, 7, 6, 5, 4]] * 2
