"""Everything a run has left so far, read without failing: what is missing or damaged is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from laras.config import RunConfig
from laras.data.sealed import read_openings
from laras.errors import RunStateError
from laras.records import (
    BestCheckpoint,
    DatasetProfile,
    Environment,
    EvalResult,
    Opening,
    Record,
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
    def events(self) -> tuple[RunEvent, ...]:
        """What a reader should know, in order: resumes, memory splits, skipped steps, the early stop."""
        if self.result is None:
            return ()
        events = list(self.result.events)
        if self.result.stopped_early and not any("stop" in event.kind for event in events):
            detail = "the validation loss no longer improved"
            events.append(RunEvent(step=self.result.steps, kind="early-stop", detail=detail))
        return tuple(sorted(events, key=lambda event: event.step))

    @property
    def chain(self) -> tuple[Link, ...]:
        """Whether each record still matches the one it was built on."""
        records: list[tuple[Record | None, Record | None]] = [
            (self.split, self.profile),
            (self.plan, self.split),
            (self.result, self.plan),
            (self.evaluation, self.result),
        ]
        return tuple(
            Link(child.name, parent.name, child.parent_digest == parent.digest())
            for child, parent in records
            if child is not None and parent is not None and child.parent_digest is not None
        )


def load_run_data(run_dir: Path) -> RunData:
    """Reads a run's records, metrics and ledger.

    Raises:
        RunStateError: When the folder is no run: it holds neither a configuration nor any record.
    """
    run = RunDir(run_dir)
    if not run.config.is_file() and not any((run_dir / "records").glob("*.json")):
        raise RunStateError(f"{run_dir} is not a run", hint="`laras runs` lists the runs")
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
        result=load(RunResult),
        evaluation=load(EvalResult),
        samples=load(Samples),
        openings=openings,
        history=read_history(run.metrics),
        damaged=tuple(damaged),
    )
