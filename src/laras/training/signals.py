"""How a run is asked to stop, by a signal or by whoever started it.

While it trains, the step is finished and saved first; before that, what is being done is left at once. A second signal
ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from types import FrameType

from laras.errors import TrainingInterrupted
from laras.progress import Observer

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)  # not on Windows
)  # fmt: skip
# What `leave_on_signals` sends to its own process: one that does nothing where nobody handles it.
_AGAIN: signal.Signals | None = getattr(signal, "SIGURG", None)
_AGAIN_S = 0.05
_Handler = Callable[[int, FrameType | None], None]


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
    with _received_by(request.receive):
        yield request


class _Left(BaseException):
    """A signal in `leave_on_signals`; no Exception, as libraries go on after many of those."""


@contextmanager
def leave_on_signals(request: StopRequest, hint: str) -> Iterator[None]:
    """Where there is no step to finish: a signal is noted and ends the block at once, whatever it does.

    What the block writes it must write whole or not at all. The load of a C extension is finished first: much of C++
    bears no exception then, and aborts the process. A signal that came earlier and was only noted, or was lost in code
    that lets no exception through (a destructor), ends the next block at its start.

    Args:
        request: Notes the signal.
        hint: How the user goes on.

    Raises:
        TrainingInterrupted: A signal came.
    """

    def receive(number: int, frame: FrameType | None) -> None:
        request.receive(number)
        leave(number, frame)

    def leave(number: int, frame: FrameType | None) -> None:
        if _AGAIN is None or not _loads_extension(frame):
            raise _Left
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), _AGAIN))
        again.daemon = True
        again.start()

    try:
        with _received_by(receive, leave):
            if request.signal_name is not None:
                raise _Left
            yield
    except _Left:
        raise TrainingInterrupted(
            f"stopped by {request.signal_name} outside of a step; nothing is left half-written", hint=hint
        ) from None


def _loads_extension(frame: FrameType | None) -> bool:
    """Whether a C extension is being loaded somewhere up the stack."""
    while frame is not None:
        if frame.f_code.co_qualname.startswith(ExtensionFileLoader.__name__):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _received_by(handler: _Handler, again: _Handler | signal.Handlers = signal.SIG_IGN) -> Iterator[None]:
    """Handlers of `SIGNALS` and of the one that `leave_on_signals` sends, for the duration of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = dict.fromkeys(SIGNALS, handler) | ({_AGAIN: again} if _AGAIN is not None else {})
    earlier = {number: signal.signal(number, own) for number, own in handlers.items()}
    try:
        yield
    finally:
        for number, before in earlier.items():
            if before is not None:  # a handler that is not Python's, which cannot be set again
                signal.signal(number, before)


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
