"""A process that is told to stop by its scheduler: exit code 5, and the next one ends what it began."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_run import laras, write_workplace

from laras.errors import ExitCode

LIMIT_S = 200


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workplace(
        tmp_path_factory.mktemp("work"),
        "max_steps: 60\nnum_train_epochs: 20\neval_steps: 20\nsave_steps: 20\nlogging_steps: 1\n",
    )


def signalled(folder: Path, name: str, number: int, ready: Callable[[Path], bool]) -> int:
    """The exit code of a `laras train` that gets a signal as soon as its run is `ready`."""
    command = [sys.executable, "-m", "laras", "train", "laras.yaml", f"run_name={name}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + LIMIT_S
            while not ready(folder / "runs" / name):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(number)
            return process.wait(LIMIT_S)
        finally:
            process.kill()


def has_steps(run: Path) -> bool:
    log = run / "logs" / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


@pytest.mark.slow
def test_a_process_that_is_stopped_exits_with_5_and_a_resume_ends_the_run(workplace: Path) -> None:
    assert signalled(workplace, "stopped", signal.SIGTERM, has_steps) == ExitCode.INTERRUPTED
    run = workplace / "runs" / "stopped"
    result = json.loads((run / "records" / "result.json").read_text(encoding="utf-8"))
    assert result["status"] == "interrupted" and 0 < result["steps"] < 60
    assert (run / "checkpoints" / f"step-{result['steps']}" / "manifest.json").exists()
    done = laras("resume", "runs/stopped", "--json", cwd=workplace)
    assert done.returncode == ExitCode.DONE, done.stderr
    assert json.loads(done.stdout)["steps"] == 60
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
