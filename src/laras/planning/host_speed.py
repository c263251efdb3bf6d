"""How fast this machine's host issues work, beside the one whose rates are known."""

from __future__ import annotations

import time

_TURNS = 5_000
# Seconds of the piece on a core without another tenant of the host whose rates `laras.planning.throughput` has: 64 ns a
# turn. Source: `benchmarks/time_steps.py` on the Xeon of an H200's machine.
_KNOWN_S = _TURNS * 64e-9
_TRIES, _PIECES, _BETWEEN_S = 6, 8, 0.008  # 0.07 s; other tenants come and go within hundredths of a second
_STEP = 0.25  # so that a plan is mostly the same from one call to the next
_LEAST, _MOST = 0.5, 4.0


def host_times_as_slow() -> float:
    """How many times as long as that host this one takes, in quarters, by a fixed piece of Python at its fastest."""
    fastest_s = float("inf")
    for _ in range(_TRIES):
        fastest_s = min(fastest_s, *(piece_of_python_s() for _ in range(_PIECES)))
        time.sleep(_BETWEEN_S)
    return min(_MOST, max(_LEAST, _STEP * round(fastest_s / _KNOWN_S / _STEP)))


def piece_of_python_s() -> float:
    """Seconds of a third of a millisecond's work, as of a loop over parameters."""
    found: dict[int, int] = {}
    began = time.perf_counter()
    for number in range(_TURNS):
        found[number & 63] = found.get(number & 31, 0) + 1
    return time.perf_counter() - began
