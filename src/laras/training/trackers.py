"""Trackers beside `metrics.jsonl`: TensorBoard, Weights & Biases, trackio. None of them can hurt a run.

Each lives in a thread of its own that is fed through a queue: it cannot slow a step, ask a question, or raise into the
loop. A tracker that is absent, logged out or unreachable is announced once. Starting all of them takes at most 10
seconds, ending all of them as long; whoever is not done by then is left behind.
"""

from __future__ import annotations

import json
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from laras.config import RunConfig
from laras.progress import Observer
from laras.record_base import write_atomically
from laras.records import TrainPlan
from laras.training.tracker_clients import (
    Described,
    Metrics,
    TensorBoard,
    Tracker,
    Trackio,
    Wandb,
    finite_numbers,
    first_line,
)

START_LIMIT_S = END_LIMIT_S = 9.5  # of the 10 seconds that a failing tracker may cost
_QUEUE_LENGTH = 10_000  # metrics lines that a slow tracker may lag behind
_IDS_NAME = "trackers.json"


class Trackers(TrainerCallback):
    """Feeds every tracker what the trainer logs.

    Args:
        trackers: The trackers of the run.
        observer: Told once what is not available.
    """

    def __init__(self, trackers: list[Tracker], observer: Observer) -> None:
        self._workers = [_Worker(tracker) for tracker in trackers]
        self._observer = observer

    def start(self) -> float:
        """Starts all at once and waits for them, at most `START_LIMIT_S`; returns the seconds it took."""
        started = time.monotonic()
        with redirect_stdout(sys.stderr):  # standard output is for data; some clients print
            for worker in self._workers:
                worker.thread.start()
            for worker in self._workers:
                worker.ready.wait(max(0.0, START_LIMIT_S - (time.monotonic() - started)))
                if not worker.ready.is_set():
                    worker.abandon(f"did not start within {START_LIMIT_S:.0f} s")
        for worker in self._workers:
            self._announce(worker)
        return time.monotonic() - started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Queues the finite numbers of one step."""
        numbers = finite_numbers(logs or {})
        for worker in self._workers:
            worker.put(numbers, state.global_step)
            self._announce(worker)

    def finish(self) -> None:
        """Flushes all at once, at most `END_LIMIT_S`."""
        started = time.monotonic()
        with redirect_stdout(sys.stderr):
            for worker in self._workers:
                worker.put(None, 0)
            for worker in self._workers:
                if not worker.works:  # given up, and waited for already
                    continue
                worker.thread.join(max(0.0, END_LIMIT_S - (time.monotonic() - started)))
                if worker.thread.is_alive() and worker.works:
                    worker.abandon(f"did not finish within {END_LIMIT_S:.0f} s; its last metrics may be missing there")
        for worker in self._workers:
            self._announce(worker)

    def _announce(self, worker: _Worker) -> None:
        if worker.announcement:
            self._observer.warning(worker.announcement)
            worker.announcement = None


class _Worker:
    """The thread of one tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self.works = True
        self.announcement: str | None = None
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"tracker-{tracker.name}", daemon=True)
        self._tracker = tracker
        self._queue: queue.Queue[tuple[Metrics | None, int]] = queue.Queue(_QUEUE_LENGTH)

    def put(self, metrics: Metrics | None, step: int) -> None:
        """Queues metrics; None ends the tracker."""
        if not self.works:
            return
        try:
            self._queue.put_nowait((metrics, step))
        except queue.Full:
            self.abandon(f"lags {_QUEUE_LENGTH} lines behind")

    def abandon(self, reason: str) -> None:
        """Stops feeding it."""
        self.works = False
        self.announcement = f"{self._tracker.name}: off ({reason}); metrics.jsonl has everything"

    def _run(self) -> None:
        try:
            message = self._tracker.start()
            if self.works:  # not given up in the meantime
                self.announcement = message
            self.ready.set()
            while self.works:
                metrics, step = self._queue.get()
                if metrics is None:
                    self._tracker.finish()
                    return
                self._tracker.log(metrics, step)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - no tracker's failure is the run's
            if self.works:
                self.abandon(first_line(error))
        finally:
            self.ready.set()


def build_trackers(config: RunConfig, plan: TrainPlan, run_dir: Path, first_step: int, observer: Observer) -> Trackers:
    """The trackers that `report_to` names and that are installed; the others are announced."""
    run_name = run_dir.resolve().name
    described = Described(config, plan)
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run_dir / "logs" / "tensorboard", described, first_step),
        "wandb": lambda: Wandb(run_dir, described, _run_id(run_dir, "wandb"), run_name, first_step),
        "trackio": lambda: Trackio(run_dir, described, f"{run_name}-{_run_id(run_dir, 'trackio')}", first_step),
    }
    trackers = []
    for name in dict.fromkeys(config.report_to):
        if find_spec(name) is None:
            observer.warning(f"{name}: off (not installed: pip install 'laras[{name}]'); metrics.jsonl has everything")
        else:
            trackers.append(makers[name]())
    return Trackers(trackers, observer)


def _run_id(run_dir: Path, name: str) -> str:
    """The id of this run at a tracker, the same after every resume."""
    path = run_dir / "logs" / _IDS_NAME
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(ids, dict):
            ids = {}
    except (OSError, ValueError):
        ids = {}
    if not isinstance(ids.get(name), str):
        ids[name] = secrets.token_hex(4)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(ids) + "\n")
        except OSError:
            pass  # a full disk; the id holds for this session
    return str(ids[name])
