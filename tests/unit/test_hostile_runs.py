"""A run directory that somebody has tampered with is refused; links and pipes in it are not followed."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from example_run import write_example_run
from laras.errors import CheckpointError, ExitCode, RunStateError, SealedTestError
from laras.progress import Observer
from laras.records import DatasetProfile, EvalResult, RunResult, SplitManifest, TrainPlan
from laras.rundir import RunDir, list_runs, run_status
from laras.training.checkpoints import (
    choose_checkpoint,
    list_checkpoints,
    remove_old_checkpoints,
    save_checkpoint,
)
from laras.training.state import read_state
from laras.whole_folder import folder_problems, require_whole

RECORDS = (DatasetProfile, SplitManifest, TrainPlan, RunResult, EvalResult)


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def checkpoint(folder: Path, step: int = 1) -> Path:
    return save_checkpoint(folder, step, lambda aside: (aside / "a.txt").write_text("a", encoding="utf-8"))  # type: ignore[arg-type,return-value]


def with_manifest(path: Path, **names: Any) -> Path:
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text(encoding="utf-8")), **names}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"null", b"[]", b"[" * 100_000, b'{"name": 1}', b'{"steps": ' + b"9" * 5000 + b"}", b'"\\ud800"'],
)
@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_another_shape_is_refused(tmp_path: Path, record: Any, content: bytes) -> None:
    path = tmp_path / "records" / f"{record.name}.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(RunStateError, match="damaged") as caught:
        record.load(tmp_path)
    assert caught.value.exit_code == ExitCode.RUN_STATE
    assert caught.value.hint


@pytest.mark.parametrize("record", RECORDS)
def test_a_value_of_another_type_in_a_record_is_refused(tmp_path: Path, record: Any) -> None:
    run = tmp_path / "run"
    write_example_run(run)
    path = run / "records" / f"{record.name}.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    for name in whole.keys() - {"parent_digest"}:
        path.write_text(json.dumps({**whole, name: {"no": ["such", None]}}), encoding="utf-8")
        with pytest.raises(RunStateError, match="damaged"):
            record.load(run)
    path.write_text(json.dumps({**whole, "../extra": 1}), encoding="utf-8")
    with pytest.raises(RunStateError, match="damaged"):
        record.load(run)
    (summary,) = list_runs(tmp_path)  # one damaged run does not hide the others
    assert summary.path == str(run)


@pytest.mark.parametrize("name", ["../../outside.txt", "/etc/passwd", "..", "", "a\0b", "x\n\x1b[31my", "\ud800"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.txt").write_text("outside", encoding="utf-8")
    path = with_manifest(checkpoint(tmp_path / "run" / "checkpoints"), **{name: "0" * 64})
    with pytest.raises(CheckpointError) as caught:
        require_whole(path, "")
    assert "missing" in caught.value.problems[0]
    assert "\x1b" not in caught.value.problems[0] and "\n" not in caught.value.problems[0]
    assert choose_checkpoint(path.parent, None, Observer()) is None
    assert (tmp_path / "outside.txt").read_text(encoding="utf-8") == "outside"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"[" * 100_000, b'{"a.txt": 5}', b"{}", b"\xff", b'"a.txt"'])
def test_a_manifest_of_another_shape_means_a_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = checkpoint(tmp_path)
    (path / "manifest.json").write_bytes(content)
    assert folder_problems(path)
    assert choose_checkpoint(tmp_path, None, Observer()) is None
    assert (tmp_path / "step-1.damaged" / "damaged.txt").is_file()


def test_links_and_pipes_in_a_checkpoint_are_damage_and_are_not_waited_for(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a", encoding="utf-8")  # the same content, so that the digest fits
    linked = checkpoint(tmp_path / "c", 1)
    (linked / "a.txt").unlink()
    (linked / "a.txt").symlink_to(secret)
    assert folder_problems(linked) == ["a.txt: altered"]
    piped = checkpoint(tmp_path / "c", 2)
    (piped / "a.txt").unlink()
    os.mkfifo(piped / "a.txt")
    assert folder_problems(piped) == ["a.txt: altered"]
    manifest = checkpoint(tmp_path / "c", 3) / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    assert folder_problems(manifest.parent) == ["manifest.json: missing"]


def test_a_linked_checkpoint_is_none_and_retention_leaves_its_target(tmp_path: Path) -> None:
    elsewhere = checkpoint(tmp_path / "elsewhere", 9)
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        checkpoint(folder, step)
    (folder / "step-0").symlink_to(elsewhere, target_is_directory=True)
    (folder / "step-9").symlink_to(elsewhere, target_is_directory=True)
    assert [step for step, _ in list_checkpoints(folder)] == [1, 2, 3]
    with pytest.raises(CheckpointError, match="no checkpoint of step 9"):
        choose_checkpoint(folder, 9, Observer())
    remove_old_checkpoints(folder, 1, None)
    assert folder_problems(elsewhere) == []


def test_a_pickle_put_into_a_checkpoint_is_not_of_it_and_not_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoints")
    (path / "optimizer.pt").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    assert folder_problems(path) == ["optimizer.pt: not of this folder"]
    assert choose_checkpoint(path.parent, None, Observer()) is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[]", "null", '{"counters": []}', '{"counters": {"stopping": 1}}', "[" * 100_000])
def test_a_state_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "training.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path)
    assert caught.value.hint


def test_a_run_with_a_hostile_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: !!python/name:os.system\n", encoding="utf-8")
    with pytest.raises(RunStateError):
        RunDir(tmp_path).load_config()
    assert run_status(RunDir(tmp_path)) == "interrupted"  # a run that left no result


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_an_impossible_run_name_is_refused(name: str) -> None:
    with pytest.raises(RunStateError) as caught:
        RunDir(Path(name)).load_config()
    assert caught.value.hint


def test_an_edited_ledger_is_refused(tmp_path: Path) -> None:
    from laras.data.sealed import read_openings

    ledger = tmp_path / "splits" / "sealed" / "openings.jsonl"
    ledger.parent.mkdir(parents=True)
    line = {"opened_at": "2026-01-01T00:00:00+00:00", "purpose": "x", "max_samples": None, "laras_version": "1"}
    for changed in ({"purpose": 5}, {"max_samples": "x"}, {"extra": 1}, {"opened_at": None}):
        ledger.write_text(json.dumps({**line, **changed}) + "\n", encoding="utf-8")
        with pytest.raises(SealedTestError, match=r"openings\.jsonl:1"):
            read_openings(tmp_path)
    ledger.write_bytes(b"[" * 100_000)
    with pytest.raises(SealedTestError):
        read_openings(tmp_path)


def test_a_short_fuzz_of_every_reader_lets_nothing_but_a_laras_error_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import fuzz

    try:
        targets = fuzz.fuzz(2_000, seed=1)
    finally:
        sys.modules.pop("fuzz", None)
    assert sum(target.inputs for target in targets) >= 2_000
    assert {target.name: target.uncaught for target in targets if target.uncaught} == {}
    assert all(0 < target.refused < target.inputs for target in targets)
