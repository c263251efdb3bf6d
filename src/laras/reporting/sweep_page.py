"""`report.html` of a sweep: its trials, what was searched, the final model, and what the figures are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laras import __version__, formatting
from laras.reporting import sweep_charts
from laras.reporting.drawing import Drawing
from laras.reporting.sweep_data import SweepData, load_sweep_data
from laras.sweep_record import TRIALS_FOLDER, SweepParameter, SweepTrial


def sweep_page(sweep_dir: Path, *, links: bool) -> dict[str, Any]:
    """What the template of a sweep's page is filled with.

    Args:
        sweep_dir: The folder of the sweep.
        links: Lead from a trial to its own page, which is found from the sweep's folder only.

    Raises:
        RunStateError: The sweep's record, or the ledger of its final model, is damaged.
    """
    sweep = load_sweep_data(sweep_dir)
    drawings: dict[str, Drawing | None] = {
        "trials": sweep_charts.trials_chart(sweep),
        "parameters": sweep_charts.parameters_chart(sweep),
        "curves": sweep_charts.curves_chart(sweep),
    }
    return {
        "laras_version": __version__,
        "sweep": sweep,
        "drawings": drawings,
        "verdict": verdict(sweep),
        "rows": [_row(sweep, trial, links) for trial in sweep.record.trials],
        "first": _first(sweep),
        "space": [(parameter.name, values_tried(parameter)) for parameter in sweep.record.space],
    }


def verdict(sweep: SweepData) -> tuple[str, str]:
    """The result in a sentence or two, and its kind: `good`, `bad`, `open` or `none`."""
    best, count = sweep.best, len(sweep.record.trials)
    if best is None:
        return f"None of {count} trials has finished so far.", "none"
    found = f"Trial {best.number:03d} is the best of {count}: validation loss {formatting.number(best.eval_loss, 4)}"
    optimistic = "As the lowest of many on one validation set, that is optimistic"
    if sweep.record.final is None:
        return f"{found} so far; the sweep has not ended, and the test set stays sealed. {optimistic}.", "none"
    if sweep.evaluation is None:
        return f"{found}. {optimistic}; laras test gives the honest score.", "none"
    score = sweep.evaluation
    low, high = score.loss_improvement_ci95
    kind = "good" if low > 0 else "bad" if high < 0 else "open"
    return (
        f"{found}. {optimistic}; the sealed test set is not: loss {formatting.number(score.base.loss, 4)} \u2192 "
        f"{formatting.number(score.tuned.loss, 4)} (95% interval {formatting.interval(score.tuned.loss_ci95, 4)}).",
        kind,
    )


def values_tried(parameter: SweepParameter) -> str:
    """A range or the choices, in words."""
    if parameter.kind == "choice":
        return ", ".join(formatting.setting(choice) for choice in parameter.choices)
    words = f"{formatting.setting(parameter.low)} to {formatting.setting(parameter.high)}"
    words += ", whole numbers" if parameter.kind == "int" else ""
    return words + (", logarithmic" if parameter.log else "")


def _row(sweep: SweepData, trial: SweepTrial, links: bool) -> dict[str, Any]:
    page = f"{TRIALS_FOLDER}/{trial.number:03d}/report.html"
    return {
        "trial": trial,
        "values": [formatting.setting(trial.values.get(parameter.name)) for parameter in sweep.record.space],
        "page": page if links and (sweep.path / page).is_file() else None,
        "is_best": trial.number == sweep.record.best,
        "is_final": trial.number == sweep.record.final,
    }


def _first(sweep: SweepData) -> SweepTrial | None:
    """Trial 0 where it has a loss: what the best one is compared with."""
    trials = sweep.record.trials
    return trials[0] if trials and trials[0].eval_loss is not None and sweep.record.best != 0 else None
