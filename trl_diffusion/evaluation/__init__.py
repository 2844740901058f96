"""Decoding a model over a task and counting what is right."""

from trl_diffusion.evaluation.accuracy import Accuracy, evaluate_accuracy, wilson_interval
from trl_diffusion.evaluation.callback import AccuracyCallback
from trl_diffusion.evaluation.confusion_zones import ConfusionZoneCallback

__all__ = ["Accuracy", "AccuracyCallback", "ConfusionZoneCallback", "evaluate_accuracy", "wilson_interval"]
