"""A sweep from its first trial to its final model, in one folder that a killed process leaves ready to go on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from laras import pipeline
from laras.config import RunConfig
from laras.config_file import config_to_yaml, load_config
from laras.data.sealed import read_openings
from laras.errors import ConfigError, LarasError, RunStateError, TrainingAborted, TrainingInterrupted
from laras.progress import Observer
from laras.record_base import digest_of, write_atomically
from laras.records import PlanChoices, SplitManifest
from laras.rundir import CONFIG_NAME, GIVEN_CONFIG_NAME, RunDir, hold, short_model_name
from laras.stages import import_backend, require_device, require_test_part, require_test_rows
from laras.sweep_record import BASE_CONFIG_NAME, STUDY_NAME, SweepParameter, SweepRecord, is_sweep, trial_dir
from laras.sweeping.outcome import SweepOutcome, best_of, trial_record, values_text, write_best_config
from laras.sweeping.space import Search, as_configured, default_space, describe, parse_search
from laras.sweeping.study import Study, StudyTrial, pruned_step_of, reason_of, require_optuna
from laras.sweeping.trial import TIME_LIMIT, Trials, has_same_rows, other_split
from laras.training.signals import stop_on_signals

DEFAULT_TRIALS = 12
_OWN_NAMES = {BASE_CONFIG_NAME, GIVEN_CONFIG_NAME, "records", ".lock", ".holder.json"}


def run_sweep(
    config: RunConfig,
    search: Search = (),
    *,
    trials: int = DEFAULT_TRIALS,
    time_limit_s: float | None = None,
    will_test: bool = False,
    given: str | None = None,
    observer: Observer | None = None,
) -> SweepOutcome:
    """Searches settings by the validation loss; the same call goes on with a sweep that was left.

    Args:
        config: What the trials vary.
        search: What is searched (see `laras.sweeping.space`); nothing: learning rate and rank.
        trials: How many in all, those that are pruned or fail included.
        time_limit_s: No step is begun after so many seconds of this call; the trial that runs then is saved.
        will_test: The test set is to be opened for the final model; refused at once where it would be empty.
        given: The configuration file as the user wrote it.
        observer: Is told what happens.

    Raises:
        ConfigError: The search or a limit cannot be used; with every problem at once.
        DataError: With every problem of the data at once.
        RunStateError: Another sweep or run is there, it is in use, its data have changed, or its test set was opened.
        TrainingInterrupted: Stopped by a signal, or by the time limit before any trial had finished; saved.
        TrainingAborted: No trial could be finished, or nothing can be written.
    """
    observer = observer or Observer()
    _check_call(trials, time_limit_s)
    deadline_s = time.monotonic() + time_limit_s if time_limit_s is not None else None
    asked = parse_search(search, config) if search else None
    import_backend(config, observer)  # before anything that imports torch
    require_device(config)
    if will_test:
        require_test_part(config)
    inspection = pipeline.inspect(config, observer)
    if not inspection.manifest.validation.rows:
        raise ConfigError(
            "the validation set is empty, and a sweep compares its trials there",
            hint="set split.validation, say to 0.1",
        )
    if will_test:
        require_test_rows(config, inspection.manifest)
    choices = _plan_choices(config, observer)
    space = asked or default_space(config, choices)
    sweep_dir = _sweep_dir(config, space)
    _make_folder(sweep_dir)
    with hold(RunDir(sweep_dir)):
        if not is_sweep(sweep_dir):
            write_atomically(sweep_dir / BASE_CONFIG_NAME, config_to_yaml(config))
            if given is not None:
                write_atomically(sweep_dir / GIVEN_CONFIG_NAME, given)
            inspection.profile.save(sweep_dir)
            inspection.manifest.save(sweep_dir)
            _first_record(config, space, trials, inspection.manifest).save(sweep_dir)
        _check_same(sweep_dir, config, space, inspection.manifest)
        return _Sweep(sweep_dir, config, choices, trials, observer).run(deadline_s)


def continue_sweep(
    sweep_dir: Path,
    *,
    trials: int | None = None,
    time_limit_s: float | None = None,
    will_test: bool = False,
    observer: Observer | None = None,
) -> SweepOutcome:
    """Goes on with the sweep in a folder, to as many trials as were wanted, or to `trials`. Raises as `run_sweep`."""
    record = SweepRecord.load(sweep_dir)
    config = load_config(sweep_dir / BASE_CONFIG_NAME)
    observer = observer or Observer()
    wanted = trials if trials is not None else record.wanted_trials
    _check_call(wanted, time_limit_s)
    deadline_s = time.monotonic() + time_limit_s if time_limit_s is not None else None
    if will_test:
        require_test_rows(config, SplitManifest.load(sweep_dir))
    import_backend(config, observer)
    manifest = pipeline.inspect(config, observer).manifest
    choices = _plan_choices(config, observer)
    with hold(RunDir(sweep_dir)):
        _check_same(sweep_dir, config, record.space, manifest)
        return _Sweep(sweep_dir, config, choices, wanted, observer).run(deadline_s)


def _plan_choices(config: RunConfig, observer: Observer) -> PlanChoices:
    """What is planned for the configuration as it is; the inspection has said everything about the data."""
    observer.stage_started("planning")
    return pipeline.plan(config, Observer()).choices


@dataclass
class _Sweep:
    """The sweep in a folder that this process owns."""

    sweep_dir: Path
    config: RunConfig
    choices: PlanChoices
    wanted: int
    observer: Observer
    record: SweepRecord = field(init=False)
    study: Study = field(init=False)

    def run(self, deadline_s: float | None) -> SweepOutcome:
        """Trains what is missing and names the final model."""
        self.record = SweepRecord.load(self.sweep_dir)
        self.study = Study(self.sweep_dir / STUDY_NAME, self.record.space, self.record.seed)
        try:
            if self._is_complete():
                return SweepOutcome(self.sweep_dir, self.record)
            self._refuse_if_opened()
            with stop_on_signals() as stop:
                split = SplitManifest.load(self.sweep_dir)
                shared = Trials(self.sweep_dir, self.config, split, self.observer, stop, deadline_s)
                try:
                    self._train(shared)
                    return self._finish(deadline_s)
                except BaseException:
                    if self.record.status == "running":
                        with suppress(OSError):  # nothing can be written: the study knows as much
                            self._save("interrupted")
                    raise
        finally:
            self.study.close()

    def _is_complete(self) -> bool:
        ended = [trial for trial in self.study.trials() if trial.state.is_finished()]
        is_enough = len(ended) >= self.wanted or self.study.is_exhausted()
        return self.record.status == "finished" and self.record.final is not None and is_enough

    def _refuse_if_opened(self) -> None:
        final = self.record.final
        if final is not None and read_openings(trial_dir(self.sweep_dir, final)):
            raise RunStateError(
                f"the test set of {self.sweep_dir} has been opened for trial {final:03d}; more trials would be chosen "
                "by somebody who knows the score",
                hint="the sweep is complete as it is; another question needs other test data",
            )

    def _train(self, shared: Trials) -> None:
        self._save("running")  # a process may have died between the end of a trial and its entry in the record
        self._remove_checkpoints()
        while trial := self._next(shared):
            self._save("running")
            self.observer.message(f"trial {trial.number:03d}: {values_text(self.record.trials[trial.number])}")
            best_before = self.record.best
            try:
                shared.run(trial)
            except TrainingInterrupted as error:
                if shared.stop.signal_name is None and shared.stop.reason == TIME_LIMIT:
                    self.observer.message(f"the time limit has passed; trial {trial.number:03d} is saved as it is")
                    return
                raise self._interrupted(error.message) from None
            shared.stop.withdraw()
            self._save("running")
            self._tell(trial.number, best_before)
            self._remove_checkpoints()
        if shared.stop.signal_name is not None:
            raise self._interrupted(f"stopped by {shared.stop.signal_name} between two trials; everything is saved")

    def _next(self, shared: Trials) -> StudyTrial | None:
        """The trial that a process before left running, or a new one; None when it is time to end."""
        if shared.stop:
            return None
        left = self.study.unfinished()
        if left is not None:
            return left if left.number < self.wanted else None
        count = len(self.study.trials())
        out_of_time = shared.deadline_s is not None and time.monotonic() >= shared.deadline_s
        if count >= self.wanted or out_of_time:
            return None
        own = as_configured(self.config, self.choices, self.record.space) if count == 0 else None
        return self.study.start(own)

    def _tell(self, number: int, best_before: int | None) -> None:
        trial = self.record.trials[number]
        if trial.status == "finished":
            verdict = "the best so far" if self.record.best == number else f"trial {best_before:03d} stays the best"
            self.observer.message(f"trial {number:03d} finished: validation loss {trial.eval_loss:.4f}, {verdict}")
            if self.record.best == number:
                write_best_config(self.sweep_dir, self.config, self.record)
        else:
            self.observer.message(f"trial {number:03d} {trial.status}: {trial.reason}")

    def _finish(self, deadline_s: float | None) -> SweepOutcome:
        best = best_of(self.record.trials)
        if best is None:
            running = any(trial.status == "running" for trial in self.record.trials)
            if deadline_s is not None and (running or not self.record.trials):
                raise self._interrupted("the time limit passed before any trial had finished; everything is saved")
            self._save("finished")
            raise TrainingAborted(
                f"of {len(self.record.trials)} trials, none could be finished",
                problems=[f"trial {trial.number:03d}: {trial.reason}" for trial in self.record.trials if trial.reason],
                hint="try one by itself with `laras train`, or search smaller learning rates",
            )
        self._save("finished", final=best)
        write_best_config(self.sweep_dir, self.config, self.record)
        outcome = SweepOutcome(self.sweep_dir, self.record)
        self._write_report()
        return outcome

    def _save(self, status: str, final: int | None = None) -> None:
        """The record as the study has it now."""
        trials = tuple(
            trial_record(self.sweep_dir, frozen, pruned_step_of(frozen), reason_of(frozen))
            for frozen in self.study.trials()
        )
        if status != "running":
            trials = tuple(
                trial.model_copy(update={"status": "interrupted"}) if trial.status == "running" else trial
                for trial in trials
            )
        changed = {"status": status, "trials": trials, "best": best_of(trials), "final": final}
        self.record = self.record.model_copy(update={**changed, "wanted_trials": self.wanted})
        self.record.save(self.sweep_dir)

    def _remove_checkpoints(self) -> None:
        """Of trials that have ended and are not the best: only a resume needs them, and `best/` is `final/` again."""
        for trial in self.record.trials:
            if trial.status != "running" and trial.number != self.record.best:
                run = RunDir(trial_dir(self.sweep_dir, trial.number))
                for folder in (run.checkpoints, run.path / "best"):
                    shutil.rmtree(folder, ignore_errors=True)

    def _interrupted(self, message: str) -> TrainingInterrupted:
        return TrainingInterrupted(message, hint=f"`laras sweep {self.sweep_dir}` goes on from there")

    def _write_report(self) -> None:
        from laras.reporting.report import write_report

        try:
            write_report([self.sweep_dir])
        except LarasError as error:
            self.observer.warning(f"no report was written: {error.message}")


def _check_call(trials: int, time_limit_s: float | None) -> None:
    require_optuna()
    problems = [f"trials is {trials}; at least 1 is needed"] * (trials < 1)
    if time_limit_s is not None and time_limit_s <= 0:
        problems.append(f"the time limit is {time_limit_s:g} s; it must be above 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("a sweep runs in one process; start it without torchrun or accelerate launch")
    if problems:
        raise ConfigError("the sweep cannot start", problems=problems, hint="`laras sweep --help`")


def _sweep_dir(config: RunConfig, space: Sequence[SweepParameter]) -> Path:
    """Named by what it is, so that the same call finds it again."""
    digest = digest_of([config.model_dump(mode="json"), [parameter.model_dump(mode="json") for parameter in space]])
    name = config.run_name or f"sweep-{short_model_name(config.model_name_or_path)}-{digest[:6]}"
    return Path(config.output_dir).expanduser() / name


def _make_folder(sweep_dir: Path) -> None:
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
        strange = [] if is_sweep(sweep_dir) else [p.name for p in sweep_dir.iterdir() if p.name not in _OWN_NAMES]
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {sweep_dir}: {error.strerror}", hint="set output_dir to a folder you can write"
        ) from None
    if strange:
        what = "is a run" if CONFIG_NAME in strange else "exists already and is no sweep"
        raise RunStateError(f"{sweep_dir} {what}", hint="choose another run_name")


def _first_record(
    config: RunConfig, space: tuple[SweepParameter, ...], trials: int, split: SplitManifest
) -> SweepRecord:
    return SweepRecord(
        parent_digest=split.digest(),
        config_digest=digest_of(config.model_dump(mode="json")),
        space=space,
        seed=config.seed,
        wanted_trials=trials,
        status="running",
    )


def _check_same(sweep_dir: Path, config: RunConfig, space: Sequence[SweepParameter], manifest: SplitManifest) -> None:
    """Refuses to go on with a sweep of other settings or data under the same name.

    Raises:
        RunStateError: With every difference.
    """
    record, base = SweepRecord.load(sweep_dir), load_config(sweep_dir / BASE_CONFIG_NAME)
    old, new = base.model_dump(mode="json"), config.model_dump(mode="json")
    problems = [f"{key}: was {old[key]}, is {new[key]}" for key in new if old[key] != new[key]]
    before, now = ([describe(parameter) for parameter in one] for one in (record.space, space))
    if before != now:
        problems.append(f"search: was {' '.join(before)}, is {' '.join(now)}")
    if problems:
        raise RunStateError(
            f"{sweep_dir} is a sweep of other settings",
            problems=problems,
            hint=f"choose another run_name, or go on with it as it is: `laras sweep {sweep_dir}`",
        )
    shared = SplitManifest.load(sweep_dir)
    if not has_same_rows(shared, manifest):
        raise other_split(shared, manifest)
