"""How fast this machine's host issues work, beside the one whose rates are known."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

_TURNS = 5_000
# Seconds of the piece on a core without another tenant of the host whose rates `laras.planning.throughput` has: 64 ns a
# turn. Source: `benchmarks/time_steps.py` on the Xeon of an H200's machine.
_KNOWN_S = _TURNS * 64e-9
_TRIES, _PIECES, _BETWEEN_S = 6, 8, 0.008  # 0.07 s
_STEP = 0.25  # so that a plan is mostly the same from one call to the next
_LEAST, _MOST = 0.5, 4.0


def host_times_as_slow() -> float:
    """How many times as long as that host this one takes, in quarters, by a fixed piece of Python at its fastest.

    Another tenant can stay on a core for seconds, so the piece runs on several, in a thread that ends with its binding.
    """
    with ThreadPoolExecutor(1) as thread:
        fastest_s = thread.submit(_fastest_s).result()
    return min(_MOST, max(_LEAST, _STEP * round(fastest_s / _KNOWN_S / _STEP)))


def _fastest_s() -> float:
    found = []
    for number in range(_TRIES):
        _go_to_core(number)
        found += [piece_of_python_s() for _ in range(_PIECES)]
        time.sleep(_BETWEEN_S)
    return min(found)


def _go_to_core(number: int) -> None:
    """Binds this thread to one of so many cores, far apart, that the process may use; where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(os.getpid()))
        with suppress(OSError):
            os.sched_setaffinity(0, {cores[number * len(cores) // _TRIES]})


def piece_of_python_s() -> float:
    """Seconds of a third of a millisecond's work, as of a loop over parameters."""
    found: dict[int, int] = {}
    began = time.perf_counter()
    for number in range(_TURNS):
        found[number & 63] = found.get(number & 31, 0) + 1
    return time.perf_counter() - began
