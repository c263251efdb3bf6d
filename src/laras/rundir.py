"""One run's directory: where its parts are, who owns it now, and what state it is in.

runs/2026-11-24-qwen2.5-coder-1.5b-a1b2/
  config.yaml          resolved, every key present; config.given.yaml as the user wrote it
  records/*.json       parent, profile, split, plan, revision, environment, result, evaluation, samples
  splits/              train and validation; what is sealed beside them is named by `laras.data` alone
  start/               the weights that a run began with, where `laras train --from RUN` made it
  checkpoints/step-N/  complete and verified, or not there at all
  best/  final/        adapter, tokenizer, chat template
  logs/                metrics.jsonl, tensorboard
  report.html
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import ValidationError

from laras.config import RunConfig
from laras.config_file import load_config
from laras.errors import ConfigError, RunStateError
from laras.record_base import Record, Value, write_atomically
from laras.records import BestCheckpoint, Environment, EvalResult, RunResult, RunStatus, TrainPlan

CONFIG_NAME = "config.yaml"
GIVEN_CONFIG_NAME = "config.given.yaml"
_LOCK_NAME, _HOLDER_NAME = ".lock", ".holder.json"
_MAX_MODEL_NAME_CHARS = 60
_TAIL_BYTES = 16_384  # of the metrics file, whose lines take less than a thousand
_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class RunDir:
    """Paths of a run. Nothing is created by naming it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG_NAME

    @property
    def train_rows(self) -> Path:
        """Tokenised rows to learn from."""
        return self.path / "splits" / "train.parquet"

    @property
    def validation_rows(self) -> Path:
        """Tokenised rows to validate on."""
        return self.path / "splits" / "validation.parquet"

    @property
    def members(self) -> Path:
        """Hashes of which content is in which split, of this run and of those that it goes back to."""
        return self.path / "splits" / "members.parquet"

    @property
    def start(self) -> Path:
        """Weights of another run, from which this one started."""
        return self.path / "start"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-N`."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The model of the lowest validation loss so far."""
        return self.path / "best"

    @property
    def final(self) -> Path:
        """The tuned model: adapter (or all weights), tokenizer, chat template."""
        return self.path / "final"

    @property
    def metrics(self) -> Path:
        """Every metric, one JSON object a line."""
        return self.path / "logs" / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    def require(self) -> None:
        """Refuses a folder that is no run, before anything heavy is loaded for it.

        Raises:
            RunStateError: It holds neither a configuration nor any record.
        """
        try:
            found = self.config.is_file() or any((self.path / "records").glob("*.json"))
        except OSError:  # a name longer than the file system takes
            found = False
        if not found:
            raise RunStateError(
                f"{self.path} is not a run: it holds no {CONFIG_NAME} and no record", hint="`laras runs` lists the runs"
            )

    def load_config(self) -> RunConfig:
        """The configuration that the run was started with.

        Raises:
            RunStateError: When this is no run, or its configuration no longer validates.
        """
        try:
            found = self.config.is_file()
        except OSError:  # a name longer than the file system takes
            found = False
        if not found:
            raise RunStateError(
                f"{self.path} is not a run: it holds no {CONFIG_NAME}", hint="`laras runs` lists the runs"
            )
        try:
            return load_config(self.config)
        except ConfigError as error:
            raise RunStateError(
                f"{self.config} does not validate",
                problems=error.problems or (error.message,),
                hint="restore the file",
            ) from None


def inherited_config(run: RunDir, overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """The configuration of a run with overrides, for a new run that starts from it and has a name of its own.

    Raises:
        RunStateError: When this is no run.
        ConfigError: With every problem of the overrides.
    """
    run.load_config()
    own_name = {"run_name": None, **overrides} if isinstance(overrides, Mapping) else ["run_name=null", *overrides]
    return load_config(run.config, own_name)


class Holder(Value):
    """Who works in a run directory."""

    host: str
    pid: int
    since: str  # UTC, ISO 8601


class RunSummary(Value):
    """One line of `laras runs`. Scores are None until `laras test` has opened the sealed set."""

    path: str
    status: RunStatus
    created_at: str | None
    model: str | None
    steps: int | None
    best: BestCheckpoint | None
    base_perplexity: float | None
    tuned_perplexity: float | None


def create_run_dir(
    config: RunConfig, write_files: Callable[[RunDir], None] = lambda run: None, now: datetime | None = None
) -> RunDir:
    """Makes the directory of a new run, whole or not at all.

    It is `output_dir/run_name`, or has a name from date, model and four random digits.

    Args:
        config: Of the run.
        write_files: Writes what a run begins with, into a folder aside that then gets the name.
        now: For the date; None: today.

    Raises:
        RunStateError: When a run of that name is there already.
        ConfigError: When it cannot be written.
    """
    require_new(config)
    day = (now or datetime.now(UTC)).strftime("%Y-%m-%d")
    name = config.run_name or f"{day}-{short_model_name(config.model_name_or_path)}-{secrets.token_hex(2)}"
    path = Path(config.output_dir).expanduser() / name
    aside = path.with_name(f".{name}.{secrets.token_hex(2)}.partial")
    try:
        aside.mkdir(parents=True)
        write_files(RunDir(aside))
        aside.rename(path)
    except OSError as error:
        require_new(config)  # another process may have been quicker
        raise ConfigError(
            f"the run cannot be written to {path}: {error.strerror or error}",
            hint="make room, or set output_dir to a folder that you can write",
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return RunDir(path)


def require_new(config: RunConfig) -> None:
    """Refuses the name of a run that is there already; asked first, as what comes before the directory takes time.

    Raises:
        RunStateError: When there is something of that name.
    """
    path = Path(config.output_dir).expanduser() / (config.run_name or "")
    if config.run_name and os.path.lexists(path):
        raise RunStateError(
            f"{path} exists already", hint=f"choose another run_name, or go on with `laras resume {path}`"
        )


@contextmanager
def hold(run: RunDir) -> Iterator[None]:
    """Owns a run directory for the duration of the block.

    The lock is the kernel's, on an open file: it ends with the process, however that ends, so that none goes stale, and
    the number in the note of the holder decides nothing. On a network file system it holds between machines only where
    that system has locks (NFS 4 and later, Lustre with `flock`); where there are none at all, the run is refused.

    Raises:
        RunStateError: When another process owns it (names its host, process and start), or it cannot be locked.
    """
    lock = _lock(run)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = read_holder(run)
        who = f" by process {holder.pid} on {holder.host} since {holder.since}" if holder else ""
        raise RunStateError(
            f"{run.path} is in use{who}", hint="wait for it to end, or stop that process first"
        ) from None
    except OSError as error:
        raise RunStateError(
            f"{run.path} cannot be locked: {error.strerror or error}",
            hint="keep runs in a folder of a local disk that you can write",
        ) from None
    try:
        holder = Holder(
            host=socket.gethostname(), pid=os.getpid(), since=datetime.now(UTC).isoformat(timespec="seconds")
        )
        with suppress(OSError):  # a full disk: the lock is what counts
            write_atomically(run.path / _HOLDER_NAME, holder.model_dump_json() + "\n")
        yield
    finally:
        with suppress(OSError):
            (run.path / _HOLDER_NAME).unlink()
        lock.release()


def _lock(run: RunDir) -> BaseFileLock:
    """The kernel's lock or none: a marker file in its place could outlive its process."""
    return FileLock(run.path / _LOCK_NAME, fallback_to_soft=False)


def read_holder(run: RunDir) -> Holder | None:
    """Who owns the directory, as far as it is known."""
    try:
        return Holder.model_validate_json((run.path / _HOLDER_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def run_status(run: RunDir) -> RunStatus:
    """`running` while a process owns the directory, else how it ended; one that left no result was interrupted."""
    if is_held(run):
        return "running"
    try:
        status = RunResult.load(run.path).status
    except RunStateError:
        return "interrupted"
    return "interrupted" if status == "running" else status


def list_runs(output_dir: Path, further: Sequence[Path] = ()) -> list[RunSummary]:
    """Every run below a folder, and further ones, the best score first, those without one by name, newest first."""
    runs = [RunDir(path) for path in (*(path.parent for path in output_dir.glob(f"[!.]*/{CONFIG_NAME}")), *further)]
    summaries = sorted((_summary(run) for run in runs), key=lambda summary: summary.path, reverse=True)
    return sorted(summaries, key=lambda s: s.tuned_perplexity if s.tuned_perplexity is not None else float("inf"))


def _summary(run: RunDir) -> RunSummary:
    environment = _load_or_none(Environment, run.path)
    plan = _load_or_none(TrainPlan, run.path)
    result = _load_or_none(RunResult, run.path)
    evaluation = _load_or_none(EvalResult, run.path)
    return RunSummary(
        path=str(run.path),
        status=run_status(run),
        created_at=environment.created_at if environment else None,
        model=plan.model.source if plan else None,
        steps=_steps(run, result),
        best=result.best if result else None,
        base_perplexity=evaluation.base.perplexity if evaluation else None,
        tuned_perplexity=evaluation.tuned.perplexity if evaluation else None,
    )


def _steps(run: RunDir, result: RunResult | None) -> int | None:
    """Optimizer steps: as recorded at the end, or as last logged by a session that has recorded no end."""
    if result is not None and result.status != "running":
        return result.steps
    return _last_logged_step(run.metrics) or (result.steps if result else None)


def _last_logged_step(metrics: Path) -> int | None:
    """The step of the last whole line, read from the end of the file."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for text in reversed(lines):
        try:
            return int(json.loads(text)["step"])
        except (ValueError, KeyError, TypeError):  # a line that is being written, or the rest of a long one
            continue
    return None


def _load_or_none(record: type[_R], path: Path) -> _R | None:
    try:
        return record.load(path)
    except RunStateError:
        return None


def is_held(run: RunDir) -> bool:
    """Whether a process owns the directory now."""
    if not (run.path / _LOCK_NAME).exists():
        return False
    lock = _lock(run)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError as error:
        return error.errno != errno.EROFS  # where nobody can write, nobody trains
    lock.release()
    return False


def short_model_name(source: str) -> str:
    """Last part of a path, Hub id or built-in name, safe as a part of a file name."""
    last = re.split(r"[/\\:]", source.rstrip("/\\"))[-1].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-.")[:_MAX_MODEL_NAME_CHARS] or "model"
