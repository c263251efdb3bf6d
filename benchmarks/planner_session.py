"""All that the planner wants to know of a GPU, in one call that can be repeated until nothing is left.

    python benchmarks/planner_session.py --out DIR --budget-s 560     # one GPU of 80 GB; random weights, no network

In the order of what is worth most: what is missing of the plans under memory caps (`cap_grid.py`), the published cases
on today's layers, then blind predictions of shapes that were never measured (`memory.py`). Each result is a line of a
file in DIR as soon as it is there; DIR begins with what `benchmarks/results` has, and what has a line is not measured
again. Afterwards, on a CPU, with DIR's files in `benchmarks/results`: `cap_grid.py report`, `memory.py --blind report`,
`memory.py report`, `step_time.py record` and `fit`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Script, arguments, and the most seconds of it in one call.
ORDER = (
    ("cap_grid.py", ("measure",), 700),
    ("memory.py", ("--today", "measure"), 700),
    ("memory.py", ("--blind", "measure"), 700),
)
KEPT = ("cap_grid_plans.jsonl", "cap_grid_measured.jsonl", "memory_today_measured.jsonl", "memory_blind_measured.jsonl")
_LEAST_S, _GRACE_S = 30, 60  # a script looks at the clock between cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=560)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        known = HERE / "results" / name
        if known.exists() and not (options.out / name).exists():
            shutil.copy(known, options.out / name)
    started = time.monotonic()
    for script, arguments, most_s in ORDER:
        left_s = options.budget_s - (time.monotonic() - started)
        if left_s < _LEAST_S:
            return 3
        command = [sys.executable, str(HERE / script), *arguments, "--results", str(options.out)]
        limit_s = min(most_s, left_s)
        try:
            subprocess.run([*command, "--budget-s", str(limit_s)], check=False, timeout=limit_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            print(f"{script} did not end in time", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
