"""Everything a sweep has left so far, read without failing where a trial has not got that far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from laras.data.sealed import read_openings
from laras.errors import RunStateError
from laras.record_base import Record
from laras.records import DatasetProfile, EvalResult, Opening, RunResult, SplitManifest
from laras.reporting.history import Series, read_history
from laras.rundir import RunDir, is_held
from laras.sweep_record import BEST_CONFIG_NAME, SweepRecord, SweepTrial, trial_dir

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class SweepData:
    """A sweep as the report shows it.

    Attributes:
        path: Its folder.
        record: Interrupted where it says running and no process owns the folder.
        profile: Of the data.
        split: Which every trial shares.
        curves: Validation loss over steps, by number of the trial.
        elapsed_s: Training time of all trials that have a result.
        evaluation: Of the final model on the sealed test set.
        openings: Of the final model's test set.
        config_text: The ready configuration.
    """

    path: Path
    record: SweepRecord
    profile: DatasetProfile | None
    split: SplitManifest | None
    curves: dict[int, Series]
    elapsed_s: float
    evaluation: EvalResult | None
    openings: tuple[Opening, ...]
    config_text: str | None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def best(self) -> SweepTrial | None:
        """The trial with the lowest validation loss."""
        return self.record.trials[self.record.best] if self.record.best is not None else None

    def count(self, status: str) -> int:
        """Trials of a status."""
        return sum(trial.status == status for trial in self.record.trials)


def load_sweep_data(sweep_dir: Path) -> SweepData:
    """Reads a sweep.

    Raises:
        RunStateError: Its record is missing or damaged, or the ledger of its final model is.
    """
    record = SweepRecord.load(sweep_dir)
    if record.status == "running" and not is_held(RunDir(sweep_dir)):
        trials = tuple(
            trial.model_copy(update={"status": "interrupted"}) if trial.status == "running" else trial
            for trial in record.trials
        )
        record = record.model_copy(update={"status": "interrupted", "trials": trials})
    final = trial_dir(sweep_dir, record.final) if record.final is not None else None
    results = [_load(RunResult, trial_dir(sweep_dir, trial.number)) for trial in record.trials]
    config = sweep_dir / BEST_CONFIG_NAME
    return SweepData(
        path=sweep_dir,
        record=record,
        profile=_load(DatasetProfile, sweep_dir),
        split=_load(SplitManifest, sweep_dir),
        curves={
            trial.number: read_history(RunDir(trial_dir(sweep_dir, trial.number)).metrics).get("eval_loss")
            for trial in record.trials
        },
        elapsed_s=sum(result.measured.elapsed_s for result in results if result is not None),
        evaluation=_load(EvalResult, final) if final else None,
        openings=read_openings(final) if final else (),
        config_text=config.read_text(encoding="utf-8") if config.is_file() else None,
    )


def _load(record: type[_R], folder: Path) -> _R | None:
    try:
        return record.load(folder)
    except RunStateError:
        return None
