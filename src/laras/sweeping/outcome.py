"""What a sweep leaves for people and programs: its record, the ready configuration, and one JSON object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from laras.config import RunConfig
from laras.errors import RunStateError
from laras.formatting import setting
from laras.record_base import write_atomically
from laras.records import RunResult
from laras.sweep_record import (
    BEST_CONFIG_NAME,
    SweepRecord,
    SweepTrial,
    TrialStatus,
    trial_dir,
)
from laras.sweeping.space import describe

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SCHEMA_LINE = (
    "# yaml-language-server: $schema="
    "https://raw.githubusercontent.com/laras-tune/laras/main/src/laras/resources/laras.schema.json"
)
_OF_THE_SWEEP = ("output_dir", "run_name")  # of a trial's configuration


@dataclass(frozen=True)
class SweepOutcome:
    """A sweep that has ended, or has been left for now."""

    sweep_dir: Path
    record: SweepRecord

    @property
    def final(self) -> Path | None:
        """The run of the final model."""
        return trial_dir(self.sweep_dir, self.record.final) if self.record.final is not None else None

    @property
    def best(self) -> SweepTrial | None:
        """The trial with the lowest validation loss."""
        return self.record.trials[self.record.best] if self.record.best is not None else None


def trial_record(sweep_dir: Path, frozen: FrozenTrial, pruned_at: int | None, reason: str | None) -> SweepTrial:
    """A trial as the record keeps it, from Optuna's storage and the run's result."""
    result = _result(trial_dir(sweep_dir, frozen.number))
    known: dict[str, TrialStatus] = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
    status = known.get(frozen.state.name, "running")
    best = result.best if result is not None else None
    lowest = min(frozen.intermediate_values.values(), default=None)
    steps = result.steps if result is not None else None
    return SweepTrial(
        number=frozen.number,
        status=status,
        values=dict(frozen.params),
        # Of a run that was killed, the result record is of an earlier process; the study has every validation.
        eval_loss=frozen.value if status == "finished" else _finite(lowest),
        best_step=best.step if best and status == "finished" else None,
        steps=pruned_at if status == "pruned" else steps,
        reason=reason,
        result_digest=result.digest() if result is not None and status != "running" else None,
    )


def best_of(trials: tuple[SweepTrial, ...]) -> int | None:
    """Number of the finished trial with the lowest validation loss, the first of equals."""
    finished = [trial for trial in trials if trial.status == "finished" and trial.eval_loss is not None]
    return min(finished, key=lambda trial: (trial.eval_loss, trial.number)).number if finished else None


def optimism(count: int) -> str:
    """What the validation loss of the best of several is worth, in one sentence."""
    if count == 1:
        return "With one trial the validation set has chosen its best step only."
    return (
        f"The validation set chose among {count} trials, so the lowest validation loss is optimistic; "
        "the score on the sealed test set is not."
    )


def write_best_config(sweep_dir: Path, base: RunConfig, record: SweepRecord) -> Path | None:
    """Writes `laras.yaml`: what the best trial was trained with, as a file that trains it again."""
    if record.best is None:
        return None
    best = record.trials[record.best]
    values = base.model_dump(mode="json", exclude_defaults=True) | best.values
    for name in ("dataset", "model_name_or_path"):  # first, and always said: without them a file is the example
        values = {name: base.model_dump(mode="json")[name], **values}
    values = {key: value for key, value in values.items() if key not in ("profile", "run_name")}
    lines = [
        SCHEMA_LINE,
        f"# Trial {best.number:03d} of {sweep_dir.name}, the best of {len(record.trials)}: validation loss "
        f"{best.eval_loss:.4f} at step {best.best_step}.",
        "# It is the lowest of many on one validation set, so it is optimistic; `laras test` gives the honest score.",
        *(f"# searched: {describe(parameter)}" for parameter in record.space),
        "",
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(),
    ]
    path = sweep_dir / BEST_CONFIG_NAME
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def values_text(trial: SweepTrial) -> str:
    """`learning_rate=0.0002 lora_r=16`."""
    return " ".join(f"{name}={setting(value)}" for name, value in trial.values.items())


def outcome_json(outcome: SweepOutcome) -> dict[str, Any]:
    """What `laras sweep --json` prints."""
    record, folder = outcome.record, outcome.sweep_dir
    best = outcome.best
    config = folder / BEST_CONFIG_NAME
    return {
        "sweep_dir": str(folder),
        "status": record.status,
        "space": [describe(parameter) for parameter in record.space],
        "trials": [
            {
                **trial.model_dump(mode="json", exclude={"result_digest"}),
                "run_dir": str(trial_dir(folder, trial.number)),
            }
            for trial in record.trials
        ],
        "best": {
            "number": best.number,
            "eval_loss": best.eval_loss,
            "step": best.best_step,
            "values": best.values,
            "run_dir": str(trial_dir(folder, best.number)),
        }
        if best is not None
        else None,
        "final_run_dir": str(outcome.final) if outcome.final else None,
        "config": str(config) if best is not None else None,
        "report": str(folder / "report.html"),
    }


def _result(run_dir: Path) -> RunResult | None:
    try:
        return RunResult.load(run_dir)
    except RunStateError:
        return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0 else None
