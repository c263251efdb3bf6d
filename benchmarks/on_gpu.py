"""All that waits for a GPU, in one call that can be repeated: the cards there are share it.

    python benchmarks/on_gpu.py --out DIR --budget-s 570 [--only tests,planner]

With one card the parts run one after the other; with two, the planner's measurements have the second to themselves.
Each part keeps what it finds in a folder of its own in DIR as soon as it is there; the log of each lies beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
# Run before the others, on two cards together.
TOGETHER = ("two", 120, ("-m", "pytest", "-q", "--tb=short", str(HERE.parent / "tests/gpu/test_two_gpus.py")))
# Name, card where there are two, most seconds, command; PART is the part's folder, LEFT the seconds that it has.
PARTS = (
    ("tests", 0, 300, ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(HERE.parent / "tests/gpu"))),
    ("faults", 0, 150, (str(HERE / "faults.py"), "--gpu")),
    ("variants", 0, 420, (
        str(HERE / "throughput.py"), "--session", "--groups", "variants", "--out", "PART", "--budget-s", "LEFT",
    )),
    ("planner", 1, 570, (str(HERE / "planner_session.py"), "--out", "PART", "--budget-s", "LEFT")),
)  # fmt: skip
_LEAST_S, _GRACE_S = 20, 15


def run_part(name: str, most_s: float, command: tuple[str, ...], card: str, out: Path, ends_at: float) -> None:
    """Runs one part on one card, as long as it may; its output goes to a log."""
    left_s = min(most_s, ends_at - time.monotonic())
    if left_s < _LEAST_S:
        print(f"{name}: no time is left", flush=True)
        return
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    filled = [{"PART": str(folder), "LEFT": str(int(left_s))}.get(word, word) for word in command]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": card, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with (folder / "log.txt").open("ab") as log:
        try:
            ran = subprocess.run(
                [sys.executable, *filled], env=environment, stdout=log, stderr=subprocess.STDOUT,
                timeout=left_s + _GRACE_S, check=False,
            )  # fmt: skip
            ended = f"status {ran.returncode}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
    print(f"{name} on card {card}: {ended} after {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=570)
    parser.add_argument("--only", default=",".join(name for name, *_ in (TOGETHER, *PARTS)))
    options = parser.parse_args()
    import torch

    cards = min(2, max(1, torch.cuda.device_count()))
    ends_at = time.monotonic() + options.budget_s

    def lane(card: int) -> None:
        for name, wanted, most_s, command in PARTS:
            if name in options.only.split(",") and min(wanted, cards - 1) == card:
                run_part(name, most_s, command, str(card), options.out, ends_at)

    if cards > 1 and TOGETHER[0] in options.only.split(","):
        run_part(*TOGETHER, "0,1", options.out, ends_at)
    lanes = [threading.Thread(target=lane, args=(card,)) for card in range(cards)]
    for one in lanes:
        one.start()
    for one in lanes:
        one.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
