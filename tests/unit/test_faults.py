"""A short version of the sweep of `benchmarks/faults.py`: real kills, a disk that is full, and a thousand steps."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SWEEP = Path(__file__).parents[2] / "benchmarks" / "faults.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process for all three, which loads the libraries once."""
    results = tmp_path_factory.mktemp("faults") / "faults.json"
    short = ["--kills", "8", "--scenarios", "padded,packed,qlora", "--steps", "1000", "--disks", "4"]
    command = [sys.executable, str(SWEEP), "--results", str(results), *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def test_a_session_of_the_sweep_on_a_gpu_trains_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SWEEP.parent))
    import faults_gpu

    for name, value in {"STEPS": 4, "SAVE_STEPS": 2, "EVAL_STEPS": 2, "TRAIN_ROWS": 16, "VALIDATION_ROWS": 4}.items():
        monkeypatch.setattr(faults_gpu, name, value)
    faults_gpu.make_base(tmp_path / "base")
    run_dir = tmp_path / "packed-1"

    def session() -> None:
        request = json.dumps({"run_dir": str(run_dir), "scenario": "packed"})
        monkeypatch.setattr(sys, "stdin", io.StringIO(request + "\n"))
        faults_gpu.run_session("cpu")

    session()
    expected = faults_gpu.whole_outcome(run_dir)
    assert capfd.readouterr().out.split() == ["training", "device", "cpu"]
    shutil.rmtree(run_dir / "checkpoints" / "step-4")
    (run_dir / "records" / "result.json").unlink()  # as a process leaves it that is killed after step 2
    session()
    found = faults_gpu.whole_outcome(run_dir)
    assert faults_gpu.differences(found, expected) == []
    assert faults_gpu.differences({**found, "steps": 3, "files": {}}, expected)[:2] == ["steps", "files/final"]


def test_runs_that_are_killed_at_random_instants_end_as_if_they_had_not_been(report: dict[str, Any]) -> None:
    scenarios = [entry for entry in report["kills"].values() if isinstance(entry, dict)]
    assert sum(entry["kills"] for entry in scenarios) >= 8
    assert sum(entry["different"] for entry in scenarios) == 0


def test_a_disk_that_is_full_at_any_write_costs_no_checkpoint(report: dict[str, Any]) -> None:
    counts = report["disk"]
    assert counts["limits"] >= 6
    assert {counts[key] for key in counts if key not in ("limits", "elapsed_s")} == {counts["limits"]}


def test_a_small_disk_ends_a_run_clearly_and_costs_no_checkpoint(report: dict[str, Any]) -> None:
    counts = report["tmpfs"]
    if not counts["permitted"]:
        pytest.skip("mounting a file system is not permitted here")
    assert counts["disks"] == 4
    assert {counts[key] for key in ("clear error", "checkpoints good", "same end after a resume")} == {4}


def test_long_runs_stay_flat(report: dict[str, Any]) -> None:
    flat = report["flat"]
    assert flat["resident_growth"] < 0.02
    assert flat["open_files"][0] == flat["open_files"][1]
    assert flat["step_time_growth"] < 0.5
