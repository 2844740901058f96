"""The kernels on which a run spends most of its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernel_times(run: Callable[[], Any], device: torch.device, count: int = 10) -> tuple[float, list[dict[str, Any]]]:
    """Return the milliseconds of all kernels together, and the kernels that took longest with their shares of it.

    On a CPU they are the operators, without the time of those that they call. The host launches kernels while earlier
    ones run, so a run takes longer than its kernels where the host is slower.

    Args:
        run: what to profile.
        device: where it computes.
        count: how many kernels to return.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run()
        measure.synchronise(device)
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    times = [
        (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
        if event.device_type == wanted
    ]
    total = sum(microseconds for microseconds, _ in times)
    longest = sorted(times, key=lambda pair: -pair[0])[:count]
    return total / 1e3, [
        {
            "name": event.key[:100],
            "calls": event.count,
            "milliseconds": microseconds / 1e3,
            "share": microseconds / total,
        }
        for microseconds, event in longest
    ]
