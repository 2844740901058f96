"""Random streams, one per completion, keyed by what they are for.

No draw depends on the batch that a completion is in, on the process that holds it, or on global random state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Purpose of a stream, the first element of its key, so that no two purposes share noise.

    The numbers are part of every key: changing one changes all draws of runs with the same seed.
    """

    TRAIN_ROLLOUT = 0
    EVAL_ROLLOUT = 1
    TRAIN_VIEWS = 2
    EVAL_VIEWS = 3
    SELECTION = 4
    PROBE_STATE = 5
    PROBE_ROLLOUT = 6
    VIEW_COUNTS = 7
    BOUNDS = 8


def row_generators(seed: int, *key: int, rows: Iterable[int]) -> list[np.random.Generator]:
    """Make one random stream per row, keyed by `(seed, *key, row)`.

    The same key gives the same stream on every device, in every batch and on every process. The generators are
    NumPy's, because these take the whole key; PyTorch's CPU generator keeps 32 bits of its seed.

    Args:
        seed: any non-negative integer.
        *key: integers in 0..2³²-1, for example (purpose, rollout, update).
        rows: global row of each completion (prompt · G + g).

    Returns:
        A list of generators, in the order of `rows`.
    """
    # A spawn key, because NumPy pads a plain list of integers with zeros: (1,) and (1, 0) would be one stream.
    return [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*key, row))) for row in rows]


def uniforms(generators: Sequence[np.random.Generator], *shape: int) -> torch.Tensor:
    """Draw uniform noise in [0, 1), each row from its own stream.

    Args:
        generators: one per row.
        *shape: of the noise of a row.

    Returns:
        Float64 tensor [len(generators), *shape], on the CPU.
    """
    return torch.from_numpy(
        np.array([generator.random(shape) for generator in generators]).reshape(len(generators), *shape)
    )
