"""One function a stage; the command line, the notebook and the Python API all call these.

Stages are composed here and nowhere else: a lower layer that needs something of a higher one gets it as a function.
With several processes (`torchrun`, `accelerate launch`) rank 0 prepares, plans and writes, and tells the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laras.config import RunConfig
from laras.config_file import config_to_yaml
from laras.environment import read_environment
from laras.errors import ConfigError, LarasError, OutOfMemoryError, RunStateError
from laras.planning.attention import require_attention
from laras.progress import Observer
from laras.ranks import from_rank_zero, own_rank
from laras.record_base import Record, write_atomically
from laras.records import (
    DatasetProfile,
    EvalResult,
    RunResult,
    Samples,
    SplitManifest,
    TrainPlan,
)
from laras.rundir import GIVEN_CONFIG_NAME, RunDir, create_run_dir, hold, require_new
from laras.stages import (
    division,
    import_backend,
    load_tokenizer_of,
    make_plan,
    prepare,
    require_device,
    require_fit,
    require_test_part,
    require_test_rows,
)
from laras.sweep_record import sweep_of
from laras.training.signals import StopRequest, leave_on_signals, stop_on_signals

if TYPE_CHECKING:
    import torch

    from laras.data.prepare import PreparedData
    from laras.training.start import Start

ANSWERS = 3
_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Inspection:
    """What the data is and how it is divided; the rows themselves stay out of it."""

    profile: DatasetProfile
    manifest: SplitManifest


@dataclass(frozen=True)
class TrainOutcome:
    """A run that has ended."""

    run_dir: Path
    plan: TrainPlan
    result: RunResult


def inspect(config: RunConfig, observer: Observer | None = None) -> Inspection:
    """Reads, validates, tokenises and divides the data; writes nothing but the cache.

    Raises:
        ConfigError: The model or its tokenizer cannot be loaded.
        DataError: With every problem of the data at once.
    """
    observer = observer or Observer()
    prepared = prepare(config, load_tokenizer_of(config, observer), observer)
    return Inspection(prepared.profile, prepared.manifest)


def plan(config: RunConfig, observer: Observer | None = None) -> TrainPlan:
    """What would run and why, for this machine's device or the one that `config.gpu` names; nothing starts.

    Only `config.json` is needed of the model. A configuration that names a model and no dataset is planned for
    examples that are all `max_length` long; so is one whose model is a bare `config.json`, which tokenises nothing.

    Returns:
        The plan, whether or not it fits.

    Raises:
        ConfigError: The model's configuration or its tokenizer cannot be loaded.
        DataError: With every problem of the data at once.
    """
    observer = observer or Observer()
    model_only = "model_name_or_path" in config.model_fields_set and "dataset" not in config.model_fields_set
    bare = Path(config.model_name_or_path).expanduser().is_file()
    if bare and not model_only:
        observer.warning(
            f"{config.model_name_or_path} brings no tokenizer: planned for examples of {config.max_length} tokens"
        )
    prepared = None if model_only or bare else prepare(config, load_tokenizer_of(config, observer), observer)
    return make_plan(config, prepared, observer)


def train(
    config: RunConfig,
    observer: Observer | None = None,
    *,
    given: str | None = None,
    from_run: Path | str | None = None,
    checkpoint: int | None = None,
    will_test: bool = False,
    stop: StopRequest | None = None,
) -> TrainOutcome:
    """Prepares, plans, trains and keeps the best; the test set stays sealed.

    Args:
        config: What the user wants.
        observer: Is told what happens; on rank 0 only.
        given: The configuration file as the user wrote it, kept beside the resolved one.
        from_run: A run whose best model this one starts from, with a fresh optimizer and schedule.
        checkpoint: The step of that run to start from instead of the best one.
        will_test: The test set is to be opened afterwards; refused at once where it would be empty.
        stop: Through which others than signals may ask the run to stop.

    Raises:
        ConfigError: The model cannot be loaded, its attention is not installed, the device is not here, no row would
            be sealed for the test that is wanted, or the run directory not written.
        DataError: With every problem of the data at once; nothing is left behind.
        PlanError: The plan does not fit; nothing was started.
        RunStateError: The run cannot start from the weights of `from_run`; names every reason.
        TrainingInterrupted: Stopped by a signal and saved; or before there was a run, with nothing left of it.
        TrainingAborted: Numbers that do not train, or memory that no split cures.
    """
    observer = observer if observer is not None and own_rank() == 0 else Observer()
    asked = stop if stop is not None else StopRequest()
    leaving = partial(leave_on_signals, asked, "there is no run yet: start it again as before")
    with leaving():
        import_failure = import_backend(config, observer)  # before anything that imports torch

    @leaving()  # in here, so that rank 0 tells the others
    def start() -> RunDir:
        require_attention(config.attn_implementation)
        require_new(config)
        require_device(config)
        if will_test:
            require_test_part(config)
        origin = _find_start(from_run, checkpoint, observer)
        own = prepare(config, load_tokenizer_of(config, observer), observer)
        prepared = origin.chained(own) if origin else own
        observer.message(division(prepared.manifest))
        if will_test:
            require_test_rows(config, prepared.manifest)
        chosen = make_plan(config, prepared, observer, import_failure)
        if config.backend == "unsloth" != chosen.choices.backend:
            observer.warning(chosen.reasons["backend"])
        if origin:
            origin.require_fit(config, chosen, own)
        require_fit(chosen)
        with stop_on_signals(asked):  # either there is a run, or its name was never there
            return _write_run(config, given, prepared, chosen, origin)

    with leaving():
        run = RunDir(Path(from_rank_zero(lambda: str(start().path))))
    return _run_training(run, observer, lambda: None, asked)


def resume(
    run_dir: Path | str,
    observer: Observer | None = None,
    *,
    checkpoint: int | None = None,
    will_test: bool = False,
    stop: StopRequest | None = None,
) -> TrainOutcome:
    """Goes on from the newest good checkpoint of a run, or from a named one; `will_test` and `stop` as in `train`.

    Raises:
        RunStateError: This is no run, it is in use, has finished, or has drifted since the checkpoint.
        CheckpointError: There is no usable checkpoint of that step.
        SealedTestError: The test set is to be opened afterwards, and cannot be.
        TrainingInterrupted: Stopped by a signal and saved.
        TrainingAborted: Numbers that do not train, or memory that no split cures.
    """
    from laras.models.unsloth import import_for_run

    observer = observer if observer is not None and own_rank() == 0 else Observer()
    asked = stop if stop is not None else StopRequest()
    run = RunDir(Path(run_dir))
    run.load_config()
    if will_test:
        from laras.data.sealed import require_scorable

        require_scorable(run.path)
    with leave_on_signals(asked, _resume_hint(run)):
        import_for_run(run.path, TrainPlan.load(run.path).choices, observer)
        from laras.training.resume import choose_checkpoint  # torch, which comes after

    return _run_training(run, observer, lambda: choose_checkpoint(run.path, checkpoint, observer), asked)


def test(
    run_dir: Path | str,
    observer: Observer | None = None,
    *,
    max_samples: int | None = None,
    answers: int = ANSWERS,
) -> EvalResult:
    """Opens the sealed test set of a finished run and scores the base and the tuned model on it.

    The score, some answers of both models and a new report are left in the run.

    Args:
        run_dir: The run.
        observer: Is told what happens.
        max_samples: Score so many rows only, the same ones at every opening.
        answers: Let both models answer so many of the rows, for the report; 0 for none.

    Raises:
        RunStateError: This is no run, or it is in use.
        SealedTestError: The run has not finished, it has no test rows, or they were altered.
        OutOfMemoryError: One row alone does not fit the device.
    """
    from laras.data.sealed import open_sealed, read_openings, require_openable

    observer = observer or Observer()
    run = RunDir(Path(run_dir))
    config = run.load_config()
    with hold(run):
        require_openable(run.path)  # what is refused is refused at once
        from laras.evaluation.comparison import compare_models
        from laras.models.device_memory import required
        from laras.models.finished import load_finished

        chosen, result = TrainPlan.load(run.path), RunResult.load(run.path)
        observer.stage_started("loading the base and the tuned model")
        with required("both models"):
            pair = load_finished(config, chosen.choices, run.final, _device())
        # Noted in the ledger only now: a model that cannot be loaded has seen nothing.
        rows = _as_dataset(open_sealed(run.path, "laras test", max_samples))
        found = compare_models(
            pair,
            rows,
            batch_size=chosen.choices.per_device_eval_batch_size,
            device=_device(),
            seed=config.seed,
            observer=observer,
        )
        evaluation = EvalResult(
            parent_digest=result.digest(),
            base=found.base,
            tuned=found.tuned,
            loss_improvement_ci95=found.loss_improvement_ci95,
            openings=len(read_openings(run.path)),
        )
        _save(evaluation, run)
        if answers:
            _answer(pair, rows, answers, evaluation, config.seed, run, observer)
    _write_report(run, observer)
    if (sweep_dir := sweep_of(run.path)) is not None:  # whose page shows the score, too
        _write_report(RunDir(sweep_dir), observer)
    return evaluation


def _answer(
    pair: Any, rows: Any, count: int, evaluation: EvalResult, seed: int, run: RunDir, observer: Observer
) -> None:
    """Answers of both models beside each other, for the report; the score stands without them."""
    from laras.evaluation.samples import generate_samples

    observer.stage_started("answering with both models")
    try:
        with pair.tuned() as tuned:
            samples = generate_samples(
                tuned, pair.tokenizer, rows, count, seed, _ANSWER_TOKENS, base=pair.base, observer=observer
            )
    except OutOfMemoryError as error:
        observer.warning(f"no answers for the report: {error.message}")
        return
    _save(
        Samples(parent_digest=evaluation.digest(), seed=seed, max_new_tokens=_ANSWER_TOKENS, samples=tuple(samples)),
        run,
    )


def _write_report(run: RunDir, observer: Observer) -> None:
    """The page for people; what goes wrong with it is said and spoils nothing else."""
    from laras.reporting.report import write_report

    try:
        write_report([run.path])
    except LarasError as error:
        observer.warning(f"no report was written: {error.message}")


def _find_start(from_run: Path | str | None, checkpoint: int | None, observer: Observer) -> Start | None:
    if from_run is None:
        if checkpoint is not None:
            raise ConfigError(
                f"checkpoint {checkpoint} of which run?", hint="name it: `laras train --from RUN --checkpoint N`"
            )
        return None
    from laras.training.start import find_start

    origin = find_start(from_run, checkpoint, observer)
    observer.message(f"starts from the weights of {origin.record.run}, {origin.record.model}")
    return origin


def _write_run(
    config: RunConfig, given: str | None, prepared: PreparedData, chosen: TrainPlan, origin: Start | None
) -> RunDir:
    from laras.data.sealed import seal_test
    from laras.data.store import write_tokens

    def write(run: RunDir) -> None:
        write_tokens(prepared.train, run.train_rows)
        write_tokens(prepared.validation, run.validation_rows)
        write_tokens(prepared.members, run.members)
        if origin:
            origin.copy_to(run)
        seal_test(prepared.test, run.path)
        for record in (prepared.profile, prepared.manifest, chosen, read_environment(chosen.hardware)):
            record.save(run.path)
        if given is not None:
            write_atomically(run.path / GIVEN_CONFIG_NAME, given)
        write_atomically(run.config, config_to_yaml(config))

    return create_run_dir(config, write)


def _save(record: Record, run: RunDir) -> None:
    try:
        record.save(run.path)
    except OSError as error:
        raise RunStateError(
            f"the {record.name} record cannot be written to {run.path}: {error.strerror or error}",
            hint="make room, then run `laras test` again",
        ) from None


def _run_training(
    run: RunDir, observer: Observer, choose: Callable[[], Path | None], stop: StopRequest
) -> TrainOutcome:
    with leave_on_signals(stop, _resume_hint(run)):
        outcome = _load_and_train(run, observer, choose, stop)
    if own_rank() == 0:
        _write_report(run, observer)
    return outcome


def _resume_hint(run: RunDir) -> str:
    return f"`laras resume {run.path}` goes on from there"


def _load_and_train(
    run: RunDir, observer: Observer, choose: Callable[[], Path | None], stop: StopRequest
) -> TrainOutcome:
    """Trains as the owner of the run; `choose` may set damaged checkpoints aside, so it is asked only then."""
    from laras.data.store import read_tokens
    from laras.models.build import build_model
    from laras.models.device_memory import required
    from laras.models.unsloth import off_standard_output
    from laras.training.run import run_training
    from laras.training.start import start_weights

    config, chosen = run.load_config(), TrainPlan.load(run.path)
    with hold(run) if own_rank() == 0 else nullcontext(), off_standard_output(chosen.choices):
        resume_from = from_rank_zero(choose)
        tokenizer = load_tokenizer_of(config, observer)
        observer.stage_started("loading the model")
        if config.full_determinism:  # cuBLAS reads it once, at the first matrix product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with required("the model"):
            model = build_model(config, chosen.choices, str(_device()), observer)
        result = run_training(
            config,
            chosen,
            model,
            tokenizer,
            train_rows=_as_dataset(read_tokens(run.train_rows)),
            validation_rows=_as_dataset(read_tokens(run.validation_rows)),
            run_dir=run.path,
            observer=observer,
            resume_from=resume_from,
            start=start_weights(run.path),
            stop=stop,
        )
    return TrainOutcome(run.path, chosen, result)


def _as_dataset(table: Any) -> Any:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table))


def _device() -> torch.device:
    """This process' own device."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
