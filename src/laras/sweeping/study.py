"""Optuna's part of a sweep: what to try next, when a trial is not worth going on with, and where that is kept.

The only module that imports Optuna. What it proposes depends on the finished trials, the sweep's seed and the number of
the trial alone, so that a process that died in between changes nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laras.errors import MissingExtraError, RunStateError, TrainingAborted
from laras.sweep_record import Setting, SweepParameter
from laras.sweeping.space import combinations

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

STARTUP_TRIALS = 5  # drawn at random before the sampler learns from them
PRUNING_AFTER_TRIALS = 3  # finished ones
FIRST_PRUNED_EVALUATION = 2  # the first one falls into the warm-up of the learning rate
_STUDY = "laras"
_PRUNED_AT = "pruned_at_step"
_REASON = "reason"
_TRIES = 20  # proposals before one that was tried already is taken again


def require_optuna() -> None:
    """Refuses early, and with the command that helps.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    if find_spec("optuna") is None:
        raise MissingExtraError("a sweep needs Optuna, which is not installed", hint="pip install 'laras[sweep]'")


class StudyUnwritableError(TrainingAborted):
    """The storage refuses to take what it is told, say for a full disk."""


@contextmanager
def _storing() -> Iterator[None]:
    """Storage errors in the words of Laras, whatever layer below they come from."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise StudyUnwritableError(
            f"the study of the sweep cannot be written: {reason:.200}",
            hint="make room, then start the same sweep again; it goes on where it was",
        ) from error


class Study:
    """The trials of one sweep in its SQLite file.

    Args:
        path: The file; made when it is not there.
        space: What is searched.
        seed: Of the proposals.

    Raises:
        RunStateError: The file is damaged or of another version of Optuna.
    """

    def __init__(self, path: Path, space: Sequence[SweepParameter], seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._seed = space, seed
        self._distributions = {parameter.name: _distribution(parameter) for parameter in space}
        if not path.exists():
            aside = path.with_name(f".{path.name}.partial")  # a kill in between leaves no half-made schema
            aside.unlink(missing_ok=True)
            _open(aside)[1].engine.dispose()
            aside.replace(path)
        try:
            self._study, self._storage = _open(path)
        except Exception as error:  # noqa: BLE001 - SQLAlchemy, alembic and Optuna each have their own
            raise RunStateError(
                f"{path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]:.200}",
                hint="restore the file, or start a new sweep with another run_name",
            ) from None

    def close(self) -> None:
        """Lets go of the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def trials(self) -> list[FrozenTrial]:
        """Every trial so far, in order."""
        return self._study.get_trials(deepcopy=False)

    def unfinished(self) -> StudyTrial | None:
        """The trial that was running when the process before ended."""
        from optuna.trial import TrialState

        found = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return StudyTrial(self._study, found[0]) if found else None

    def start(self, values: Mapping[str, Setting] | None = None) -> StudyTrial | None:
        """Begins the next trial, with the values given or proposed; None when all combinations were tried."""
        from optuna.trial import TrialState, create_trial

        if values is None and self.is_exhausted():
            return None
        chosen = dict(values) if values is not None else self._propose()
        with _storing():
            self._study.add_trial(  # with its values in one transaction
                create_trial(state=TrialState.RUNNING, params=chosen, distributions=self._distributions)
            )
        return self.unfinished()

    def is_exhausted(self) -> bool:
        """Whether every combination of a finite space is a trial."""
        count = combinations(self._space)
        return count is not None and len(self._tried()) >= count

    def _tried(self) -> set[tuple[Any, ...]]:
        return {_key(trial.params) for trial in self.trials()}

    def _propose(self) -> dict[str, Setting]:
        """Asks a copy of the study, so that a proposal leaves no trace before it is a trial."""
        import optuna

        tried, number = self._tried(), len(self.trials())
        proposal: dict[str, Setting] = {}
        for attempt in range(_TRIES):
            seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{number}/{attempt}".encode()).digest()[:4])
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
            copy = optuna.create_study(sampler=sampler)
            copy.add_trials(self.trials())
            proposal = self._rounded(copy.ask(self._distributions).params)
            if _key(proposal) not in tried:
                break
        else:
            proposal = self._untried(tried) or proposal
        return proposal

    def _rounded(self, values: Mapping[str, Any]) -> dict[str, Setting]:
        """Fractions to four digits, which a person can copy, and within their ranges."""
        rounded = dict(values)
        for parameter in self._space:
            if parameter.kind == "float":
                low, high = float(parameter.low or 0), float(parameter.high or 0)
                rounded[parameter.name] = min(high, max(low, float(f"{values[parameter.name]:.4g}")))
        return rounded

    def _untried(self, tried: set[tuple[Any, ...]]) -> dict[str, Setting] | None:
        """Any combination of a finite space that is left."""
        if combinations(self._space) is None:
            return None
        values = [p.choices or range(int(p.low or 0), int(p.high or 0) + 1) for p in self._space]
        for combination in itertools.product(*values):
            point = {parameter.name: value for parameter, value in zip(self._space, combination, strict=True)}
            if _key(point) not in tried:
                return point
        return None


class StudyTrial:
    """The trial that is running."""

    def __init__(self, study: optuna.Study, frozen: FrozenTrial) -> None:
        import optuna

        self._study = study
        # Optuna has no public way back to a running trial of an earlier process.
        self._trial = optuna.trial.Trial(study, frozen._trial_id)
        self.number: int = frozen.number
        self.values: dict[str, Setting] = dict(frozen.params)
        self._reported: dict[int, float] = dict(frozen.intermediate_values)

    @property
    def pruned_at(self) -> int | None:
        """The optimizer step at which it was decided to prune it, whatever became of the process since."""
        step = self._trial.user_attrs.get(_PRUNED_AT)
        return int(step) if step is not None else None

    def report(self, evaluation: int, loss: float) -> None:
        """Notes a validation; what counts is the lowest loss so far.

        Args:
            evaluation: Number of the evaluation, from 1.
            loss: On the validation split.
        """
        if evaluation not in self._reported:
            known = loss if math.isfinite(loss) else math.inf
            lowest = min([known, *(value for number, value in self._reported.items() if number < evaluation)])
            self._reported[evaluation] = lowest
            with _storing():
                self._trial.report(lowest, evaluation)

    def should_prune(self) -> bool:
        """Whether the lowest loss so far is above the median of the finished trials at this evaluation."""
        return self._trial.should_prune()

    def note_pruned(self, step: int, reason: str) -> None:
        """Keeps the decision, before anybody acts on it."""
        with _storing():
            self._trial.set_user_attr(_REASON, reason)
            self._trial.set_user_attr(_PRUNED_AT, step)

    def finish(self, loss: float) -> None:
        """The trial ended with this lowest validation loss."""
        with _storing():
            self._study.tell(self.number, loss)

    def prune(self) -> None:
        """The trial was pruned."""
        from optuna.trial import TrialState

        with _storing():
            self._study.tell(self.number, state=TrialState.PRUNED)

    def fail(self, reason: str) -> None:
        """The trial cannot be trained with these values."""
        from optuna.trial import TrialState

        with _storing():
            self._trial.set_user_attr(_REASON, reason)
            self._study.tell(self.number, state=TrialState.FAIL)


def reason_of(trial: FrozenTrial) -> str | None:
    """Why a trial was pruned or failed."""
    reason = trial.user_attrs.get(_REASON)
    return str(reason) if reason is not None else None


def pruned_step_of(trial: FrozenTrial) -> int | None:
    """The optimizer step at which a trial was pruned."""
    step = trial.user_attrs.get(_PRUNED_AT)
    return int(step) if step is not None else None


def _open(path: Path) -> tuple[optuna.Study, optuna.storages.RDBStorage]:
    import optuna
    from sqlalchemy.engine import URL

    url = URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    storage = optuna.storages.RDBStorage(url)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=PRUNING_AFTER_TRIALS, n_warmup_steps=FIRST_PRUNED_EVALUATION)
    study = optuna.create_study(
        storage=storage,
        study_name=_STUDY,
        direction="minimize",
        pruner=pruner,
        sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: see `Study._propose`
        load_if_exists=True,
    )
    return study, storage


def _distribution(parameter: SweepParameter) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.choices)
    low, high = parameter.low or 0, parameter.high or 0
    if parameter.kind == "int":
        return IntDistribution(int(low), int(high), log=parameter.log)
    return FloatDistribution(float(low), float(high), log=parameter.log)


def _key(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Values that can be looked up; true and 1 differ."""
    return tuple((name, type(value).__name__, value) for name, value in sorted(values.items()))
