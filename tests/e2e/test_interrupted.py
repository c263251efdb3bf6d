"""A process that is told to stop by its scheduler: exit code 5, and the next one ends what it began.

Before the first step there is no run, or one that a resume trains from its beginning.
"""

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

from laras import pipeline
from laras.config_file import load_config
from laras.data import sealed
from laras.errors import ExitCode, TrainingInterrupted
from laras.progress import Observer
from laras.rundir import RunDir, run_status

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


class SignalAt(Observer):
    """Sends a signal as soon as a stage begins, or makes its first progress."""

    def __init__(self, stage: str, in_progress: bool = False) -> None:
        self._wanted, self._in_progress, self._stage = stage, in_progress, ""

    def stage_started(self, name: str) -> None:
        self._stage = name
        if name.startswith(self._wanted) and not self._in_progress:
            signal.raise_signal(signal.SIGTERM)

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        if self._stage.startswith(self._wanted):
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_workplace(tmp_path, "max_steps: 3\nnum_train_epochs: 20\neval_steps: 3\nrun_name: small\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *names, **options: str(folder / "cache"))
    return folder


@pytest.mark.parametrize(
    "observer",
    [SignalAt(stage) for stage in ("loading the tokenizer", "reading", "comparing and dividing rows", "planning")]
    + [SignalAt("reading", in_progress=True)],
    ids=lambda observer: f"{observer._wanted}{', in progress' * observer._in_progress}",
)
def test_before_there_is_a_run_nothing_is_left_of_it(small: Path, observer: SignalAt) -> None:
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM") as caught:
        pipeline.train(load_config(small / "laras.yaml"), observer)
    assert "no run yet" in str(caught.value)
    left = [*small.glob("runs/*"), *small.glob("runs/.*"), *small.glob("cache/prepared/.*")]
    assert not left


def test_a_run_that_has_no_step_yet_is_resumed_to_the_end_it_would_have_had(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(small / "laras.yaml")
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM") as caught:
        pipeline.train(config, SignalAt("loading the model"))
    run = RunDir(small / "runs" / "small")
    assert "`laras resume runs/small`" in str(caught.value)
    assert run_status(run) == "interrupted" and not run.metrics.exists()
    again = load_config(small / "laras.yaml", {"run_name": "again"})
    seal = sealed.seal_test

    def seal_under_a_signal(*given: object) -> str:
        signal.raise_signal(signal.SIGTERM)  # among the files of the run: they are all written
        return seal(*given)

    monkeypatch.setattr(sealed, "seal_test", seal_under_a_signal)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM") as caught:
        pipeline.train(again)
    monkeypatch.undo()
    monkeypatch.chdir(small)
    assert "`laras resume runs/again`" in str(caught.value)
    for name in ("small", "again"):
        assert pipeline.resume(Path("runs") / name).result.steps == 3
    whole = pipeline.train(load_config(small / "laras.yaml", {"run_name": "whole"}))
    weights = [Path("runs") / name / "final" / "adapter_model.safetensors" for name in ("small", "again")]
    assert all(path.read_bytes() == (whole.run_dir / "final" / path.name).read_bytes() for path in weights)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_in_one_line_that_it_was_stopped_before_the_first_step(workplace: Path, number: int) -> None:
    command = [sys.executable, "-m", "laras", "train", "laras.yaml", f"run_name=early-{number}"]
    with subprocess.Popen(command, cwd=workplace, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "loading the tokenizer\n"
            process.send_signal(number)
            said = process.stderr.read()
        finally:
            process.kill()
    assert process.returncode == ExitCode.INTERRUPTED
    assert f"error: stopped by {signal.Signals(number).name}" in said and "Traceback" not in said
    assert not [path for path in workplace.glob("runs/*") if "early" in path.name]
