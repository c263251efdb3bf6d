"""All that the planner wants to know of a GPU, in one call that can be repeated until nothing is left.

    python benchmarks/planner_session.py --out DIR --budget-s 560  # a GPU of 80 GB or more; random weights, no network

In the order of what is worth most: the plans of 8B LoRA under memory caps (`cap_grid.py`), blind predictions of shapes
that were never measured, the published cases on today's layers (`memory.py`), then the other plans under caps. Each
result is a line of a file in DIR as soon as it is there; DIR begins with what is known of this card, and what has a
line is not measured again. The status is 3 where something is left.

Before it, for a card that is new, on a CPU: `cap_grid.py plan --gpu NAME`, `memory.py predict --gpu NAME` and the same
with `--blind`. Afterwards, with DIR's files in the card's folder of `benchmarks/results`: `cap_grid.py report --gpu
NAME`, `memory.py report --gpu NAME`, with `--blind` too, `step_time.py record` and `fit`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import memory

HERE = Path(__file__).resolve().parent
# Script and arguments.
ORDER = (
    ("cap_grid.py", "measure", "--only", "llama-3.1-8b|lora"),
    ("memory.py", "--blind", "measure"),
    ("memory.py", "--today", "measure"),
    ("cap_grid.py", "measure"),
)
KEPT = ("cap_grid_plans.jsonl", "cap_grid_measured.jsonl", "memory_today_measured.jsonl", "memory_blind_measured.jsonl")
_LEAST_S, _GRACE_S = 30, 45  # a script looks at the clock between cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=560)
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    known = memory.results_of(memory.card())
    for name in KEPT:
        if (known / name).exists() and not (options.out / name).exists():
            shutil.copy(known / name, options.out / name)
    left_over = False
    for script, *arguments in ORDER:
        left_s = options.budget_s - (time.monotonic() - started)
        if left_s < _LEAST_S:
            return 3
        command = [sys.executable, str(HERE / script), *arguments, "--results", str(options.out)]
        try:
            ran = subprocess.run([*command, "--budget-s", str(left_s)], check=False, timeout=left_s + _GRACE_S)
            left_over |= ran.returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{script} did not end in time", flush=True)
            return 3
    return 3 if left_over else 0


if __name__ == "__main__":
    sys.exit(main())
