"""Let processes run different numbers of forward passes on gathered weights under DeepSpeed ZeRO-3."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator


def finish_trace(accelerator: Accelerator, model: Any) -> None:
    """Run two small forward passes under ZeRO-3; do nothing on other backends.

    Until DeepSpeed has traced a whole forward pass, it compares the order of modules between the processes whenever
    the model's forward begins. A process without rows would leave the others waiting there, and so would one that runs
    a single pass where another runs two. After two passes on every process the trace is complete, and nothing is
    compared any more.

    Args:
        accelerator: of the run.
        model: the model with all its weights gathered, as `unwrap_model_for_generation` gives it.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return
    token = torch.zeros(1, 1, dtype=torch.long, device=accelerator.device)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=token, positions=token)
