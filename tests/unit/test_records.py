"""Records: whole or absent, chained by digest, refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from laras.errors import RunStateError
from laras.record_base import digest_of, write_atomically
from laras.records import BestCheckpoint, Measured, RunResult


def result(**changes: object) -> RunResult:
    values: dict[str, object] = {
        "status": "finished",
        "steps": 10,
        "epochs": 1.0,
        "train_loss": 1.5,
        "best": BestCheckpoint(step=8, eval_loss=1.25),
        "stopped_early": False,
        "measured": Measured(peak_allocated_bytes=1, peak_reserved_bytes=2, tokens_per_s=3.0, elapsed_s=4.0),
    }
    return RunResult.model_validate(values | changes)


def test_a_record_reads_back_equal_with_the_same_digest(tmp_path: Path) -> None:
    result().save(tmp_path)
    loaded = RunResult.load(tmp_path)
    assert loaded == result()
    assert loaded.digest() == result().digest()


def test_any_change_changes_the_digest() -> None:
    assert result().digest() != result(steps=11).digest()
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def written_by_an_older_version(run_dir: Path) -> Path:
    """The file of a result, from before results had `events`."""
    path = result().save(run_dir)
    content = json.loads(path.read_text())
    del content["events"]
    path.write_text(json.dumps(content, indent=2))
    return path


def test_a_record_of_an_older_version_keeps_the_digest_that_others_were_built_on(tmp_path: Path) -> None:
    path = written_by_an_older_version(tmp_path)
    loaded = RunResult.load(tmp_path)
    assert loaded == result() and loaded.events == ()
    assert loaded.digest() == digest_of(json.loads(path.read_text())) != result().digest()
    loaded.save(tmp_path / "copied")
    assert RunResult.load(tmp_path / "copied").digest() == loaded.model_copy().digest() == loaded.digest()


def test_a_value_that_was_changed_in_a_file_changes_the_digest_whatever_version_wrote_it(tmp_path: Path) -> None:
    path = written_by_an_older_version(tmp_path)
    before, content = RunResult.load(tmp_path).digest(), path.read_text()
    for name, value in {"steps": 11, "train_loss": None, "events": [], "schema_version": 2}.items():
        path.write_text(json.dumps({**json.loads(content), name: value}))
        assert RunResult.load(tmp_path).digest() != before
    path.write_text(json.dumps(json.loads(content), sort_keys=True))  # the same values in another order
    assert RunResult.load(tmp_path).digest() == before


def test_a_changed_copy_of_a_record_has_the_digest_of_the_file_that_it_will_be(tmp_path: Path) -> None:
    written_by_an_older_version(tmp_path)
    changed = RunResult.load(tmp_path).model_copy(update={"steps": 11})
    assert changed.digest() == result(steps=11).digest()
    changed.save(tmp_path)
    assert RunResult.load(tmp_path).digest() == changed.digest()


def test_a_record_is_frozen_and_refuses_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        result().steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        result(surprise=1)


def test_a_missing_or_damaged_record_is_a_run_state_error(tmp_path: Path) -> None:
    with pytest.raises(RunStateError, match="has no result record"):
        RunResult.load(tmp_path)
    path = result().save(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RunStateError, match="damaged"):
        RunResult.load(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
