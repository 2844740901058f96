"""Brute force over every trajectory of the four-word model; shares no code with the library's sampler or scoring."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations, permutations, product

import torch
from tiny import END, MASK, TAIL

from trl_diffusion.sampling import Trajectory

WORD_IDS = (0, 1, 2, 3)


@dataclass
class Path:
    """One way to write a canvas: what was written, when, and the log-probability of each choice (with gradient).

    If positions are drawn, `ranks` and `position_logps` say of each one how many its step drew before it, and the
    log-probability of drawing it after those.
    """

    tokens: list[int]
    steps: list[int]
    token_logps: list[torch.Tensor]
    entropies: list[float]
    order_logp: float | torch.Tensor
    ranks: list[int] = field(default_factory=list)
    position_logps: list[torch.Tensor | None] = field(default_factory=list)

    @property
    def probability(self) -> torch.Tensor:
        return torch.exp(sum(logp for logp in self.token_logps if logp is not None) + self.order_logp)


def enumerate_paths(
    model,
    prompt: list[int],
    length: int,
    block: int,
    steps_per_block: int,
    temperature: float = 1.0,
    position_temperature: float | None = None,
):
    """Every trajectory of block sampling from one prompt, rows leaving behind the block of their end.

    Positions are in a random order or, with `position_temperature`, drawn one after the other in proportion to
    their largest probability at temperature 1 to the power of its inverse.
    """
    commits = [len(part) for part in torch.arange(block).tensor_split(steps_per_block)]
    cache: dict[tuple[int, ...], torch.Tensor] = {}

    def logits_of(canvas: tuple[int, ...]) -> torch.Tensor:
        if canvas not in cache:
            logits = model(input_ids=torch.tensor([[*prompt, *canvas]])).logits[0, len(prompt) :]
            cache[canvas] = logits[:, WORD_IDS]
        return cache[canvas]

    def orders(canvas: tuple[int, ...], masked: list[int], count: int):
        """(positions, log-probability of each, that of all) for every choice of positions."""
        if position_temperature is None:
            choices = list(combinations(masked, count))
            for chosen in choices:
                yield chosen, [None] * count, -math.log(len(choices))
            return
        scores = logits_of(canvas).log_softmax(-1).amax(-1) / position_temperature
        for chosen in permutations(masked, count):
            logps = [
                scores[position] - scores[[i for i in masked if i not in chosen[:rank]]].logsumexp(0)
                for rank, position in enumerate(chosen)
            ]
            yield chosen, logps, sum(logps)

    finished: list[Path] = []

    def grow(canvas, steps, logps, entropies, ranks, position_logps, order_logp, step):
        start = step // steps_per_block * block
        if step % steps_per_block == 0 and (
            start == length or any(token in (TAIL, END) for token in canvas[start - block : start] if start)
        ):
            tokens = [TAIL if token == MASK else token for token in canvas]
            finished.append(Path(tokens, steps, logps, entropies, order_logp, ranks, position_logps))
            return
        masked = [i for i in range(start, start + block) if canvas[i] == MASK]
        log_probs = (logits_of(tuple(canvas)) / temperature).log_softmax(-1)
        for chosen, of_positions, of_all in orders(tuple(canvas), masked, commits[step % steps_per_block]):
            for words in product(WORD_IDS, repeat=len(chosen)):
                new = [list(part) for part in (canvas, steps, logps, entropies, ranks, position_logps)]
                for rank, (position, word) in enumerate(zip(chosen, words, strict=True)):
                    own = log_probs[position]
                    entropy = -(own.exp() * own).sum().item()
                    written = (word, step, own[word], entropy, rank, of_positions[rank])
                    for part, value in zip(new, written, strict=True):
                        part[position] = value
                grow(*new, order_logp + of_all, step + 1)

    nothing: list[None] = [None] * length
    grow([MASK] * length, [-1] * length, nothing, [0.0] * length, [0] * length, nothing, 0.0, 0)
    return finished


def trajectory_of(paths: list[Path], temperature: float) -> Trajectory:
    """What a sampler that had taken these paths would have recorded."""

    def numbers(logps: list[torch.Tensor | None]) -> list[float]:
        return [0.0 if logp is None else float(logp.detach()) for logp in logps]

    scores = [numbers(path.token_logps) for path in paths]
    drawn = any(logp is not None for path in paths for logp in path.position_logps)
    return Trajectory(
        completion_ids=torch.tensor([path.tokens for path in paths]),
        unmask_step=torch.tensor([path.steps for path in paths], dtype=torch.int32),
        logps=torch.tensor(scores),
        entropies=torch.tensor([path.entropies for path in paths]),
        support=None,
        temperature=temperature,
        step_entropy=None,
        step_margin=None,
        row_forwards=torch.zeros(len(paths), dtype=torch.long),
        row_units=torch.zeros(len(paths)),
        forwards=0,
        sync_forwards=0,
        position_logps=torch.tensor([numbers(path.position_logps) for path in paths]) if drawn else None,
        position_ranks=torch.tensor([path.ranks for path in paths], dtype=torch.int32) if drawn else None,
    )
