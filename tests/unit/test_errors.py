"""The error tree and its exit codes."""

from __future__ import annotations

import pickle

import pytest

from laras import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 2),
        (errors.MissingExtraError, 2),
        (errors.DataError, 3),
        (errors.PlanError, 4),
        (errors.TrainingInterrupted, 5),
        (errors.TrainingAborted, 6),
        (errors.OutOfMemoryError, 6),
        (errors.RunStateError, 7),
        (errors.CheckpointError, 7),
        (errors.SealedTestError, 7),
    ],
)
def test_every_branch_has_its_documented_exit_code(error: type[errors.LarasError], code: int) -> None:
    assert error.exit_code == code


def test_an_error_shows_all_problems_and_the_hint() -> None:
    text = str(errors.DataError("2 bad rows", hint="fix them", problems=["a.jsonl:1: empty", "a.jsonl:9: no role"]))
    assert text == "2 bad rows\n  - a.jsonl:1: empty\n  - a.jsonl:9: no role\nhint: fix them"


def test_an_error_survives_the_way_from_one_process_to_another() -> None:
    error = errors.BadRowsError("2 bad rows", hint="fix them", problems=["a.jsonl:1: empty"], report={"rows": 2})
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.report) == (errors.BadRowsError, str(error), {"rows": 2})
