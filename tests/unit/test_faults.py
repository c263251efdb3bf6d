"""A short version of the sweep of `benchmarks/faults.py`: real kills, a disk that is full, and a thousand steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def sweep(tmp_path: Path, *arguments: str) -> dict:
    results = tmp_path / "faults.json"
    command = [sys.executable, str(SWEEP), "--results", str(results), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(results.read_text())


@pytest.mark.slow
def test_runs_that_are_killed_at_random_instants_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    report = sweep(tmp_path, "--only", "kills", "--kills", "8")["kills"]
    scenarios = [entry for entry in report.values() if isinstance(entry, dict)]
    assert sum(entry["kills"] for entry in scenarios) >= 8
    assert sum(entry["different"] for entry in scenarios) == 0


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write_costs_no_checkpoint(tmp_path: Path) -> None:
    report = sweep(tmp_path, "--only", "disk")["disk"]
    assert report["limits"] >= 6
    assert {report[key] for key in report if key not in ("limits", "elapsed_s")} == {report["limits"]}


@pytest.mark.slow
def test_long_runs_stay_flat(tmp_path: Path) -> None:
    report = sweep(tmp_path, "--only", "flat", "--steps", "1000")["flat"]
    assert report["resident_growth"] < 0.02
    assert report["open_files"][0] == report["open_files"][1]
    assert report["step_time_growth"] < 0.5  # other processes share the cores
