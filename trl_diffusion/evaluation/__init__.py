"""Decoding a model over tasks, and counting what is right."""

from typing import Any

from trl_diffusion.evaluation.accuracy import Accuracy, evaluate_accuracy, wilson_interval
from trl_diffusion.evaluation.loading import load_model, weights_checksum
from trl_diffusion.evaluation.measurement import Measurement, Problems, measure
from trl_diffusion.evaluation.processes import join_processes
from trl_diffusion.evaluation.results import Estimate, Result, console_table, markdown_table, write_results

__all__ = [
    "Accuracy",
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
    "weights_checksum",
    "wilson_interval",
    "write_results",
]


def __getattr__(name: str) -> Any:
    # The callbacks stand with the trainers, above this package, and keep this import path too.
    if name in ("AccuracyCallback", "ConfusionZoneCallback"):
        from trl_diffusion.trainers import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
