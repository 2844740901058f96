"""Reads rollout batches that checkpoints of 0.1.0.dev0 wrote in the middle of their updates."""

from __future__ import annotations

from typing import Any

Rows = dict[str, Any]
_NAMES = {"hidden": "masked", "hidden_share": "mask_rate", "prompt_hidden": "prompt_masked"}


def upgrade(buffer: list[Rows] | None, group_size: int, refreshes: bool) -> list[Rows] | None:
    """The micro-batches of a rollout batch, with today's names and with weights where losses now read them.

    Args:
        buffer: as the checkpoint holds it; `None` if the last rollout batch was used up.
        group_size: G.
        refreshes: whether the method's credit is computed again before each update.

    Raises:
        ValueError: if it is, since the earlier version stored other views for that.
    """
    return None if buffer is None else [_upgrade(rows, group_size, refreshes) for rows in buffer]


def _upgrade(rows: Rows, group_size: int, refreshes: bool) -> Rows:
    if "hidden" not in rows:
        return rows
    rows = {_NAMES.get(name, name): value for name, value in rows.items()}
    if refreshes:
        raise ValueError(
            "This checkpoint was written by version 0.1.0.dev0 in the middle of a rollout batch whose weights change "
            "with the policy (DMPO's weight_baseline='model'), which this version cannot continue. Resume from a "
            "checkpoint between two rollouts, or finish the run with 0.1.0.dev0."
        )
    if "length_weight" in rows:  # SPG
        rows["advantages"] = rows["advantages"] * rows.pop("length_weight")
    if "weight_baseline" in rows:  # DMPO
        rows["advantages"] = group_size * (rows.pop("weights") - rows.pop("weight_baseline"))
    elif "weights" in rows:  # wd1
        rows["advantages"] = rows.pop("weights")
    return rows
