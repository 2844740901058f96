"""Evaluation: decoding a model over tasks and counting right completions."""

from typing import Any

from trl_diffusion.evaluation.accuracy import evaluate_accuracy
from trl_diffusion.evaluation.loading import load_model, merge_for_decoding, weights_checksum
from trl_diffusion.evaluation.measurement import Measurement, Problems, measure
from trl_diffusion.evaluation.processes import join_processes
from trl_diffusion.evaluation.results import Result, console_table, markdown_table, write_results
from trl_diffusion.evaluation.statistics import Estimate, wilson_interval

__all__ = [
    "AccuracyCallback",
    "ConfusionZoneCallback",
    "Estimate",
    "Measurement",
    "Problems",
    "Result",
    "console_table",
    "evaluate_accuracy",
    "join_processes",
    "load_model",
    "markdown_table",
    "measure",
    "merge_for_decoding",
    "weights_checksum",
    "wilson_interval",
    "write_results",
]


def __getattr__(name: str) -> Any:
    # The callbacks moved to the trainers, which import this package; their import path from here is kept.
    if name in ("AccuracyCallback", "ConfusionZoneCallback"):
        from trl_diffusion.trainers import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
