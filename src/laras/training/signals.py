"""Signals that ask a run to stop: the step is finished and saved first; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from laras.progress import Observer

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)  # not on Windows
)  # fmt: skip


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Notes the first signal; the second ends the process at once, which loses no checkpoint."""
        if self.signal_name is not None:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns signals into a request for the duration of the block. Only the main thread of a process can do that."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    earlier = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class StoppableProgress(Observer):
    """Passes progress on, and asks at every batch whether to go on."""

    def __init__(self, inner: Observer, check: Callable[[], None]) -> None:
        self._inner, self._check = inner, check

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        """Passed on, then the check, which may raise."""
        self._inner.stage_progress(done, total, unit)
        self._check()
