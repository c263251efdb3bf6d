"""Where it trains the first signal asks and the second ends; elsewhere the first one leaves the block.

Elsewhere than in the main thread nothing is installed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from laras.errors import TrainingInterrupted
from laras.training.signals import SIGNALS, StopRequest, leave_on_signals, stop_on_signals

TWICE = """
import os, signal
from laras.training.signals import stop_on_signals
with stop_on_signals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop and stop.signal_name == "SIGTERM"
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never", flush=True)
"""


def test_the_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "asked\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_one_is_a_request_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop and stop.signal_name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_thread_gets_a_request_that_no_signal_reaches() -> None:
    seen = []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize("number", SIGNALS)
def test_where_no_step_is_to_be_finished_a_signal_leaves_at_once(number: int) -> None:
    request, before, reached = StopRequest(), signal.getsignal(number), []
    name = signal.Signals(number).name
    with pytest.raises(TrainingInterrupted, match=f"stopped by {name}") as caught, leave_on_signals(request, "again"):
        with suppress(Exception):  # as libraries do
            signal.raise_signal(number)
        reached.append(True)
    assert not reached and caught.value.hint == "again" and caught.value.__suppress_context__
    assert request.signal_name == name and signal.getsignal(number) is before


def test_a_signal_that_was_only_noted_ends_the_next_block_at_its_start() -> None:
    request, reached = StopRequest(), []
    with leave_on_signals(request, "never"), stop_on_signals(request):
        signal.raise_signal(signal.SIGTERM)
        reached.append("what is written, whole")
    with pytest.raises(TrainingInterrupted), leave_on_signals(request, "again"):
        reached.append("what comes after")
    assert reached == ["what is written, whole"]


class ExtensionFileLoader:
    """Named as the one of the standard library, in whose frames C extensions are loaded."""

    def exec_module(self) -> bool:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        return True


def test_a_c_extension_is_loaded_to_its_end() -> None:
    loaded, deadline = False, time.monotonic() + 30
    with pytest.raises(TrainingInterrupted), leave_on_signals(StopRequest(), "again"):
        loaded = ExtensionFileLoader().exec_module()
        while time.monotonic() < deadline:
            time.sleep(0.01)
    assert loaded and time.monotonic() < deadline
