"""A run on another library's layers is the same run: data, losses, records, checkpoints, and the way on after a kill.

Unsloth's own layers need a GPU (`tests/gpu/test_unsloth_gpu.py`); a stand-in does to other libraries what it does on
import. With `UNSLOTH_SITE=FOLDER` Unsloth itself is imported from that folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_run import write_workplace

import laras
from laras.errors import RunStateError
from laras.progress import Observer
from laras.records import RunResult, TrainPlan

TESTS = Path(__file__).parents[1]
# A folder with Unsloth itself, whose backend for CPUs then takes the place of the stand-in.
REAL = os.environ.get("UNSLOTH_SITE")


def python(*words: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": REAL or str(TESTS / "stand_in"),
        "STAND_IN_LOG": str(folder / "log.txt"),
        **variables,
    }
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def imports(folder: Path) -> list[str]:
    return [line.partition(" ")[2] for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    by_step = {(line["step"], key): line[key] for line in lines for key in ("loss", "eval_loss") if key in line}
    return [by_step[key] for key in sorted(by_step)]


class Warnings(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    settings = "num_train_epochs: 1\nlearning_rate: 0.01\nlogging_steps: 1\neval_steps: 2\n"
    return write_workplace(folder, settings, at=f"{folder}/")


@pytest.fixture(scope="module")
def plain(workplace: Path) -> Path:
    """The run of the own layers: Unsloth is asked for, and this machine has none."""
    seen = Warnings()
    done = laras.train(workplace / "laras.yaml", backend="unsloth", run_name="plain", observer=seen)
    assert any("Unsloth was asked for, but it is not installed" in text for text in seen.texts)
    return done.run_dir


@pytest.fixture(scope="module")
def killed(workplace: Path) -> Path:
    done = python(str(TESTS / "drive_unsloth.py"), "train", "laras.yaml", folder=workplace)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == ""  # its greeting went to standard error
    return workplace / "runs" / "unsloth"


def test_a_run_without_unsloth_falls_back_and_every_record_says_why(plain: Path) -> None:
    plan, result = TrainPlan.load(plain), RunResult.load(plain)
    assert plan.choices.backend == "transformers"
    assert "Unsloth was asked for, but it is not installed" in plan.reasons["backend"]
    assert [event.kind for event in result.events] == ["backend_fallback"]
    assert result.status == "finished"


def test_unsloth_is_imported_before_everything_that_it_changes(killed: Path, workplace: Path) -> None:
    assert REAL or imports(workplace)[0] == "imported after []"
    assert TrainPlan.load(killed).choices.backend == "unsloth"


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_losses_are_those_of_the_own_layers(plain: Path, killed: Path) -> None:
    done = python(str(TESTS / "drive_unsloth.py"), "resume", str(killed), folder=plain.parents[1])
    assert done.returncode == 0, done.stderr
    assert "Unsloth has changed transformers in this process" in json.loads(done.stdout)["refused"]
    assert REAL or imports(plain.parents[1])[-1] == "imported after []"
    result = RunResult.load(killed)
    assert result.status == "finished" and "resume" in [event.kind for event in result.events]
    assert losses(killed) == pytest.approx(losses(plain), rel=1e-5)
    own, other = (load_file(run / "final" / "adapter_model.safetensors") for run in (plain, killed))
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert (tensor - other[name]).abs().max() < 1e-4, name
    settings = json.loads((killed / "final" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["auto_mapping"] is None
    assert laras.test(killed).tuned.loss == pytest.approx(laras.test(plain).tuned.loss, rel=1e-4)


def test_a_resume_does_not_change_the_backend(killed: Path) -> None:
    with pytest.raises(RunStateError, match="was started with Unsloth, and it is not installed") as caught:
        laras.resume(killed)
    assert "--from" in str(caught.value.hint)
    record = killed / "records" / "plan.json"
    before = record.read_text(encoding="utf-8")
    changed: dict[str, Any] = json.loads(before)
    changed["choices"] |= {"backend": "transformers", "attention": "sdpa"}
    record.write_text(json.dumps(changed), encoding="utf-8")
    try:
        with pytest.raises(RunStateError) as caught:
            laras.resume(killed, checkpoint=2)
    finally:
        record.write_text(before, encoding="utf-8")
    assert any("backend: was unsloth, is absent" in problem for problem in caught.value.problems)


@pytest.mark.slow
@pytest.mark.skipif(REAL is not None, reason="Unsloth itself imports")
def test_an_import_that_fails_is_tried_elsewhere_and_the_own_layers_train_all_the_same(workplace: Path) -> None:
    done = python(str(TESTS / "drive_unsloth.py"), "broken", "laras.yaml", folder=workplace, STAND_IN_BROKEN="1")
    assert done.returncode == 0, done.stderr
    plan, result = TrainPlan.load(workplace / "runs" / "broken"), RunResult.load(workplace / "runs" / "broken")
    assert (plan.choices.backend, result.status) == ("transformers", "finished")
    assert "its import fails: ImportError: a stand-in that does not import" in plan.reasons["backend"]
    assert [(event.kind, event.detail) for event in result.events] == [("backend_fallback", plan.reasons["backend"])]


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="needs Unsloth itself: UNSLOTH_SITE=FOLDER")
def test_the_trainer_stays_the_same_to_the_byte_when_unsloth_has_replaced_every_trainer(
    plain: Path, workplace: Path
) -> None:
    done = python(str(TESTS / "drive_unsloth.py"), "rebound", "laras.yaml", folder=workplace)
    assert done.returncode == 0, done.stderr
    own, other = ((run / "final" / "adapter_model.safetensors") for run in (plain, workplace / "runs" / "rebound"))
    assert own.read_bytes() == other.read_bytes()
