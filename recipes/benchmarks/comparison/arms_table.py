"""The table of the core table's arms: the method of each, and in which settings it differs from its baseline."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comparison.arms import COMMON, Arm
from comparison.core import CORE
from comparison.settings import CHAINS
from trl_diffusion.trainers import METHODS


def arms_table() -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table: arm, method, baseline, and every setting in which the two differ.

    The baseline is the first of those that an arm is compared with. A setting is followed by the baseline's in
    parentheses, if the baseline's method has it.
    """
    lines = []
    for name, arm in CORE.items():
        baseline = arm.baselines[0] if arm.baselines else None
        differences = _differences(arm, None if baseline is None else CORE[baseline])
        lines.append([f"`{name}`", arm.method, "" if baseline is None else f"`{baseline}`", ", ".join(differences)])
    return ["arm", "method", "baseline", "settings (of the baseline)"], lines


def _settings(arm: Arm) -> dict[str, Any]:
    """Return the settings of an arm on chained sums, defaults of its method's config included."""
    defaults = {field.name: field.default for field in fields(METHODS[arm.method].config_class)}
    rewarded = {"process rewards, N": 0 if arm.step_aware is None else arm.step_aware["num_rollouts"]}
    return defaults | COMMON | CHAINS.of_trainer | arm.settings | rewarded | {"curriculum": arm.curriculum}


def _differences(arm: Arm, baseline: Arm | None) -> list[str]:
    """Return every setting that an arm or its baseline states and in which they differ, as text."""
    own = _settings(arm)
    if baseline is None:
        return [f"{name} {value}" for name, value in arm.settings.items()]
    other = _settings(baseline)
    stated = [*arm.settings, *baseline.settings, "process rewards, N", "curriculum"]
    differing = [name for name in dict.fromkeys(stated) if name in own and own[name] != other.get(name, ...)]
    return [f"{name} {own[name]}" + (f" ({other[name]})" if name in other else "") for name in differing]
