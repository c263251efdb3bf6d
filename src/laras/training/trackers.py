"""Trackers beside `metrics.jsonl`: TensorBoard, Weights & Biases, trackio. None of them can hurt a run.

Each lives in a thread of its own that is fed through a queue: it cannot slow a step, ask a question, or raise into the
loop. A tracker that is absent, logged out or unreachable is announced once. Starting all of them takes at most 10
seconds, ending all of them as long; whoever is not done by then is left behind.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from laras.config import RunConfig
from laras.progress import Observer
from laras.records import write_atomically

START_LIMIT_S = 10.0
END_LIMIT_S = 10.0
_PROBE_S = 3.0
_WANDB_INIT_S = 5.0
_NOWHERE = "http://127.0.0.1:9"  # the discard port: refused at once
_QUEUE_LENGTH = 10_000  # metrics lines that a slow tracker may lag behind
_IDS_NAME = "trackers.json"
_EVENTS = "events.out.tfevents."
_SET_BACK = re.compile(r"^0\d{9}\.")

Metrics = dict[str, float]


class Tracker(Protocol):
    """One service. Its methods are called in its own thread only."""

    name: str

    def start(self) -> str | None:
        """Makes it ready; returns what a person should know, or raises."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Takes the metrics of a step."""

    def finish(self) -> None:
        """Flushes and closes."""


class TensorBoard:
    """Event files in `logs/tensorboard`."""

    name = "tensorboard"

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        self._writer: Any = None

    def start(self) -> str | None:
        """Opens a file; what other sessions wrote beyond the step of the resume is hidden by it."""
        from torch.utils.tensorboard import SummaryWriter

        earlier = _set_back_event_files(self._folder)
        hidden_from = self._first_step + 1 if self._first_step else 0
        self._writer = SummaryWriter(str(self._folder), purge_step=hidden_from if earlier else None)
        return None

    def log(self, metrics: Metrics, step: int) -> None:
        """One scalar each."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        """Closes the file."""
        self._writer.close()


class Wandb:
    """Weights & Biases: online, else offline, else off. The run's id is kept, so that a resume goes on with it."""

    name = "wandb"

    def __init__(self, run_dir: Path, config: Mapping[str, Any], run_id: str, run_name: str) -> None:
        self._run_dir, self._config, self._id, self._run_name = run_dir, config, run_id, run_name
        self._run: Any = None

    def start(self) -> str | None:
        """Joins or begins the run."""
        import wandb

        reason = self._why_offline()
        if reason is None:
            try:
                self._run = self._init(wandb, "online")
            except Exception as error:  # noqa: BLE001 - whatever the client raises, offline is the answer
                reason = _first_line(error)
                self._id += "-offline"  # the client holds on to the id
        if reason is not None:
            self._run = self._init(wandb, "offline")
            return f"wandb: offline ({reason}); `wandb sync` sends it later"
        return None

    def _init(self, wandb: Any, mode: str) -> Any:
        folder = self._run_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            init_timeout=_WANDB_INIT_S, login_timeout=1, silent=True, console="off", x_disable_stats=True,
            disable_git=True, disable_code=True, x_save_requirements=False,
        )  # fmt: skip
        if mode == "offline":
            settings.base_url = _NOWHERE  # the client asks its server even then, and waits when the process ends
            wandb.setup(settings=wandb.Settings(mode="offline", base_url=_NOWHERE))
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "laras"), id=self._id, name=self._run_name, resume="allow",
            dir=str(folder), config=dict(self._config), mode=mode, settings=settings, reinit="create_new",
        )  # fmt: skip

    def _why_offline(self) -> str | None:
        if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
            return f"WANDB_MODE={os.environ['WANDB_MODE']}"
        address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        host = urlsplit(address).hostname or ""
        if not (os.environ.get("WANDB_API_KEY") or _has_netrc(host)):
            return "not logged in"
        # The client itself would try for minutes, and again when the process ends.
        try:
            urlopen(address, timeout=_PROBE_S).close()
        except HTTPError:
            return None  # an answer, whatever it says
        except (OSError, ValueError) as error:
            return f"{host} cannot be reached: {getattr(error, 'reason', error)}"
        return None

    def log(self, metrics: Metrics, step: int) -> None:
        """One line of history."""
        self._run.log(metrics, step=step)

    def finish(self) -> None:
        """Sends the rest."""
        self._run.finish()


class Trackio:
    """trackio, which keeps its data on this machine."""

    name = "trackio"

    def __init__(self, config: Mapping[str, Any], run_name: str) -> None:
        self._config, self._run_name = config, run_name
        self._run: Any = None

    def start(self) -> str | None:
        """Joins or begins the run."""
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "laras"), name=self._run_name, config=dict(self._config),
            resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        return None

    def log(self, metrics: Metrics, step: int) -> None:
        """One line of history."""
        self._run.log(metrics, step=step)

    def finish(self) -> None:
        """Flushes."""
        self._run.finish()


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
        numbers = {
            key: float(value)
            for key, value in (logs or {}).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
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
                self.abandon(_first_line(error))
        finally:
            self.ready.set()


def build_trackers(config: RunConfig, run_dir: Path, first_step: int, observer: Observer) -> Trackers:
    """The trackers that `report_to` names and that are installed; the others are announced."""
    run_name = run_dir.resolve().name
    described = config.model_dump(mode="json")
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run_dir / "logs" / "tensorboard", first_step),
        "wandb": lambda: Wandb(run_dir, described, _run_id(run_dir, "wandb"), run_name),
        "trackio": lambda: Trackio(described, f"{run_name}-{_run_id(run_dir, 'trackio')}"),
    }
    trackers = []
    for name in dict.fromkeys(config.report_to):
        if find_spec(name) is None:
            observer.warning(f"{name}: off (not installed: pip install 'laras[{name}]'); metrics.jsonl has everything")
        else:
            trackers.append(makers[name]())
    return Trackers(trackers, observer)


def _set_back_event_files(folder: Path) -> int:
    """Sees to it that the next event file is read after all that are there; returns how many these are.

    TensorBoard reads the files of a folder in the order of their names, which begin with the second of their opening.
    Where that order could fail (two sessions within a second, a clock that was set back), the files there get their
    place in that order before their second: a number that begins with 0, as no second does until the year 2286.
    """
    names = sorted(path.name for path in folder.glob(f"{_EVENTS}*"))
    if names and names[-1] >= f"{_EVENTS}{int(time.time()):010d}":
        for place, name in enumerate(names):
            rest = _SET_BACK.sub("", name.removeprefix(_EVENTS))
            (folder / name).rename(folder / f"{_EVENTS}{place:010d}.{rest}")
    return len(names)


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


def _has_netrc(host: str) -> bool:
    """Whether `wandb login` has left a key for the host."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
