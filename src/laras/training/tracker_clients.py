"""The services that `report_to` names, each as the trackers' threads use it: start, log, finish."""

from __future__ import annotations

import math
import netrc
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from laras.config import RunConfig
from laras.records import TrainPlan
from laras.training.callbacks.metrics_log import lines_until
from laras.training.tables import (
    CONFIG_COLUMNS,
    PLAN_COLUMNS,
    config_rows,
    config_values,
    markdown_table,
    plan_rows,
    plan_values,
)

_PROBE_S = 3.0
_WANDB_INIT_S = 5.0
_NOWHERE = "http://127.0.0.1:9"  # the discard port: refused at once
_EVENTS = "events.out.tfevents."
_PLACES = ("epoch", "time_s")
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


@dataclass(frozen=True)
class Described:
    """What a tracker tells about a run beside its curves."""

    config: RunConfig
    plan: TrainPlan

    def values(self) -> dict[str, Any]:
        """The configuration under its keys, the plan as `plan.…`."""
        return config_values(self.config) | {f"plan.{key}": value for key, value in plan_values(self.plan).items()}


class TensorBoard:
    """Event files in `logs/tensorboard`."""

    name = "tensorboard"

    def __init__(self, folder: Path, described: Described, first_step: int) -> None:
        self._folder, self._described, self._first_step = folder, described, first_step
        self._writer: Any = None

    def start(self) -> str | None:
        """Opens a file; what other sessions wrote beyond the step of the resume is hidden by it."""
        from torch.utils.tensorboard import SummaryWriter

        earlier = _set_back_event_files(self._folder)
        hidden_from = self._first_step + 1 if self._first_step else 0
        self._writer = SummaryWriter(str(self._folder), purge_step=hidden_from if earlier else None)
        if hidden_from == 0 or not earlier:
            config, plan = self._described.config, self._described.plan
            self._writer.add_text("config", markdown_table(CONFIG_COLUMNS, config_rows(config)), 0)
            self._writer.add_text("plan", markdown_table(PLAN_COLUMNS, plan_rows(plan)), 0)
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

    def __init__(self, run_dir: Path, described: Described, run_id: str, run_name: str, first_step: int) -> None:
        self._run_dir, self._described, self._id, self._run_name = run_dir, described, run_id, run_name
        self._first_step = first_step
        self._run: Any = None

    def start(self) -> str | None:
        """Joins or begins the run."""
        import wandb

        if os.environ.get("WANDB_MODE") == "disabled":
            self._run = wandb.init(mode="disabled")
            return "wandb: off (WANDB_MODE=disabled)"
        reason = self._why_offline()
        if reason is None:
            try:
                self._run = self._init(wandb, "online")
            except Exception as error:  # noqa: BLE001 - whatever the client raises, offline is the answer
                reason = first_line(error)
                self._id += "-offline"  # the client holds on to the id
        if reason is not None:
            self._run = self._init(wandb, "offline")
        known_until = self._run.starting_step  # by the service; nothing when offline
        if known_until == 0:
            table = wandb.Table(columns=list(PLAN_COLUMNS), data=plan_rows(self._described.plan))
            self._run.log({"plan": table}, step=0)
        for step, metrics in logged_until(self._run_dir, self._first_step):
            if step >= known_until:  # what a killed client did not write any more
                self._run.log(metrics, step=step)
        return f"wandb: offline ({reason}); `wandb sync` sends it later" if reason is not None else None

    def _init(self, wandb: Any, mode: str) -> Any:
        folder = self._run_dir.resolve() / "logs"  # the client's own process may stand in another folder
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
            dir=str(folder), config=self._described.values(), mode=mode, settings=settings, reinit="create_new",
        )  # fmt: skip

    def _why_offline(self) -> str | None:
        if os.environ.get("WANDB_MODE") == "offline":
            return "WANDB_MODE=offline"
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

    def __init__(self, run_dir: Path, described: Described, run_name: str, first_step: int) -> None:
        self._run_dir, self._described, self._run_name, self._first_step = run_dir, described, run_name, first_step
        self._run: Any = None
        self._known: frozenset[tuple[int, str]] = frozenset()

    def start(self) -> str | None:
        """Joins or begins the run."""
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "laras")
        self._known = _known_to_trackio(project, self._run_name)
        self._run = trackio.init(
            project=project, name=self._run_name, config=self._described.values(), resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        for step, metrics in logged_until(self._run_dir, self._first_step):
            self.log(metrics, step)  # what a killed client did not write any more
        return None

    def log(self, metrics: Metrics, step: int) -> None:
        """One line of history, without what is there already."""
        news = {key: value for key, value in metrics.items() if (step, key) not in self._known}
        if news:
            self._run.log(news, step=step)

    def finish(self) -> None:
        """Flushes."""
        self._run.finish()


def logged_until(run_dir: Path, step: int) -> list[tuple[int, Metrics]]:
    """What the metrics file of a run has up to and with a step, as trackers get it."""
    try:
        lines = lines_until(run_dir / "logs" / "metrics.jsonl", step)
    except OSError:
        return []
    return [(int(line["step"]), finite_numbers({k: v for k, v in line.items() if k != "step"})) for line in lines]


def finite_numbers(values: Mapping[str, Any]) -> Metrics:
    """What a curve can show of a line; how far the run is stands in its steps."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value) and key not in _PLACES
    }


def _known_to_trackio(project: str, run_name: str) -> frozenset[tuple[int, str]]:
    """Steps and metrics that an earlier session has logged; trackio would keep them beside what a resume repeats."""
    try:
        from trackio.sqlite_storage import SQLiteStorage

        lines = SQLiteStorage.get_logs(project, run_name)
    except Exception:  # noqa: BLE001 - not a part of the client that it promises to keep
        return frozenset()
    return frozenset((line["step"], key) for line in lines for key in line)


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


def _has_netrc(host: str) -> bool:
    """Whether `wandb login` has left a key for the host."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of its story."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
