"""What is tried next and what is given up depends on the trials so far, never on how often a process died."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from sqlalchemy import event

from laras.errors import ExitCode, RunStateError
from laras.sweep_record import SweepParameter
from laras.sweeping.study import STARTUP_TRIALS, Study, StudyUnwritableError, pruned_step_of, reason_of

RATE = SweepParameter(name="learning_rate", kind="float", low=1e-5, high=1e-2, log=True)
RANK = SweepParameter(name="lora_r", kind="choice", choices=(4, 8))
EPOCHS = SweepParameter(name="num_train_epochs", kind="int", low=1, high=3)


def loss_of(values: dict) -> float:
    return abs(math.log10(values["learning_rate"]) + 3) + values["lora_r"] / 100


def search(path: Path, trials: int, die_every: bool) -> list[tuple]:
    """A search without training; a process that dies leaves the trial running, reported in part."""
    study = Study(path, (RATE, RANK), seed=3)
    for _ in range(trials):
        trial = study.start()
        assert trial is not None
        trial.report(1, loss_of(trial.values) + 1)
        if die_every:
            study.close()
            study = Study(path, (RATE, RANK), seed=3)
            trial = study.unfinished()
            assert trial is not None
        trial.report(1, loss_of(trial.values) + 1)
        trial.report(2, loss_of(trial.values))
        trial.finish(loss_of(trial.values))
        assert study.unfinished() is None
    found = [(one.number, one.state.name, one.params, one.value, one.intermediate_values) for one in study.trials()]
    study.close()
    return found


def test_proposals_are_the_same_however_often_the_process_died(tmp_path: Path) -> None:
    trials = STARTUP_TRIALS + 2  # those that are drawn, and some that are learned
    whole = search(tmp_path / "whole.sqlite3", trials, die_every=False)
    assert search(tmp_path / "died.sqlite3", trials, die_every=True) == whole
    assert len({tuple(sorted(values.items())) for _, _, values, _, _ in whole}) == trials
    assert all(float(f"{values['learning_rate']:.4g}") == values["learning_rate"] for _, _, values, _, _ in whole)


def test_a_finite_space_is_tried_without_repeating_and_then_ends(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.sqlite3", (RANK, EPOCHS), seed=0)
    tried = []
    while trial := study.start():
        tried.append(tuple(trial.values.values()))
        trial.finish(1.0)
    assert sorted(tried) == [(rank, epochs) for rank in (4, 8) for epochs in (1, 2, 3)]
    study.close()


def curve(study: Study, losses: list[float]) -> int | None:
    """Runs a trial with these validation losses; the number of the validation at which it is given up."""
    trial = study.start()
    assert trial is not None
    for number, loss in enumerate(losses, start=1):
        trial.report(number, loss)
        if number < len(losses) and trial.should_prune():
            trial.note_pruned(10 * number, "behind")
            trial.prune()
            return number
    trial.finish(min(losses))
    return None


def test_a_trial_is_given_up_when_it_is_behind_the_median_and_not_too_early(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.sqlite3", (RATE,), seed=0)
    assert [curve(study, [9, 9, 9]), curve(study, [3, 2, 1]), curve(study, [3, 2, 1])] == [None] * 3, "too few to judge"
    assert curve(study, [8, 8, 8]) == 2, "the first validation falls into the warm-up"
    assert curve(study, [8, 1.5, 8]) is None, "what counts is the lowest loss so far"
    assert curve(study, [8, math.nan, 8]) == 2
    states = [(one.state.name, pruned_step_of(one), reason_of(one)) for one in study.trials()[3:]]
    assert states == [("PRUNED", 20, "behind"), ("COMPLETE", None, None), ("PRUNED", 20, "behind")]
    assert study.trials()[3].value == 8
    study.close()


def test_a_trial_that_cannot_be_trained_says_why_and_is_learned_nothing_from(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.sqlite3", (RATE,), seed=0)
    trial = study.start({"learning_rate": 1e-3})
    assert trial is not None and trial.values == {"learning_rate": 1e-3}
    trial.fail("it diverged")
    (failed,) = study.trials()
    assert (failed.state.name, failed.value, reason_of(failed)) == ("FAIL", None, "it diverged")
    study.close()


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "study.sqlite3"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(RunStateError, match=r"study\.sqlite3 cannot be read") as caught:
        Study(path, (RATE,), seed=0)
    assert caught.value.exit_code == ExitCode.RUN_STATE and caught.value.hint


def test_a_full_disk_ends_the_sweep_and_no_trial(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.sqlite3", (RATE,), seed=0)
    pages = (tmp_path / "study.sqlite3").stat().st_size // 4096 + 2

    @event.listens_for(study._storage.engine, "connect")
    def _limit(connection: object, record: object) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")  # type: ignore[attr-defined]

    study._storage.remove_session()
    study._storage.engine.dispose()
    trial = study.start()
    assert trial is not None
    with pytest.raises(StudyUnwritableError, match="full") as caught:
        for number in range(1, 10_000):
            trial.note_pruned(number, "x" * 2000 * number)
    assert caught.value.exit_code == ExitCode.ABORTED
    left = study.unfinished()
    assert left is not None and left.number == 0
    study.close()
