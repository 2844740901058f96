"""Settings that all runs on a task share: the model, the canvas, and how accuracy is measured after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trl_diffusion.models.embedded import EMBEDDED_CHAINS_MODEL, EMBEDDED_MODEL, EMBEDDED_PUZZLES_MODEL
from trl_diffusion.sampling import SamplingConfig


@dataclass(frozen=True)
class Setting:
    """Settings that all runs on a task share.

    Args:
        model: the bundled model that every run starts from.
        canvas_length: L.
        block_length: of rollouts and evaluation.
        denoising_steps: S, of rollouts and of sampled evaluation.
        greedy_steps: denoising steps at which greedy accuracy is measured: S first, then fewer.
        draws: sampled completions of each held-out problem.
        fewer_steps: S, S/2 and S/4 of the arms that are evaluated at fewer steps than their rollouts take; empty
            without such arms.
    """

    model: str
    canvas_length: int
    block_length: int
    denoising_steps: int
    greedy_steps: Sequence[int]
    draws: int = 1
    fewer_steps: Sequence[int] = ()

    def decoding(
        self, steps: int, temperature: float = 0.0, confidence_threshold: float | None = None
    ) -> SamplingConfig:
        """Return how held-out problems are decoded."""
        return SamplingConfig(
            self.canvas_length,
            steps,
            self.block_length,
            temperature,
            unmasking="max_prob",
            confidence_threshold=confidence_threshold,
        )

    @property
    def of_trainer(self) -> dict[str, int]:
        """The settings of a trainer's config."""
        return {
            "max_completion_length": self.canvas_length,
            "block_length": self.block_length,
            "denoising_steps": self.denoising_steps,
        }


# Word problems, Countdown and Sudoku; chained sums; puzzles that are solved step by step.
SHORT = Setting(EMBEDDED_MODEL, 32, 8, 16, (16, 8, 4))
CHAINS = Setting(EMBEDDED_CHAINS_MODEL, 45, 5, 27, (27,), draws=4, fewer_steps=(36, 18, 9))
PUZZLES = Setting(EMBEDDED_PUZZLES_MODEL, 60, 10, 30, (30,), draws=4, fewer_steps=(24, 12, 6))
SETTINGS = {
    "chained_sums": CHAINS,
    "chained_sums_fixed": CHAINS,
    "sudoku_sweeps": PUZZLES,
    "countdown_search": PUZZLES,
}


def setting_of(task: str) -> Setting:
    """Return the setting of a task; tasks of the first bundled model share one."""
    return SETTINGS.get(task, SHORT)
