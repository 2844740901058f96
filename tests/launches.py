"""Counts what a rollout launches on a device, where the host waits for it, and what memory it takes.

Operations are counted as PyTorch dispatches them, views included, on the CPU: the code is the same on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result has a shape or a value that the host must know.
_WAITING = {
    "_local_scalar_dense",  # .item(), int(), float(), bool()
    "equal",
    "is_nonzero",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
    "isin",  # finds the distinct ids of a long list
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Copies between host and device that wait. On the CPU they dispatch nothing, so their calls are counted.
_COPYING = {torch.Tensor.tolist, torch.Tensor.cpu, torch.tensor, torch.as_tensor}


@dataclass
class Step:
    """What was dispatched since the previous forward of the network ended, and in this one.

    Attributes:
        outside: operations outside of the network.
        waits: what made the host wait outside of the network, by name.
        waits_inside: the same inside of it.
    """

    outside: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    waits_inside: Counter[str] = field(default_factory=Counter)


class Launches(TorchDispatchMode):
    """Counts a rollout's operations by its forwards.

        with Launches(model) as launches:
            sample(model, …)

    Attributes:
        steps: one for each forward of the network, and one for what follows the last.
    """

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network, self.inside, self.steps = network, False, [Step()]
        self.copies = _Copies(self)

    def __enter__(self):
        self.hooks = [
            self.network.register_forward_pre_hook(lambda *_: self._enter_network()),
            self.network.register_forward_hook(lambda *_: self._leave_network()),
        ]
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _enter_network(self) -> None:
        self.inside = True

    def _leave_network(self) -> None:
        self.inside = False
        self.steps.append(Step())

    def wait(self, name: str) -> None:
        step = self.steps[-1]
        (step.waits_inside if self.inside else step.waits)[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside:
            self.steps[-1].outside += 1
        name = func.overloadpacket.__name__
        if name in _WAITING or (name in _INDEXING and any(_is_mask(index) for index in args[1])):
            self.wait(name)
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Reports the copies between host and device that wait."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _COPYING:
            self.launches.wait(func.__name__)
        return func(*args, **(kwargs or {}))


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def peak_of(function: Callable[[], Any]) -> tuple[Any, int, int]:
    """Return what a function returns, and the bytes that it allocates: those that are left, and the most at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return result, held, largest
