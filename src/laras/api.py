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

    Args:
        config: A file, a mapping of keys, a `RunConfig`, or None for the built-in example.
        **overrides: Keys of the configuration that replace what it says.

    Raises:
        ConfigError: With every problem at once.
    """
    if isinstance(config, RunConfig):
        return load_config(None, {**config.model_dump(mode="json", exclude_unset=True), **overrides})
    if isinstance(config, Mapping):
        return load_config(None, {**config, **overrides})
    return load_config(config, overrides)


def inspect(config: ConfigLike = None, *, observer: Observer | None = None, **overrides: Any) -> Inspection:
    """What the data is and how it is divided; nothing is written but the cache of prepared data.

    Args:
        config: A file, a mapping of keys, a `RunConfig`, or None for the built-in example.
        observer: Is told what happens, such as `laras.ProgressBar()`.
        **overrides: Keys of the configuration that replace what it says.

    Raises:
        ConfigError: The configuration does not validate, or the model's tokenizer cannot be loaded.
        DataError: With every problem of the data at once.
    """
    return pipeline.inspect(configure(config, **overrides), observer)


def plan(config: ConfigLike = None, *, observer: Observer | None = None, **overrides: Any) -> TrainPlan:
    """What would run and why, for this machine or for the card that `gpu` names; nothing starts.

    Of the model only `config.json` is needed.

    Args:
        config: A file, a mapping of keys, a `RunConfig`, or None for the built-in example.
        observer: Is told what happens, such as `laras.ProgressBar()`.
        **overrides: Keys of the configuration that replace what it says.

    Returns:
        The plan, whether or not it `fits`.

    Raises:
        ConfigError: The configuration does not validate, or the model's configuration or tokenizer cannot be loaded.
        DataError: With every problem of the data at once.
    """
    return pipeline.plan(configure(config, **overrides), observer)


def train(
    config: ConfigLike = None,
    *,
    from_run: str | Path | None = None,
    checkpoint: int | None = None,
    observer: Observer | None = None,
    **overrides: Any,
) -> TrainOutcome:
    """Prepares the data, plans, trains and keeps the best; the test set stays sealed.

    Args:
        config: A file, a mapping of keys, a `RunConfig`, or None for the built-in example.
        from_run: A run, or a sweep, whose best model this one starts from, with a fresh optimizer; with `config` None,
            its configuration is taken.
        checkpoint: The step of that run to start from instead of the best one.
        observer: Is told what happens, such as `laras.ProgressBar()`.
        **overrides: Keys of the configuration that replace what it says.

    Raises:
        ConfigError: The configuration does not validate, the model cannot be loaded, or the run not be written.
        DataError: With every problem of the data at once; nothing is left behind.
        PlanError: The plan does not fit; nothing was started.
        RunStateError: The run cannot start from the weights of `from_run`; names every reason.
        TrainingInterrupted: Stopped by a signal and saved; or before there was a run, with nothing left of it.
        TrainingAborted: Numbers that do not train, or memory that no split cures.
    """
    given = Path(config).read_text(encoding="utf-8") if isinstance(config, str | Path) else None
    lender = final_run(Path(from_run)) if from_run is not None else None
    if config is None and from_run is not None:
        resolved = lent_config(Path(from_run), overrides)
    else:
        resolved = configure(config, **overrides)
    return pipeline.train(resolved, observer, given=given, from_run=lender, checkpoint=checkpoint)


def resume(run_dir: str | Path, *, checkpoint: int | None = None, observer: Observer | None = None) -> TrainOutcome:
    """Goes on where a run stopped.

    Args:
        run_dir: The run.
        checkpoint: The step to go on from instead of the newest one.
        observer: Is told what happens, such as `laras.ProgressBar()`.

    Raises:
        RunStateError: This is no run, it is in use, has finished, or has drifted since the checkpoint.
        CheckpointError: There is no usable checkpoint of that step.
        TrainingInterrupted: Stopped by a signal and saved.
        TrainingAborted: Numbers that do not train, or memory that no split cures.
    """
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
    """Searches settings by the validation loss; the same call goes on with a sweep that was left.

    Args:
        config: A file, a mapping of keys, a `RunConfig`, or None for the built-in example.
        search: What is searched, by key: a range such as `"1e-5..1e-3:log"`, or values; without it, learning rate and
            rank.
        trials: How many in all, those that are pruned or fail included.
        time_limit_s: No step is begun after so many seconds of this call; the trial that runs then is saved.
        observer: Is told what happens, such as `laras.ProgressBar()`.
        **overrides: Keys of the configuration that replace what it says.

    Raises:
        ConfigError: The configuration, the search or a limit cannot be used; with every problem at once.
        DataError: With every problem of the data at once.
        RunStateError: Another sweep or run is there, it is in use, its data have changed, or its test set was opened.
        TrainingInterrupted: Stopped by a signal, or by the time limit before any trial had finished; saved.
        TrainingAborted: No trial could be finished, or nothing can be written.
    """
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


def test(
    run_dir: str | Path,
    *,
    max_samples: int | None = None,
    answers: int = pipeline.ANSWERS,
    observer: Observer | None = None,
) -> EvalResult:
    """Opens the sealed test set of a finished run and scores the base and the tuned model on it.

    The opening is noted in the run's ledger; the score, answers of both models and a new report are left in the run.

    Args:
        run_dir: The run.
        max_samples: Score so many rows only, the same ones at every opening.
        answers: Let both models answer so many of the rows, for the report; 0 for none.
        observer: Is told what happens, such as `laras.ProgressBar()`.

    Raises:
        RunStateError: This is no run, or it is in use.
        SealedTestError: The run has not finished, it has no test rows, or they were altered.
        OutOfMemoryError: One row alone does not fit the device.
    """
    return pipeline.test(run_dir, observer, max_samples=max_samples, answers=answers)


def report(*run_dirs: str | Path, output: str | Path | None = None) -> Path:
    """Writes one self-contained HTML page of a run or a sweep, or of several runs compared.

    Args:
        *run_dirs: One or more runs; of one that still trains the page shows what there is.
        output: Where to write; `report.html` in the run, or in the working folder for several.

    Returns:
        The path of the page.

    Raises:
        RunStateError: A folder is no run, or none is given.
        ConfigError: The page cannot be written.
    """
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
    """Writes the tuned model of a finished run for other tools, loaded again and compared.

    Args:
        run_dir: The run.
        format: `adapter`: as trained; `merged`: whole weights; `gguf`: one file for llama.cpp; `ollama`: that and a
            Modelfile.
        output: The folder to make; `export/FORMAT` in the run by default.
        quantization: Of GGUF.
        push: A repository of the Hub to upload to; nothing is sent without it.
        observer: Is told what happens, such as `laras.ProgressBar()`.

    Raises:
        RunStateError: The run has not finished, or the folder exists.
        CheckpointError: The result does not compute what the adapter computes; nothing is left behind.
        ConfigError: The model has no adapter, its family is not written as GGUF, or nothing can be pushed.
        LarasError: The export is complete, but the upload failed.
    """
    from laras.reporting.export import export_run

    folder = Path(output) if output is not None else None
    return export_run(run_dir, format, output=folder, quantization=quantization, push=push, observer=observer)
