"""The first signal asks, the second ends; elsewhere than in the main thread nothing is installed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from laras.training.signals import SIGNALS, stop_on_signals

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
