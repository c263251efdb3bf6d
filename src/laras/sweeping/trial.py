"""One trial: an ordinary run whose validation losses are reported, and which is asked to stop when it is behind."""

from __future__ import annotations

import gc
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from laras import pipeline
from laras.config import RunConfig
from laras.errors import ConfigError, PlanError, RunStateError, TrainingAborted, TrainingInterrupted
from laras.progress import Observer, StepReport, ValidationReport
from laras.records import RunResult, SplitManifest, TrainPlan
from laras.reporting.history import read_history
from laras.rundir import CONFIG_NAME, RunDir
from laras.sweep_record import trial_dir
from laras.sweeping.space import with_values
from laras.sweeping.study import StudyTrial, StudyUnwritableError
from laras.training.signals import StopRequest
from laras.whole_folder import WRITE_ERRORS

TIME_LIMIT = "the time limit of the sweep"


@dataclass(frozen=True)
class Trials:
    """What all trials of a sweep share."""

    sweep_dir: Path
    config: RunConfig
    split: SplitManifest
    observer: Observer
    stop: StopRequest
    deadline_s: float | None  # of `time.monotonic`
    said: set[str] = field(default_factory=set)  # every trial has the same data to speak of

    def config_of(self, trial: StudyTrial) -> RunConfig:
        """The configuration of a trial's run.

        Raises:
            ConfigError: The values do not go together.
        """
        run_dir = trial_dir(self.sweep_dir, trial.number)
        return with_values(self.config, {**trial.values, "output_dir": str(run_dir.parent), "run_name": run_dir.name})

    def run(self, trial: StudyTrial) -> None:
        """Trains a trial, or goes on with it, and tells the study how it ended.

        Raises:
            TrainingInterrupted: By a signal or the time limit; the trial is still the running one.
            RunStateError: Its data are no longer those of the sweep, or another process owns its run.
            TrainingAborted: Nothing can be written.
        """
        run_dir = trial_dir(self.sweep_dir, trial.number)
        result = _finished(run_dir)
        if result is None and trial.pruned_at is not None:
            trial.prune()
            return
        try:
            result = result or self._train(trial, run_dir)
        except TrainingInterrupted:
            if trial.pruned_at is None:
                raise
            trial.prune()
        except (PlanError, TrainingAborted, _UnfitValues) as error:
            if isinstance(error, StudyUnwritableError) or isinstance(error.__cause__, WRITE_ERRORS):
                raise  # a full disk is no property of the values
            trial.fail(error.message)
        else:
            self._finish(trial, run_dir, result)
        finally:
            _free_memory()

    def _train(self, trial: StudyTrial, run_dir: Path) -> RunResult:
        watcher = _Watcher(self, trial, run_dir)
        if (run_dir / CONFIG_NAME).is_file():
            watcher.require_same_split()
            return pipeline.resume(run_dir, watcher, stop=self.stop).result
        shutil.rmtree(run_dir, ignore_errors=True)  # the process ended before the run was written: nothing was trained
        try:
            config = self.config_of(trial)
        except ConfigError as error:
            raise _UnfitValues("; ".join(error.problems) or error.message) from None
        try:
            return pipeline.train(config, watcher, stop=self.stop).result
        except RunStateError:
            if watcher.has_other_split:
                shutil.rmtree(run_dir, ignore_errors=True)
            raise

    def _finish(self, trial: StudyTrial, run_dir: Path, result: RunResult) -> None:
        eval_steps = TrainPlan.load(run_dir).choices.eval_steps
        losses = read_history(RunDir(run_dir).metrics).get("eval_loss")  # of a trial that `laras resume` finished, too
        for step, loss in zip(losses.step, losses.value, strict=True):
            trial.report(_evaluation_number(int(step), eval_steps), float(loss))
        if result.best is None:
            trial.fail("no validation loss was a finite number")
        else:
            trial.finish(result.best.eval_loss)


class _UnfitValues(ConfigError):
    """Values that do not go together: this trial cannot run, others can."""


class _Watcher(Observer):
    """Passes everything on, reports validation losses, and asks for a stop."""

    def __init__(self, trials: Trials, trial: StudyTrial, run_dir: Path) -> None:
        self._trials, self._trial, self._run_dir = trials, trial, run_dir
        self._inner, self._stop = trials.observer, trials.stop
        self._eval_steps, self._total_steps = 1, 0
        self.has_other_split = False

    def require_same_split(self) -> None:
        """Every trial learns from, and is compared on, the very same rows.

        Raises:
            RunStateError: They differ.
        """
        own, shared = SplitManifest.load(self._run_dir), self._trials.split
        if not has_same_rows(shared, own):
            self.has_other_split = True
            raise other_split(shared, own)

    def stage_started(self, name: str) -> None:
        """See `Observer`."""
        self._inner.stage_started(name)

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        """See `Observer`."""
        self._inner.stage_progress(done, total, unit)
        self._watch_clock()

    def message(self, text: str) -> None:
        """See `Observer`; said once a sweep."""
        if self._is_new(text):
            self._inner.message(text)

    def warning(self, text: str) -> None:
        """See `Observer`; said once a sweep."""
        if self._is_new(text):
            self._inner.warning(text)

    def training_started(self, plan: TrainPlan, first_step: int) -> None:
        """See `Observer`."""
        self.require_same_split()
        self._eval_steps = plan.choices.eval_steps
        self._inner.training_started(plan, first_step)

    def step_finished(self, report: StepReport) -> None:
        """See `Observer`."""
        self._total_steps = report.total_steps
        self._inner.step_finished(report)
        self._watch_clock()

    def validated(self, report: ValidationReport) -> None:
        """See `Observer`."""
        self._inner.validated(report)
        self._trial.report(_evaluation_number(report.step, self._eval_steps), report.loss)
        ends_itself = report.step >= self._total_steps or (
            report.patience is not None and report.evaluations_without_improvement >= report.patience
        )
        if not ends_itself and self._trial.should_prune():
            reason = f"above the median of the finished trials at step {report.step}"
            self._trial.note_pruned(report.step, reason)
            self._stop.ask("the sweep, which prunes this trial,")

    def training_finished(self, status: str) -> None:
        """See `Observer`."""
        if self._trial.pruned_at is None:  # said by the sweep in its own words
            self._inner.training_finished(status)

    def _is_new(self, text: str) -> bool:
        is_new = text not in self._trials.said
        self._trials.said.add(text)
        return is_new

    def _watch_clock(self) -> None:
        if self._trials.deadline_s is not None and time.monotonic() >= self._trials.deadline_s:
            self._stop.ask(TIME_LIMIT)


def has_same_rows(shared: SplitManifest, found: SplitManifest) -> bool:
    """Whether both divide the same rows alike; what else they say is a version's own."""
    return not _other_rows(shared, found)


def other_split(shared: SplitManifest, found: SplitManifest) -> RunStateError:
    """The error of data that are no longer those that the sweep began with."""
    return RunStateError(
        "the data have changed since the sweep began: its trials would be compared on other rows",
        problems=[f"{name}: digest was {old[:12]}…, is {new[:12]}…" for name, old, new in _other_rows(shared, found)],
        hint="restore the data and the settings of the split, or start a new sweep with another run_name",
    )


def _other_rows(shared: SplitManifest, found: SplitManifest) -> list[tuple[str, str, str]]:
    """Splits that differ, with both digests of their rows."""
    digests = [
        (name, getattr(shared, name).sha256, getattr(found, name).sha256) for name in ("train", "validation", "test")
    ]
    return [one for one in digests if one[1] != one[2]]


def _evaluation_number(step: int, eval_steps: int) -> int:
    """From 1; the last evaluation may come before its regular step."""
    return -(-step // eval_steps)


def _finished(run_dir: Path) -> RunResult | None:
    try:
        result = RunResult.load(run_dir)
    except RunStateError:
        return None
    return result if result.status == "finished" else None


def _free_memory() -> None:
    """Gives back what the trial held on a GPU, so that the next one starts as in a process of its own."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()  # a trainer and its callbacks refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
