"""Confusion zones: the denoising steps at which the network hesitates, and how well they predict failure.

ATPO (2511.15208) calls confusion zones the steps at which entropy is high or changes fast and the two likeliest tokens
are close. Here the signals of single completions become curves over the denoising steps, split by success and failure,
and the AUC of predicting failure from each signal. The formulas are those of `trl_diffusion.credit.step_signals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
from matplotlib.figure import Figure

SIGNALS = {"entropy": "Entropy H (nats)", "confidence_margin": "Confidence margin 1 − (p1 − p2)", "roec": "RoEC |ΔH|"}


def signal_frame(
    step_entropy: torch.Tensor,
    step_margin: torch.Tensor,
    num_steps: torch.Tensor,
    success: torch.Tensor,
    steps_per_block: int,
    taken: torch.Tensor | None = None,
) -> pd.DataFrame:
    """Collect the signals of every completion at every denoising step that it took.

    Args:
        step_entropy: float [B, S], see `Trajectory.step_entropy`.
        step_margin: float [B, S], mean p1 − p2.
        num_steps: long [B], the step after the last one that each completion took.
        success: bool or float [B], NaN where success is unknown.
        steps_per_block: denoising steps per block.
        taken: bool [B, S], the steps that each completion took. Parallel unmasking can finish a block before its last
            step, so that steps are left out; all up to `num_steps` if not given.

    Returns:
        A row per completion and step: `completion`, `step`, `entropy`, `confidence_margin`, `roec` (NaN at the first
        step of a block, where it is not defined) and `success` (boolean, NA for unknown).

    Raises:
        ValueError: if the shapes do not agree.
    """
    batch = (len(step_entropy),)
    if (
        step_entropy.dim() != 2
        or step_margin.shape != step_entropy.shape
        or not num_steps.shape == success.shape == batch
    ):
        raise ValueError(
            "signal_frame() needs step_entropy and step_margin [B, S], num_steps and success [B]; got "
            f"{tuple(step_entropy.shape)}, {tuple(step_margin.shape)}, {tuple(num_steps.shape)} and "
            f"{tuple(success.shape)}."
        )
    entropy, margin, num_steps, success = (x.double().cpu() for x in (step_entropy, step_margin, num_steps, success))
    steps = torch.arange(entropy.size(1))
    roec = torch.full_like(entropy, torch.nan)
    roec[:, 1:] = (entropy[:, 1:] - entropy[:, :-1]).abs()
    roec[:, steps % steps_per_block == 0] = torch.nan
    shown = steps < num_steps.unsqueeze(1)
    if taken is not None:
        shown &= taken.cpu()
    row, step = shown.nonzero(as_tuple=True)
    succeeded = pd.array([None if math.isnan(value) else bool(value) for value in success.tolist()], dtype="boolean")
    return pd.DataFrame(
        {
            "completion": row.numpy(),
            "step": step.numpy(),
            "entropy": entropy[row, step].numpy(),
            "confidence_margin": (1.0 - margin[row, step]).numpy(),
            "roec": roec[row, step].numpy(),
            "success": succeeded[row.numpy()],
        }
    )


def signal_curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Average each signal at each step over the completions that took it, by outcome.

    Args:
        frame: see `signal_frame`.

    Returns:
        Index (`signal`, `success`, `step`); columns `mean`, `standard_error` (of independent completions; NaN for a
        single one) and `completions`, their number.
    """
    values = frame.melt(["success", "step"], list(SIGNALS), var_name="signal").groupby(["signal", "success", "step"])
    return values["value"].agg(mean="mean", standard_error="sem", completions="count")


def failure_auc(frame: pd.DataFrame) -> pd.DataFrame:
    """Compute how well each signal predicts failure.

    A completion's value is the mean of the signal over its own steps. The AUC is the probability that a failed
    completion has a larger value than a successful one, a tie counting one half: 0.5 is no better than chance.
    Completions whose success is unknown are left out.

    Args:
        frame: see `signal_frame`.

    Returns:
        Index `signal`; columns `auc` and `standard_error` (DeLong's, of independent completions). The AUC is NaN
        where one outcome is missing, see `missing_outcome`.
    """
    values = frame.groupby("completion")[list(SIGNALS)].mean()
    success = outcomes(frame)
    rows = {signal: _auc(values[signal], success) for signal in SIGNALS}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["auc", "standard_error"]).rename_axis("signal")


def failure_auc_within(frame: pd.DataFrame, prompt: Sequence[int]) -> pd.DataFrame:
    """Compute how well each signal predicts which completions of the same prompt fail.

    `failure_auc` can be large because a signal finds hard prompts, and advantages compare completions of one prompt.
    Here a failed completion is compared only with the successful ones of the same prompt; all such pairs count alike.

    Args:
        frame: see `signal_frame`.
        prompt: the prompt of each completion, by any number.

    Returns:
        Index `signal`; columns `auc` (NaN without pairs) and `pairs`, their number.
    """
    values = frame.groupby("completion")[list(SIGNALS)].mean()
    success = outcomes(frame)
    group = pd.Series([int(number) for number in prompt]).reindex(values.index)
    result = {}
    for signal in SIGNALS:
        better = pairs = 0.0
        for _, own in values[signal].groupby(group):
            known = own.notna() & success[own.index].notna()
            failed = own[known & (success[own.index] == False)].to_numpy()  # noqa: E712 (NA)
            right = own[known & (success[own.index] == True)].to_numpy()  # noqa: E712 (NA)
            larger = failed[:, None] > right[None, :]
            equal = failed[:, None] == right[None, :]
            better += float(larger.sum() + 0.5 * equal.sum())
            pairs += len(failed) * len(right)
        result[signal] = (better / pairs if pairs else math.nan, int(pairs))
    return pd.DataFrame.from_dict(result, orient="index", columns=["auc", "pairs"]).rename_axis("signal")


def failure_auc_by_step(frame: pd.DataFrame) -> pd.DataFrame:
    """Compute the AUC of each signal at single steps, over the completions that took them.

    Args:
        frame: see `signal_frame`.

    Returns:
        Index `step`; a column per signal, NaN where one outcome is missing; and `completions`, the number of
        completions of known success.
    """
    by_step = {
        step: {signal: _auc(rows[signal], rows["success"])[0] for signal in SIGNALS}
        | {"completions": int(rows["success"].count())}
        for step, rows in frame.groupby("step")
    }
    return pd.DataFrame.from_dict(by_step, orient="index").rename_axis("step")


def outcomes(frame: pd.DataFrame) -> pd.Series:
    """Return the success of each completion of a `signal_frame`: boolean, NA for unknown."""
    return frame.groupby("completion")["success"].first()


def missing_outcome(frame: pd.DataFrame) -> str | None:
    """Say why there is no AUC; `None` if both outcomes exist."""
    known = outcomes(frame).dropna()
    if known.nunique() == 2:
        return None
    if known.empty:
        return "No AUC: no completion whose success is known."
    return f"No AUC: all {len(known)} completions {'succeeded' if known.iloc[0] else 'failed'}."


def confusion_zone_figure(
    frame: pd.DataFrame, steps_per_block: int, selected: torch.Tensor | Sequence[int] | None = None, title: str = ""
) -> Figure:
    """Draw three panels, one per signal: mean ± standard error over the steps, of successes and of failures.

    Args:
        frame: see `signal_frame`.
        steps_per_block: denoising steps per block; the first step of each is marked faintly.
        selected: denoising steps to mark, as a list or as the selections [A, K] of A sets of completions, -1 for
            none. The more sets chose a step, the stronger its line.
        title: put before the numbers of completions.
    """
    curves, auc = signal_curves(frame), failure_auc(frame)["auc"]
    chosen = torch.atleast_2d(torch.as_tensor([] if selected is None else selected).long().cpu())
    num_steps = int(frame["step"].max()) + 1
    figure = Figure(figsize=(11, 3.3), dpi=100, layout="constrained")
    for axes, (signal, name) in zip(figure.subplots(1, 3), SIGNALS.items(), strict=True):
        for start in range(0, num_steps, steps_per_block):
            axes.axvline(start, color="0.85", linewidth=0.8, linestyle=":", zorder=0)
        for step in chosen[chosen >= 0].unique().tolist():
            share = (chosen == step).any(1).float().mean().item()  # a set may have drawn a step several times
            axes.axvline(step, color="tab:green", linewidth=1.2, alpha=0.2 + 0.5 * share, zorder=1)
        for success, label, color in ((True, "succeeded", "tab:blue"), (False, "failed", "tab:red")):
            if (signal, success) in curves.index.droplevel("step"):
                curve = curves.loc[(signal, success)]
                axes.plot(curve.index, curve["mean"], color=color, marker=".", markersize=3, label=label)
                low, high = (curve["mean"] + sign * curve["standard_error"] for sign in (-1, 1))
                axes.fill_between(curve.index, low, high, color=color, alpha=0.2, linewidth=0)
        shown = "" if math.isnan(auc[signal]) else f"   AUC {auc[signal]:.2f}"
        axes.set_xlabel("denoising step")
        axes.set_title(name + shown, fontsize="medium")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="upper right")
    success = outcomes(frame)
    counts = f"{int((success == True).sum())} succeeded, {int((success == False).sum())} failed"  # noqa: E712 (NA)
    marked = "   green: selected steps" if (chosen >= 0).any() else ""
    parts = [title, counts + marked, missing_outcome(frame) or ""]
    figure.suptitle("   ".join(part for part in parts if part), fontsize="medium")
    return figure


def _auc(values: pd.Series, success: pd.Series) -> tuple[float, float]:
    """Compute the AUC of predicting failure and its standard error (DeLong), from ranks: ties count one half."""
    known = values.notna() & success.notna()
    failed, right = values[known & (success == False)], values[known & (success == True)]  # noqa: E712 (NA)
    if failed.empty or right.empty:
        return math.nan, math.nan
    ranks = pd.concat([failed, right], keys=["failed", "right"]).rank()
    # For each failure the share of successes below it, for each success the share of failures below it.
    below = (ranks["failed"] - failed.rank()) / len(right)
    above = (ranks["right"] - right.rank()) / len(failed)
    return float(below.mean()), math.sqrt(below.var() / len(failed) + above.var() / len(right))
