"""Everything a run has left so far, read without failing: what is missing or damaged is named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from laras.config import RunConfig
from laras.data.sealed import read_openings
from laras.errors import RunStateError
from laras.record_base import Record
from laras.records import (
    BestCheckpoint,
    DatasetProfile,
    Environment,
    EvalResult,
    Measured,
    Opening,
    ParentRun,
    PlanRevision,
    RunEvent,
    RunResult,
    RunStatus,
    Samples,
    SplitManifest,
    TrainPlan,
)
from laras.reporting.history import History, read_history
from laras.rundir import RunDir, run_status

_R = TypeVar("_R", bound=Record)
_MEMORY_METRICS = ("memory/peak_allocated_bytes", "memory/allocated_bytes", "memory/rss_bytes")


@dataclass(frozen=True)
class Link:
    """One link of the chain of records: a record names the digest of the one it was built on."""

    child: str
    parent: str
    holds: bool


@dataclass(frozen=True)
class RunData:
    """A run as the report shows it; what is None has no record (yet)."""

    path: Path
    status: RunStatus
    config: RunConfig | None
    environment: Environment | None
    profile: DatasetProfile | None
    split: SplitManifest | None
    plan: TrainPlan | None
    result: RunResult | None
    evaluation: EvalResult | None
    samples: Samples | None
    openings: tuple[Opening, ...]
    history: History
    damaged: tuple[str, ...]
    parent: ParentRun | None = None
    revision: PlanRevision | None = None
    saved_events: tuple[RunEvent, ...] = ()  # of the newest checkpoint, while there is no final result

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.resolve().name

    @property
    def best(self) -> BestCheckpoint | None:
        """The best step: as recorded at the end, or the best so far."""
        if self.result is not None and self.result.best is not None:
            return self.result.best
        losses = self.history.get("eval_loss")
        if not len(losses):
            return None
        index = int(losses.value.argmin())
        return BestCheckpoint(step=int(losses.step[index]), eval_loss=float(losses.value[index]))

    @property
    def is_over(self) -> bool:
        """Whether the record of the result is that of an end; a session writes one when it begins, too."""
        return self.result is not None and self.result.status != "running"

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        logged = self.history.last_step
        return self.result.steps if self.result is not None and self.is_over else logged

    @property
    def measured(self) -> Measured | None:
        """As recorded at the end, or as far as the metrics tell; None when they tell nothing."""
        peak_bytes = max((_highest(self.history, name) for name in _MEMORY_METRICS), default=0)
        if self.result is not None and self.is_over:
            recorded = self.result.measured  # of the last session; the metrics are of all
            return recorded.model_copy(
                update={
                    "peak_allocated_bytes": max(peak_bytes, recorded.peak_allocated_bytes),
                    "elapsed_s": max(self.history.elapsed_s, recorded.elapsed_s),
                }
            )
        speed = self.history.get("tokens_per_s")
        if not len(speed):
            return None
        return Measured(
            peak_allocated_bytes=peak_bytes,
            peak_reserved_bytes=max(peak_bytes, _highest(self.history, "memory/peak_reserved_bytes")),
            tokens_per_s=float(speed.value[-1]),
            elapsed_s=self.history.elapsed_s,
        )

    @property
    def events(self) -> tuple[RunEvent, ...]:
        """What a reader should know, in order: resumes, memory splits, skipped steps, the early stop.

        Of a run that is not over, as far as its newest checkpoint knows.
        """
        if self.result is None:
            return self.saved_events
        events = list(self.result.events)
        events += [event for event in self.saved_events if event not in events]
        if self.result.stopped_early and not any("stop" in event.kind for event in events):
            detail = "the validation loss no longer improved"
            events.append(RunEvent(step=self.result.steps, kind="early_stop", detail=detail))
        return tuple(sorted(events, key=lambda event: event.step))

    @property
    def chain(self) -> tuple[Link, ...]:
        """Whether each record still matches the one it was built on."""
        in_force: Record | None = self.plan
        if self.revision is not None and self.result is not None and self.plan is not None:
            # A session that was killed has left the record of its beginning, which may be older than the revision.
            in_force = self.plan if self.result.parent_digest == self.plan.digest() else self.revision
        records: list[tuple[Record | None, Record | None]] = [
            (self.profile, self.parent),
            (self.split, self.profile),
            (self.plan, self.split),
            (self.revision, self.plan),
            (self.result, in_force),
            (self.evaluation, self.result),
        ]
        return tuple(
            Link(child.name, parent.name, child.parent_digest == parent.digest())
            for child, parent in records
            if child is not None and parent is not None and child.parent_digest is not None
        )


def _highest(history: History, name: str) -> int:
    return int(history.get(name).value.max(initial=0))


def _saved_events(run: RunDir) -> tuple[RunEvent, ...]:
    """Events that the newest checkpoint holds; a checkpoint that cannot be read tells nothing."""
    for path in sorted(run.checkpoints.glob("step-*"), key=_step_of, reverse=True):
        try:
            state = json.loads((path / "training.json").read_bytes())
            return tuple(RunEvent.model_validate(event) for event in state["counters"]["events"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ()


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def load_run_data(run_dir: Path) -> RunData:
    """Reads a run's records, metrics and ledger.

    Raises:
        RunStateError: When the folder is no run: it holds neither a configuration nor any record.
    """
    run = RunDir(run_dir)
    run.require()
    damaged: list[str] = []

    def load(record: type[_R]) -> _R | None:
        if not (run_dir / "records" / f"{record.name}.json").exists():
            return None
        try:
            return record.load(run_dir)
        except RunStateError as error:
            damaged.append(error.message)
            return None

    config: RunConfig | None = None
    openings: tuple[Opening, ...] = ()
    try:
        config = run.load_config() if run.config.is_file() else None
    except RunStateError as error:
        damaged.append(error.message)
    result = load(RunResult)
    is_over = result is not None and result.status != "running"
    try:
        openings = read_openings(run_dir)
    except RunStateError as error:
        damaged.append(error.message)
    return RunData(
        path=run_dir,
        status=run_status(run),
        config=config,
        environment=load(Environment),
        profile=load(DatasetProfile),
        split=load(SplitManifest),
        plan=load(TrainPlan),
        result=result,
        evaluation=load(EvalResult),
        samples=load(Samples),
        openings=openings,
        history=read_history(run.metrics),
        damaged=tuple(damaged),
        parent=load(ParentRun),
        revision=load(PlanRevision),
        saved_events=() if is_over else _saved_events(run),
    )
