"""The one place that writes a trainer's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator


class Meter:
    """Adds values to TRL's metrics, which are averaged between two logs.

    Args:
        accelerator: of the run; reduces over processes.
        store: TRL's lists of values, by mode and name.

    Attributes:
        forward_units: compute spent on training by all processes so far. One unit is one forward pass of one row
            (prompt and whole canvas); a pass with gradient counts three, one over a part of the columns in proportion.
    """

    def __init__(self, accelerator: Accelerator, store: Mapping[str, Any]):
        self.accelerator, self.store = accelerator, store
        self.forward_units = 0.0

    def add(self, mode: str, values: Mapping[str, float]) -> None:
        """Add values that are the same on every process."""
        for name, value in values.items():
            self.store[mode][name].append(value)

    def add_means(self, mode: str, values: Mapping[str, torch.Tensor]) -> None:
        """Add the means over the elements of all processes."""
        for name, value in values.items():
            gathered = self.accelerator.gather(value.detach().float().mean())
            self.store[mode][name].append(gathered.mean().item())

    def add_mean_of(self, mode: str, name: str, values: torch.Tensor, chosen: torch.Tensor) -> None:
        """Add the mean over the chosen elements (bool, as `values`) of all processes together."""
        totals = torch.stack([(values.detach() * chosen).sum(), chosen.sum().float()])
        total, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        self.store[mode][name].append(total / max(count, 1.0))

    def keep_largest(self, mode: str, name: str, value: torch.Tensor) -> None:
        """Log the largest value of all processes since the last log, in place of a mean."""
        largest = self.accelerator.gather(value.detach()).max().item()
        self.store[mode][name] = [max([largest, *self.store[mode][name]])]

    def count_forwards(self, units: float) -> None:
        """Add to `forward_units`, which is logged as it stands."""
        self.forward_units += units
        self.store["train"]["forward_units"] = [self.forward_units]
