"""Brute force over every trajectory of the four-word model; shares no code with the library's sampler or scoring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, product

import torch
from tiny import END, MASK, TAIL

from trl_diffusion.sampling import Trajectory

WORD_IDS = (0, 1, 2, 3)


@dataclass
class Path:
    """One way to write a canvas: what was written, when, and the log-probability of each choice (with gradient)."""

    tokens: list[int]
    steps: list[int]
    token_logps: list[torch.Tensor]
    entropies: list[float]
    order_logp: float

    @property
    def probability(self) -> torch.Tensor:
        return torch.exp(sum(logp for logp in self.token_logps if logp is not None) + self.order_logp)


def enumerate_paths(model, prompt: list[int], length: int, block: int, steps_per_block: int, temperature: float = 1.0):
    """Every trajectory of random-order block sampling from one prompt, rows leaving behind the block of their end."""
    commits = [len(part) for part in torch.arange(block).tensor_split(steps_per_block)]
    cache: dict[tuple[int, ...], torch.Tensor] = {}

    def distributions(canvas: tuple[int, ...]) -> torch.Tensor:
        if canvas not in cache:
            logits = model(input_ids=torch.tensor([[*prompt, *canvas]])).logits[0, len(prompt) :]
            cache[canvas] = (logits[:, WORD_IDS] / temperature).log_softmax(-1)
        return cache[canvas]

    finished: list[Path] = []

    def grow(canvas, steps, logps, entropies, order_logp, step):
        start = step // steps_per_block * block
        if step % steps_per_block == 0 and (
            start == length or any(token in (TAIL, END) for token in canvas[start - block : start] if start)
        ):
            tokens = [TAIL if token == MASK else token for token in canvas]
            finished.append(Path(tokens, list(steps), list(logps), list(entropies), order_logp))
            return
        masked = [i for i in range(start, start + block) if canvas[i] == MASK]
        choices = list(combinations(masked, commits[step % steps_per_block]))
        log_probs = distributions(tuple(canvas))
        for chosen in choices:
            for words in product(WORD_IDS, repeat=len(chosen)):
                new = [list(part) for part in (canvas, steps, logps, entropies)]
                for position, word in zip(chosen, words, strict=True):
                    own = log_probs[position]
                    new[0][position], new[1][position], new[2][position] = word, step, own[word]
                    new[3][position] = -(own.exp() * own).sum().item()
                grow(*new, order_logp - math.log(len(choices)), step + 1)

    grow([MASK] * length, [-1] * length, [None] * length, [0.0] * length, 0.0, 0)
    return finished


def trajectory_of(paths: list[Path], temperature: float) -> Trajectory:
    """What a sampler that had taken these paths would have recorded."""
    scores = [[0.0 if logp is None else float(logp.detach()) for logp in path.token_logps] for path in paths]
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
    )
