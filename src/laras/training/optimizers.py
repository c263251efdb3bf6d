"""Optimizers with states from the start; those of bitsandbytes without their waiting, and paged after a resume, too.

Upstream's `step` waits for the device after every parameter: an adapter has hundreds, each of which costs a round trip
of some 50 microseconds. Its kernels and its prefetching run in order on one stream, so nothing needs the waiting but a
host that reads paged memory, which is when a checkpoint is saved: `settle` waits there.

Source: bitsandbytes 0.50.2 `optim/optimizer.py`, `Optimizer8bit.step` and `get_state_buffer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from laras.models.device_memory import required

_QUEUEING: dict[type, type] = {}


def queue_steps(optimizer: Optimizer) -> Optimizer:
    """Makes an optimizer of bitsandbytes queue its whole step; leaves any other as it is."""
    if is_bitsandbytes(optimizer):
        kind = type(optimizer)
        if kind not in _QUEUEING:
            _QUEUEING[kind] = _queueing(kind)
        optimizer.__class__ = _QUEUEING[kind]
    return optimizer


def is_bitsandbytes(optimizer: Any) -> bool:
    """Whether an optimizer keeps its states as bitsandbytes does."""
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(optimizer).__mro__)


def inner_of(optimizer: Any) -> Any:
    """Without the wrapper of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


@required("the optimizer's states")
def create_states(optimizer: Any) -> None:
    """Makes every state that is missing as the first step would make it, so that no step takes memory for them.

    Raises:
        OutOfMemoryError: They do not fit; no step has been taken yet.
    """
    for group_index, group in enumerate(optimizer.param_groups):
        if is_bitsandbytes(optimizer):
            _make_ready(optimizer)
            for index, parameter in enumerate(group["params"]):
                if not optimizer.state[parameter]:
                    optimizer.init_state(group, parameter, group_index, index)
            continue
        try:
            for parameter in group["params"]:  # one without gradient gets no state; these take no room
                parameter.grad = parameter.new_zeros(()).expand_as(parameter)
            optimizer._init_group(group, [], [], [], [], [], [])
        finally:
            optimizer.zero_grad()


def settle(optimizer: Any) -> None:
    """Waits until paged states hold what was computed, so that the host may read them."""
    if getattr(optimizer, "is_paged", False) and torch.cuda.is_available():
        torch.cuda.synchronize()


def page_states(optimizer: Any) -> None:
    """Puts loaded states where the optimizer would have made them: large ones into paged memory again.

    `load_state_dict` leaves them in ordinary memory of the device, where they take what was not planned for.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name in ("state1", "state2"):
                loaded = state.get(name)
                if isinstance(loaded, Tensor):
                    buffer = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
                    buffer.copy_(loaded)
                    state[name] = buffer


def _queueing(kind: type[Optimizer]) -> type[Optimizer]:
    """A subclass whose step is upstream's, less the waiting."""
    step = Optimizer.profile_hook_step(_step)
    step.hooked = True  # type: ignore[attr-defined]
    return type(f"Queued{kind.__name__}", (kind,), {"step": step, "__module__": kind.__module__})


@torch.no_grad()
def _step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    _make_ready(self)
    for group_index, group in enumerate(self.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.init_state(group, parameter, group_index, index)
            self.prefetch_state(parameter)
            self.update_step(group, parameter, group_index, index)
    return loss


def _make_ready(optimizer: Any) -> None:
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
