"""Runs that are killed, filled up and worn out: how often the promises of the design held.

    python benchmarks/faults.py                    # everything; about half an hour on 2 cores
    python benchmarks/faults.py --kills 20 --steps 500 --only kills
    python benchmarks/faults.py --gpu              # kills on a GPU in deterministic mode: see faults_gpu.py

kills   a tiny run is killed with SIGKILL at random instants (saving and evaluating included) and resumed until it ends;
        adapter, optimizer, counters, metrics and stopping step must be those of a run that was never killed
disk    the disk is full at every write in turn; the checkpoints before it must verify, and a resume must end the same
tmpfs   the same on file systems of some hundred KB, where every byte counts together (where mounting is permitted)
flat    many tiny steps: memory, open files and step time must not grow

Counts go to `benchmarks/results/faults.json`. The runs are forked from a process that has its imports done, so that a
kill hits training and not the start of Python.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import faults_gpu
import psutil
import torch
from tqdm import tqdm

import tiny_training as tiny
from laras.errors import LarasError
from laras.progress import Observer
from laras.rundir import RunDir, run_status
from laras.training.checkpoints import list_checkpoints
from laras.whole_folder import folder_problems
from tiny_training import SCENARIOS, Scenario, outcome

torch.set_num_threads(1)
RESULTS = Path(__file__).parent / "results" / "faults.json"
KILLED = ("padded", "packed", "early_stopping", "accumulation", "full", "qlora")
CRASHED = 99
_PR_SET_PDEATHSIG = 1
MAX_SESSIONS = 200  # of one run


def forked(work: Callable[[], None]) -> int:
    """Runs `work` in a child; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no child outlives the sweep
    tqdm.set_lock(threading.RLock())  # its own is shared with all forks: one that is killed may hold it for ever
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    code = CRASHED
    try:
        work()
        code = 0
    except LarasError as error:
        code = int(error.exit_code)
        print(error, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 - the parent counts it
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, limit_s: float | None = None) -> int | None:
    """The exit status of a child, negative for a signal; None when it still runs after `limit_s`."""
    end = None if limit_s is None else time.monotonic() + limit_s
    while True:
        found, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            return None
        time.sleep(0.001)


def session(run_dir: Path, scenario: Scenario) -> Callable[[], None]:
    """Starts a run, or goes on with it, unless it has finished."""

    def work() -> None:
        if run_status(RunDir(run_dir)) != "finished":
            tiny.train(run_dir, scenario, resume=(run_dir / "checkpoints").exists())

    return work


def was_saving(run_dir: Path) -> bool:
    """Whether a killed process left a half-written folder."""
    return any(path.name.endswith((".partial", ".old", ".removed")) for path in run_dir.rglob(".*"))


def kill_until_done(run_dir: Path, scenario: Scenario, duration_s: float, random_: random.Random) -> dict[str, int]:
    """Kills and resumes one run until it ends."""
    counts = {"kills": 0, "sessions": 0, "while saving": 0}
    while counts["sessions"] < MAX_SESSIONS:
        counts["sessions"] += 1
        child = forked(session(run_dir, scenario))
        # The first session of a run ends before its time; later ones get longer, as a machine that has become slower
        # would else never reach the next checkpoint.
        longest = 0.8 if counts["sessions"] == 1 else 1 + counts["sessions"] / 10
        status = wait(child, random_.uniform(0, duration_s * longest))
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = wait(child)
        if status == -signal.SIGKILL:
            counts["kills"] += 1
            counts["while saving"] += was_saving(run_dir)
        elif status == 0:
            return counts
        else:
            raise RuntimeError(f"{run_dir.name}: a session ended with {status}")
    raise RuntimeError(f"{run_dir.name}: not done after {MAX_SESSIONS} sessions")


def sweep_kills(folder: Path, wanted: int, seed: int, names: tuple[str, ...] = KILLED) -> dict[str, Any]:
    """At least `wanted` kills over all scenarios."""
    random_ = random.Random(seed)
    report: dict[str, Any] = {}
    references = {}
    tiny.save_base(folder / "base")
    for name in names:
        for attempt in ("whole", "again"):  # the first one reads files that are not cached yet; the second is timed
            started = time.monotonic()
            status = wait(forked(session(folder / f"{name}-{attempt}", SCENARIOS[name])))
            if status != 0:
                raise RuntimeError(f"{name}: the run that nobody disturbs ended with {status}")
        references[name] = (outcome(folder / f"{name}-whole"), time.monotonic() - started)
        report[name] = {"runs": 0, "kills": 0, "sessions": 0, "while saving": 0, "different": 0}
    number = 0
    while sum(entry["kills"] for entry in report.values()) < wanted:
        name = names[number % len(names)]
        number += 1
        expected, duration_s = references[name]
        run_dir = folder / f"{name}-{number}"
        started = time.monotonic()
        counts = kill_until_done(run_dir, SCENARIOS[name], duration_s, random_)
        if counts["sessions"] == 1:  # nobody disturbed it either: the machine has become quicker
            references[name] = (expected, min(duration_s, time.monotonic() - started))
        entry = report[name]
        entry["runs"] += 1
        for key, value in counts.items():
            entry[key] += value
        entry["different"] += outcome(run_dir) != expected
        print(f"kills: {name}: {entry}")
        shutil.rmtree(run_dir)
    return report


class FullDisk(Observer):
    """From a step on, the kernel refuses to write beyond `limit_bytes` of a file, as it does on a full disk."""

    def __init__(self, limit_bytes: int, step: int) -> None:
        self.limit_bytes, self.step = limit_bytes, step

    def step_finished(self, report: Any) -> None:
        if report.step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write itself fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit_bytes, self.limit_bytes))


def sweep_full_disks(folder: Path, scenario_name: str = "padded") -> dict[str, Any]:
    """Every limit that some file of a checkpoint is the first to pass."""
    scenario = SCENARIOS[scenario_name]
    whole = folder / "disk-whole"
    if wait(forked(session(whole, scenario))) != 0:
        raise RuntimeError("the run that nobody disturbs failed")
    expected = outcome(whole)
    sizes = {path.stat().st_size for path in (whole / "checkpoints" / "step-6").iterdir()}
    report = {"limits": 0, "clear error": 0, "checkpoint before it good": 0, "same end after a resume": 0}
    for limit in sorted({0, *(size - 1 for size in sizes if size)}):
        run_dir = folder / f"disk-{limit}"
        observer = FullDisk(limit, step=4)
        status = wait(forked(lambda: tiny.train(run_dir, scenario, observer=observer) and None))  # noqa: B023
        newest = list_checkpoints(run_dir / "checkpoints")[-1]
        report["limits"] += 1
        report["clear error"] += status == 6
        report["checkpoint before it good"] += newest[0] == 3 and not folder_problems(newest[1])
        wait(forked(session(run_dir, scenario)))
        report["same end after a resume"] += outcome(run_dir) == expected
    print(f"disk: {report}")
    return report


def mounted(folder: Path, size_kb: int) -> bool:
    """Makes a folder a file system of so many KB; says whether that is permitted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def sweep_small_disks(folder: Path, sizes: int, scenario_name: str = "padded") -> dict[str, Any]:
    """Disks on which a run ends sooner or later; then with room again."""
    scenario = SCENARIOS[scenario_name]
    place = folder / "disk"
    report = {"disks": 0, "clear error": 0, "checkpoints good": 0, "same end after a resume": 0}
    if not mounted(place, 64 * 1024):
        return {**report, "permitted": False}
    try:
        if wait(forked(session(place / "run", scenario))) != 0:
            raise RuntimeError("the run that nobody disturbs failed")
        expected, used = outcome(place / "run"), shutil.disk_usage(place).used
    finally:
        subprocess.run(["umount", str(place)], check=True)
    for number in range(1, sizes + 1):
        mounted(place, used * number // (sizes + 1) // 1024)
        try:
            status = wait(forked(session(place / "run", scenario)))
            newest = list_checkpoints(place / "run" / "checkpoints")
            report["disks"] += 1
            report["clear error"] += status == 6
            report["checkpoints good"] += not any(folder_problems(path) for _, path in newest)
            subprocess.run(["mount", "-o", f"remount,size={64 * 1024}k", str(place)], check=True)
            wait(forked(session(place / "run", scenario)))
            report["same end after a resume"] += outcome(place / "run") == expected
        finally:
            subprocess.run(["umount", str(place)], check=True)
    print(f"tmpfs: {report}")
    return {**report, "permitted": True}


def fixed_work_s() -> float:
    """Processor time of one and the same loop: what a busy neighbour or a lower clock lengthens as it does a step."""
    started = time.process_time()
    sum(range(100_000))
    return time.process_time() - started


class Wear(Observer):
    """Measures this process every `every` steps; `step_work` is a step's processor time over that of a fixed loop."""

    def __init__(self, every: int) -> None:
        self.every, self.process = every, psutil.Process()
        self.resident: list[int] = []
        self.files: list[int] = []
        self.step_s: list[float] = []
        self.step_work: list[float] = []
        self._started = time.process_time()

    def step_finished(self, report: Any) -> None:
        if report.step % self.every == 0:
            self.step_s.append((time.process_time() - self._started) / self.every)
            self.step_work.append(self.step_s[-1] / fixed_work_s())
            self.resident.append(self.process.memory_info().rss)
            self.files.append(self.process.num_fds())
            self._started = time.process_time()


def wear(folder: Path, steps: int) -> dict[str, Any]:
    """Many steps, with logging, validation and saving: the last tenth beside the second, and of time halves."""
    observer = Wear(max(1, steps // 100))
    scenario = Scenario(
        2, 1, choices={"eval_steps": steps // 20, "save_steps": steps // 20, "logging_steps": 10},
        config={"max_steps": steps, "report_to": ["tensorboard"]},
    )  # fmt: skip
    tiny.train(folder / "wear", scenario, observer=observer)
    tenth, half = max(1, len(observer.step_s) // 10), len(observer.step_s) // 2

    def growth(values: list[Any], count: int) -> float:
        """Of the median of the last `count` over that of as many after the first tenth."""
        return statistics.median(values[-count:]) / statistics.median(values[tenth : tenth + count]) - 1

    report = {
        "steps": steps,
        "resident_bytes": [observer.resident[tenth], observer.resident[-1]],
        "resident_growth": growth(observer.resident, tenth),
        "open_files": [observer.files[tenth], observer.files[-1]],
        "step_s": [statistics.median(observer.step_s[tenth : 2 * tenth]), statistics.median(observer.step_s[-tenth:])],
        "step_time_growth": growth(observer.step_work, half),  # a neighbour may well be busy for a tenth
    }
    print(f"flat: {report}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--scenarios", default=",".join(KILLED), help="of the kills on a CPU")
    parser.add_argument("--disks", type=int, default=40, help="sizes of small disks")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=("kills", "disk", "tmpfs", "flat"))
    parser.add_argument("--gpu", action="store_true", help="at least 12 kills of runs on a GPU, and nothing else")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of --gpu")
    parser.add_argument("--limit-s", type=float, default=100, help="of --gpu: seconds after which no kill comes")
    parser.add_argument("--gpu-session", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gpu_session:
        faults_gpu.run_session(arguments.device)
        return
    only = "gpu" if arguments.gpu else arguments.only
    results: dict[str, Any] = json.loads(path.read_text()) if (path := arguments.results).exists() else {}

    def keep(name: str, found: Any) -> None:
        results[name] = found
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")

    def keep_gpu(found: Any) -> None:
        keep("gpu", found)  # whoever is cut short has told so much

    stages: dict[str, Callable[[Path], Any]] = {
        "kills": lambda folder: sweep_kills(
            folder, arguments.kills or 200, arguments.seed, tuple(arguments.scenarios.split(","))
        ),
        "disk": sweep_full_disks,
        "tmpfs": lambda folder: sweep_small_disks(folder, arguments.disks),
        "flat": lambda folder: wear(folder, arguments.steps),
        "gpu": lambda folder: faults_gpu.sweep(
            folder, arguments.kills or 12, arguments.seed, arguments.device, arguments.limit_s, keep_gpu
        ),
    }
    for name, stage in stages.items():
        if only == name or (only is None and name != "gpu"):
            with tempfile.TemporaryDirectory(prefix="laras-faults-") as folder:
                started = time.monotonic()
                keep(name, {**stage(Path(folder)), "elapsed_s": round(time.monotonic() - started)})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
