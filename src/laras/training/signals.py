"""How a run is asked to stop, by a signal or by whoever started it: the step is finished and saved first.

A second signal ends the process at once.
"""

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
    """Whether the run was asked to stop, and by what: the name of a signal, or a reason in a few words."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """Asks as a signal does; the first reason stays."""
        self.reason = self.reason or reason

    def withdraw(self) -> None:
        """Forgets what was asked, for the next run under the same request; a signal is not forgotten."""
        self.reason = None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Notes the first signal; the second ends the process at once, which loses no checkpoint."""
        if self.signal_name is not None:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal_name is not None or self.reason is not None


@contextmanager
def stop_on_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Turns signals into a request for the duration of the block. Only the main thread of a process can do that.

    Args:
        request: One that others can ask through as well; None: a new one.
    """
    request = request if request is not None else StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    earlier = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class EvaluationStopped(Exception):
    """A signal came during an evaluation; it is done after the resume."""


class StoppableProgress(Observer):
    """Passes progress on, and asks at every batch whether to go on."""

    def __init__(self, inner: Observer, check: Callable[[], None]) -> None:
        self._inner, self._check = inner, check

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        """Passed on, then the check, which may raise."""
        self._inner.stage_progress(done, total, unit)
        self._check()
