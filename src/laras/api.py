"""The Python API: the verbs of the command line as functions on typed records.

    import laras
    plan = laras.plan("laras.yaml", gpu="t4")
    run = laras.train("laras.yaml", learning_rate=1e-4)
    score = laras.test(run.run_dir)

A configuration is a file, a mapping of keys, a `RunConfig`, or nothing for the built-in example; keyword arguments
override its keys. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laras import pipeline
from laras.config import RunConfig
from laras.config_file import load_config
from laras.pipeline import Inspection, TrainOutcome
from laras.progress import Observer
from laras.records import EvalResult, TrainPlan
from laras.sweep_record import final_run, lent_config

if TYPE_CHECKING:
    from laras.reporting.export import Export, Format
    from laras.reporting.gguf_file import Quantization
    from laras.sweeping.outcome import SweepOutcome
    from laras.sweeping.space import Search

ConfigLike = RunConfig | Mapping[str, Any] | str | Path | None


def configure(config: ConfigLike = None, **overrides: Any) -> RunConfig:
    """A validated configuration.

    Raises:
        ConfigError: With every problem at once.
    """
    if isinstance(config, RunConfig):
        return load_config(None, {**config.model_dump(mode="json", exclude_unset=True), **overrides})
    if isinstance(config, Mapping):
        return load_config(None, {**config, **overrides})
    return load_config(config, overrides)


def inspect(config: ConfigLike = None, *, observer: Observer | None = None, **overrides: Any) -> Inspection:
    """What the data is and how it is divided. See `laras.pipeline.inspect`."""
    return pipeline.inspect(configure(config, **overrides), observer)


def plan(config: ConfigLike = None, *, observer: Observer | None = None, **overrides: Any) -> TrainPlan:
    """What would run and why. See `laras.pipeline.plan`."""
    return pipeline.plan(configure(config, **overrides), observer)


def train(
    config: ConfigLike = None,
    *,
    from_run: str | Path | None = None,
    checkpoint: int | None = None,
    observer: Observer | None = None,
    **overrides: Any,
) -> TrainOutcome:
    """Trains and keeps the best. See `laras.pipeline.train`.

    With `from_run` and no configuration, that of the other run is taken, with the overrides.
    """
    given = Path(config).read_text(encoding="utf-8") if isinstance(config, str | Path) else None
    lender = final_run(Path(from_run)) if from_run is not None else None
    if config is None and from_run is not None:
        resolved = lent_config(Path(from_run), overrides)
    else:
        resolved = configure(config, **overrides)
    return pipeline.train(resolved, observer, given=given, from_run=lender, checkpoint=checkpoint)


def resume(run_dir: str | Path, *, checkpoint: int | None = None, observer: Observer | None = None) -> TrainOutcome:
    """Goes on where a run stopped. See `laras.pipeline.resume`."""
    return pipeline.resume(run_dir, observer, checkpoint=checkpoint)


def sweep(
    config: ConfigLike = None,
    search: Search = (),
    *,
    trials: int = 12,
    time_limit_s: float | None = None,
    observer: Observer | None = None,
    **overrides: Any,
) -> SweepOutcome:
    """Searches settings by the validation loss; the same call goes on. See `laras.sweeping.sweep.run_sweep`."""
    from laras.sweeping.sweep import run_sweep

    given = Path(config).read_text(encoding="utf-8") if isinstance(config, str | Path) else None
    return run_sweep(
        configure(config, **overrides),
        search,
        trials=trials,
        time_limit_s=time_limit_s,
        given=given,
        observer=observer,
    )


def test(run_dir: str | Path, *, max_samples: int | None = None, observer: Observer | None = None) -> EvalResult:
    """Opens the sealed test set and scores base and tuned model. See `laras.pipeline.test`."""
    return pipeline.test(run_dir, observer, max_samples=max_samples)


def report(*run_dirs: str | Path, output: str | Path | None = None) -> Path:
    """Writes one self-contained HTML page of a run, or of several compared. See `laras.reporting.report`."""
    from laras.reporting.report import write_report

    return write_report(run_dirs, Path(output) if output is not None else None)


def export(
    run_dir: str | Path,
    format: Format,
    *,
    output: str | Path | None = None,
    quantization: Quantization = "f16",
    push: str | None = None,
    observer: Observer | None = None,
) -> Export:
    """Writes the tuned model for other tools, checked by reloading; nothing is sent anywhere without `push`.

    See `laras.reporting.export.export_run`.
    """
    from laras.reporting.export import export_run

    folder = Path(output) if output is not None else None
    return export_run(run_dir, format, output=folder, quantization=quantization, push=push, observer=observer)
