"""How long steps take on a GPU, by a host whose cores are not all free.

    python benchmarks/time_steps.py --out DIR --budget-s 540 [--keys FILE] [--blind]   # DIR/step_time_measured.jsonl

The cases are those of `memory.py`. On a rented machine other tenants share its cores: a fixed piece of Python takes
now 0.064 us a turn, now 0.13, for a tenth of a second or for seconds, and so does all that the host issues. So the
threads that issue a step are bound to a core on which that piece is fast just now, before every step, and the piece
runs again after it: where it was slow, the step is `busy`. Which steps count is decided by that piece alone, never by
how long they took. A row holds all steps; `micro_s` is the median of those that were not busy, or of all if all were.

With --device one step more runs under torch's profiler: the seconds in which kernels ran, and how many there were. A
second call goes on: what was timed is not timed again.

In `results/h200/step_time_measured.jsonl`, rows of `run` 1, with `steps_s`, were timed before cores were chosen: on
any core, with the piece's time before and after (`host`) and how long the host took to issue each step (`issued_s`).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import memory

from laras.planning.host_speed import piece_of_python_s

FILE = "step_time_measured.jsonl"
LEAST_STEPS, LEAST_S, MOST_S = 5, 0.5, 3.0
_WARM_STEPS = 3
_FREE = 1.25  # times the fastest that was seen; beside another tenant it takes 1.6 to 2 times as long


class FreeCore:
    """Binds the threads that issue a step to one core that has no other tenant just now."""

    def __init__(self) -> None:
        self._cores = sorted(os.sched_getaffinity(0))
        self._fastest_s = min(piece_of_python_s() for _ in range(200))
        self._is_bound = False

    def settle(self) -> bool:
        """Looks for a core, from the present one on; whether there is one."""
        if not self._is_bound or not self.is_free():
            for core in random.sample(self._cores, len(self._cores)):
                self._bind({core})
                if self.is_free():
                    return True
        return self.is_free()

    def leave(self) -> None:
        """All cores again, which building a model keeps busy."""
        self._bind(set(self._cores))
        self._is_bound = False

    def _bind(self, cores: set[int]) -> None:
        """This thread, which issues forward, and autograd's, which issue backward while this one waits."""
        os.sched_setaffinity(0, cores)
        for thread in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                if (thread / "comm").read_text().startswith("pt_autograd"):
                    os.sched_setaffinity(int(thread.name), cores)
        self._is_bound = True

    def is_free(self) -> bool:
        """Whether the piece is fast on the present core."""
        found = min(piece_of_python_s() for _ in range(3))
        self._fastest_s = min(self._fastest_s, found)
        return found <= _FREE * self._fastest_s


def timed(case: memory.Case, core: FreeCore, *, with_device: bool) -> dict[str, Any]:
    """A row; the seconds of steps are those of an optimizer step, of `accumulation` micro-batches."""
    import torch

    from laras.models.step import path_of

    ready = memory.prepared(case)
    for _ in range(_WARM_STEPS):
        ready.optimizer_step()
    torch.cuda.synchronize()
    free_s: list[float] = []
    busy_s: list[float] = []
    began = time.perf_counter()
    try:
        while (len(free_s) < LEAST_STEPS or sum(free_s) < LEAST_S) and time.perf_counter() - began < MOST_S:
            was_free = core.settle()
            started = time.perf_counter()
            ready.optimizer_step()
            torch.cuda.synchronize()
            step_s = time.perf_counter() - started
            (free_s if was_free and core.is_free() else busy_s).append(round(step_s, 6))
    finally:
        core.leave()
    row: dict[str, Any] = {
        "micro_s": median(free_s or busy_s) / ready.accumulation,
        "accumulation": ready.accumulation,
        "fused": path_of(ready.model).fused is not None,
        "free_s": free_s,
        "busy_s": busy_s,
    }
    if with_device:
        row |= _on_device(ready)
    return row


def _on_device(ready: memory.Prepared) -> dict[str, Any]:
    """Of one step: seconds in which the device's kernels ran, and how many there were."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ready.optimizer_step()
        torch.cuda.synchronize()
    kernels = [one for one in profile.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    return {"device_s": round(sum(one.device_time for one in kernels) / 1e6, 6), "kernels": len(kernels)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", type=Path, help="a file of cases, one a line; without it all")
    parser.add_argument("--blind", action="store_true", help="the other shapes of memory.py")
    parser.add_argument("--device", action="store_true", help="one step more, under the profiler")
    parser.add_argument("--budget-s", type=float, default=540)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found, core = memory.blind_cases() if options.blind else memory.cases(), FreeCore()
    if options.keys:
        wanted = set(options.keys.read_text().splitlines())
        found = [case for case in found if case.key in wanted]

    def run(case: memory.Case) -> dict[str, Any]:
        return timed(case, core, with_device=options.device)

    return 0 if memory.measure(options.out / FILE, found, options.budget_s, run, ("micro_s",)) else 3


if __name__ == "__main__":
    sys.exit(main())
