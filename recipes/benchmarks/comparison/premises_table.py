"""The table of premises: a line for each, a column for each task and unmasking rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Ways to choose four denoising steps, see `premises.gradient_shares`.
GRADIENT = {
    "own": "each completion's own largest",
    "shared": "the best for all completions",
    "uniform": "drawn uniformly",
    "entropy": "by entropy of the batch",
    "entropy_own": "by a completion's entropy",
    "confidence_margin": "by margin of the batch",
    "confidence_margin_own": "by a completion's margin",
    "roec": "by RoEC of the batch",
    "roec_own": "by a completion's RoEC",
    "roec_cm": "by the hybrid score of the batch",
    "roec_cm_own": "by a completion's hybrid score",
}


def premises_table(premises: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of premises: a line for each, a column for each task and unmasking rule."""
    columns = [name for name in premises if name != "setting"]
    measured = [premises[name] for name in columns]
    blocks = min(len(each["continuations"]["right"]) for each in measured)

    def line(name: str, values: Sequence[float], digits: int = 2) -> list[str]:
        return [name, *(f"{value:.{digits}f}" for value in values)]

    lines = [
        line("accuracy of single samples, %", [100 * each["accuracy"] for each in measured], 1),
        line("groups with right and wrong completions, %", [100 * each["mixed_groups"] for each in measured], 1),
        line("uncertain tokens written after one to their right", [each["uncertain_postponed"] for each in measured]),
    ]
    for where, words in (("among_all", "all completions"), ("within_prompts", "completions of a prompt")):
        for signal in measured[0]["auc"]:
            name = f"AUC for failure among {words}, {signal.replace('_', ' ')}"
            lines.append(line(name, [each["auc"][signal][where] for each in measured]))
    for kind in measured[0]["gradient_share"]:
        name = f"share of the gradient norm in 4 steps, {GRADIENT[kind]}"
        lines.append(line(name, [each["gradient_share"][kind] for each in measured]))
    for outcome in ("right", "failed"):
        for block in (block for block in (0, 3, 6, 8) if block < blocks):
            name = f"continuations of {outcome} completions after {block} blocks, share right"
            lines.append(line(name, [each["continuations"][outcome][block] for each in measured]))
    for share in measured[0]["elbo_deviation"]:
        name = f"deviation of the ELBO at {100 * float(share):g} % masked, nats"
        lines.append(line(name, [each["elbo_deviation"][share] for each in measured], 1))
    for surrogate in measured[0]["cosine"]:
        name = f"cosine to the policy gradient, {surrogate.replace('_', ' ')}"
        lines.append(line(name, [each["cosine"][surrogate] for each in measured]))
    return ["premise", *columns], lines
