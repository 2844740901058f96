"""Joining the processes of `accelerate launch`, for code that only divides work among them."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState

from trl_diffusion.runtime.launch import launched_processes

# Time that one process waits for the others, whose last batches can be much slower than its own.
PATIENCE = timedelta(hours=12)


def join_processes(use_cpu: bool = False) -> PartialState:
    """Join the other processes of `accelerate launch`, or be alone without it.

    Args:
        use_cpu: stay on the CPU although there is an accelerator.

    Returns:
        accelerate's state: `process_index`, `num_processes`, `device`, `wait_for_everyone()`.

    Raises:
        RuntimeError: if the launcher started more processes than joined; each would do all of the work.
    """
    # If accelerate is asked for accelerators that do not exist, its processes do not join and each works alone.
    state = PartialState(cpu=use_cpu or not torch.accelerator.is_available(), timeout=PATIENCE)
    started = launched_processes()
    if state.num_processes != started:
        raise RuntimeError(
            f"The launcher started {started} processes, but {state.num_processes} joined. If there is no GPU for "
            "each, launch with trl_diffusion/accelerate_configs/cpu_ddp.yaml and pass `--use_cpu true`."
        )
    return state
