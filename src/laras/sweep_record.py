"""What a sweep is and what has come of its trials; read by the report, and by whoever guards the test set.

runs/sweep-qwen2.5-coder-1.5b-a1b2c3/
  base.yaml            the configuration that the trials vary, resolved; config.given.yaml as the user wrote it
  laras.yaml           the configuration of the best trial, ready for `laras train`
  study.sqlite3        Optuna's storage
  records/*.json       profile and split, which all trials share, and sweep
  trials/000/          one run directory a trial
  report.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from laras.config import RunConfig
from laras.errors import RunStateError
from laras.record_base import Record, Value
from laras.rundir import RunDir, inherited_config

TRIALS_FOLDER = "trials"
BASE_CONFIG_NAME, BEST_CONFIG_NAME, STUDY_NAME = "base.yaml", "laras.yaml", "study.sqlite3"

Setting = bool | int | float | str | None
TrialStatus = Literal["running", "interrupted", "finished", "pruned", "failed"]


class SweepParameter(Value):
    """One key of the configuration and the values that are tried for it."""

    name: str
    kind: Literal["float", "int", "choice"]
    low: int | float | None = None  # both ends belong to the range
    high: int | float | None = None
    log: bool = False
    choices: tuple[Setting, ...] = ()


class SweepTrial(Value):
    """One trial: what was tried and how it went."""

    number: int  # from 0
    status: TrialStatus
    values: dict[str, Setting]
    eval_loss: float | None  # lowest validation loss, of a pruned trial until then
    best_step: int | None  # of a finished trial
    steps: int | None
    reason: str | None  # why it was pruned or failed
    result_digest: str | None  # of the run's result record


class SweepRecord(Record):
    """A search over the validation set; its parent is the split manifest that every trial shares."""

    name: ClassVar[str] = "sweep"
    config_digest: str  # of `base.yaml`
    space: tuple[SweepParameter, ...]
    seed: int
    wanted_trials: int
    status: Literal["running", "interrupted", "finished"]
    trials: tuple[SweepTrial, ...] = ()
    best: int | None = None  # number of the finished trial with the lowest validation loss so far
    final: int | None = None  # the same when the sweep has ended: the one trial that the test set opens for


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the record of a sweep."""
    return (folder / "records" / f"{SweepRecord.name}.json").is_file()


def trial_dir(sweep_dir: Path, number: int) -> Path:
    """The run directory of a trial."""
    return sweep_dir / TRIALS_FOLDER / f"{number:03d}"


def sweep_of(run_dir: Path) -> Path | None:
    """The folder of the sweep that a run is a trial of; None for a run of its own."""
    folder = run_dir.resolve().parent
    return folder.parent if folder.name == TRIALS_FOLDER and is_sweep(folder.parent) else None


def final_run(path: Path) -> Path:
    """What stands for a sweep where a run is asked for: its final model; a run stands for itself.

    Raises:
        RunStateError: The sweep has not ended.
    """
    if not is_sweep(path):
        return path
    final = SweepRecord.load(path).final
    if final is None:
        raise RunStateError(
            f"{path} is a sweep without a final model yet", hint=f"`laras sweep {path}` goes on with it"
        )
    return trial_dir(path, final)


def lent_config(path: Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """The configuration of a run, or of a sweep's final model, with overrides, for a new run that starts from it.

    Raises:
        RunStateError: When this is no run, or a sweep that has not ended.
        ConfigError: With every problem of the overrides.
    """
    lender = final_run(path)
    if lender != path:  # a sweep's own folder is for its trials
        beside = str(path.parent)
        if isinstance(overrides, Mapping):
            overrides = {"output_dir": beside, **overrides}
        else:
            overrides = [f"output_dir={beside}", *overrides]
    return inherited_config(RunDir(lender), overrides)


def final_runs(output_dir: Path) -> list[Path]:
    """The runs of the final models of all sweeps below a folder."""
    found = []
    for folder in sorted(output_dir.glob("*/")):
        try:
            if is_sweep(folder) and (final := SweepRecord.load(folder).final) is not None:
                found.append(trial_dir(folder, final))
        except RunStateError:  # one damaged record does not hide the others
            continue
    return found
