"""One step before the first, without a trace: the largest micro-batch, and one evaluation batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from laras.formatting import size
from laras.training.oom import device_random_state, restore_device_random_state
from laras.training.state import random_states, restore_random_states


@dataclass(frozen=True)
class Rehearsal:
    """Peak memory of a rehearsal beside the plan's.

    Attributes:
        peak_bytes: Of forward and backward beside the optimizer's states.
        planned_bytes: Of the plan.
    """

    peak_bytes: int
    planned_bytes: int

    @property
    def difference(self) -> float:
        """Measured over planned, less one."""
        return self.peak_bytes / self.planned_bytes - 1 if self.planned_bytes else 0.0

    def metrics(self) -> dict[str, float]:
        """For the trackers."""
        return {"memory/rehearsal_peak_bytes": self.peak_bytes, "memory/rehearsal_over_plan": self.difference}

    def __str__(self) -> str:
        return f"peak {size(self.peak_bytes)}, planned {size(self.planned_bytes)} ({self.difference:+.1%})"


def rehearse(
    model: nn.Module,
    device: torch.device,
    steps: Sequence[Callable[[], object]],
    *,
    peak_bytes: Callable[[], int],
    planned_bytes: int,
) -> Rehearsal:
    """Runs `steps` and leaves weights, gradients and random states as they were.

    Args:
        model: Whose gradients the steps add to.
        device: Where it is.
        steps: The training step on the largest micro-batch, the evaluation of the largest batch.
        peak_bytes: Measures the peak.
        planned_bytes: Predicted peak.
    """
    states, device_state = random_states(), device_random_state(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for step in steps:
            step()
        measured = peak_bytes()
    finally:
        model.zero_grad(set_to_none=True)
        restore_random_states(states)
        restore_device_random_state(device_state, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return Rehearsal(measured, planned_bytes)
