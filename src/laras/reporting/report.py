"""`report.html`: one page that holds everything about a run, or compares several; no script, nothing loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined

from laras import __version__, formatting
from laras.config_file import config_to_yaml
from laras.errors import ConfigError, RunStateError
from laras.record_base import write_atomically
from laras.reporting import charts, data_charts
from laras.reporting.drawing import Drawing, drawing_style
from laras.reporting.history import BUCKETS, Series
from laras.reporting.run_data import RunData, load_run_data
from laras.reporting.sweep_page import sweep_page
from laras.sweep_record import final_run, is_sweep

# Rows of a table in the page; what is left out is counted there.
_MAX_TABLE_ROWS = 40
_MAX_PROBLEMS = 100
_BAND_NOTE = "Lines are means of neighbouring values; bands reach from the lowest to the highest of them."


def write_report(run_dirs: Sequence[Path | str], output: Path | None = None) -> Path:
    """Writes the page of one run or one sweep, or a comparison of several.

    Everything is read as it is now, so that a run may still be going on; a section without a record says so.

    Args:
        run_dirs: One or more run directories; among several, a sweep stands for its final model.
        output: Where to write; `report.html` in the run, or in the working folder for several.

    Returns:
        The path of the page.

    Raises:
        RunStateError: A folder is no run, or none is given.
        ConfigError: The page cannot be written.
    """
    if not run_dirs:
        raise RunStateError("no run is named", hint="`laras runs` lists the runs")
    paths = [Path(path) for path in run_dirs]
    path = output or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if len(paths) == 1 and is_sweep(paths[0]):
        page = render_sweep(paths[0], links=path.resolve().parent == paths[0].resolve())
    else:
        page = render_report([load_run_data(final_run(one)) for one in paths])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", hint="name a file that can be written with --output"
        ) from None
    return path


def render_report(runs: Sequence[RunData]) -> str:
    """The page as text."""
    with drawing_style():
        if len(runs) == 1:
            return _templates().get_template("run.html.j2").render(**_run_page(runs[0]))
        return _templates().get_template("comparison.html.j2").render(**_comparison_page(runs))


def render_sweep(sweep_dir: Path, *, links: bool) -> str:
    """The page of a sweep as text."""
    with drawing_style():
        return _templates().get_template("sweep.html.j2").render(**sweep_page(sweep_dir, links=links))


@lru_cache(maxsize=1)
def _templates() -> Templates:
    templates = Templates(
        loader=PackageLoader("laras", "resources/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "size", "short", "duration", "percent", "interval", "plain", "instant"):
        templates.filters[name] = getattr(formatting, name)
    return templates


def _run_page(run: RunData) -> dict[str, Any]:
    cap = run.profile.max_length_tokens if run.profile else None
    drawings: dict[str, Drawing | None] = {
        "score": charts.score_chart(run.evaluation) if run.evaluation else None,
        "loss": charts.loss_chart(run),
        "optimization": charts.optimization_chart(run),
        "memory": charts.memory_chart(run),
        "components": charts.components_chart(run),
        "lengths": data_charts.lengths_chart(run.split, cap) if run.split else None,
    }
    problems = run.profile.problems if run.profile else ()
    return {
        "laras_version": __version__,
        "run": run,
        "drawings": drawings,
        "band_note": _BAND_NOTE if len(run.history.get("loss")) > BUCKETS else "",
        "verdict": verdict(run),
        "validations": _thinned(_validations(run)),
        "validation_count": len(run.history.get("eval_loss")),
        "problems": problems[:_MAX_PROBLEMS],
        "hidden_problems": max(0, len(problems) - _MAX_PROBLEMS),
        "choices": run.plan.choices.model_dump(mode="json") if run.plan else {},
        "config_yaml": config_to_yaml(run.config) if run.config else None,
    }


def verdict(run: RunData) -> tuple[str, str]:
    """The result in one sentence, and its kind: `good`, `bad`, `open` or `none`."""
    if run.evaluation is None:
        if run.status == "finished":
            return "Not scored yet: laras test opens the sealed test set and compares base and tuned model.", "none"
        words = {"running": "is still running", "interrupted": "was interrupted"}.get(run.status, "did not finish")
        return f"The run {words}; it can be scored once it has finished.", "none"
    base, tuned = run.evaluation.base, run.evaluation.tuned
    low, high = run.evaluation.loss_improvement_ci95
    change = (
        f"loss {formatting.number(base.loss)} \u2192 {formatting.number(tuned.loss)}, "
        f"perplexity {formatting.number(base.perplexity, 2)} \u2192 {formatting.number(tuned.perplexity, 2)}, "
        f"token accuracy {formatting.percent(base.token_accuracy)} \u2192 {formatting.percent(tuned.token_accuracy)}"
    )
    where = f"on {tuned.examples:,} sealed test examples ({tuned.target_tokens:,} target tokens)"
    if low > 0:
        return f"The tuned model is better than its base {where}: {change}.", "good"
    if high < 0:
        return f"The tuned model is worse than its base {where}: {change}.", "bad"
    return f"No difference that this test set can tell {where}: {change}.", "open"


def _validations(run: RunData) -> list[dict[str, float | None]]:
    losses = run.history.get("eval_loss")
    perplexity = _by_step(run.history.get("eval_perplexity"))
    accuracy = _by_step(run.history.get("eval_token_accuracy"))
    return [
        {
            "step": int(step),
            "loss": float(loss),
            "perplexity": perplexity.get(step, math.exp(min(loss, 700))),
            "accuracy": accuracy.get(step),
        }
        for step, loss in zip(losses.step, losses.value, strict=True)
    ]


def _by_step(series: Series) -> dict[float, float]:
    return dict(zip(series.step.tolist(), series.value.tolist(), strict=True))


def _thinned(rows: list[dict[str, float | None]]) -> list[dict[str, float | None]]:
    """At most `_MAX_TABLE_ROWS` rows: first, last and best among them."""
    if len(rows) <= _MAX_TABLE_ROWS:
        return rows
    best = min(range(len(rows)), key=lambda index: rows[index]["loss"] or math.inf)
    last = len(rows) - 1
    even = {round(place * last / (_MAX_TABLE_ROWS - 2)) for place in range(_MAX_TABLE_ROWS - 1)}
    return [rows[index] for index in sorted(even | {best})]


def _comparison_page(runs: Sequence[RunData]) -> dict[str, Any]:
    labels = _labels(runs)
    drawings = [
        charts.comparison_chart(runs, labels, metric, title)
        for metric, title in (("eval_loss", "validation loss"), ("loss", "training loss"))
    ]
    return {
        "laras_version": __version__,
        "runs": list(zip(labels, runs, strict=True)),
        "drawings": [drawing for drawing in drawings if drawing is not None],
        "verdicts": [verdict(run) for run in runs],
        "differences": _differences(runs),
        "different_splits": [
            name
            for name in ("validation", "test")
            if len({getattr(run.split, name).sha256 for run in runs if run.split}) > 1
        ],
    }


def _labels(runs: Sequence[RunData]) -> list[str]:
    """The runs' names; two of one name are told apart by their folders."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Settings and planned choices that are not the same in every run."""
    values = [
        {
            **(
                {f"config: {key}": value for key, value in run.config.model_dump(mode="json").items()}
                if run.config
                else {}
            ),
            **(
                {f"plan: {key}": value for key, value in run.plan.choices.model_dump(mode="json").items()}
                if run.plan
                else {}
            ),
        }
        for run in runs
    ]
    keys = sorted({key for value in values for key in value} - {"config: run_name", "config: output_dir"})
    rows = [(key, [formatting.plain(value.get(key)) for value in values]) for key in keys]
    return [(key, texts) for key, texts in rows if len(set(texts)) > 1]
