"""Several processes train the run that one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from laras.records import PlanRevision, RunResult
from tiny_training import Scenario, metrics, train

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import tiny_training as tiny
scenario = tiny.Scenario(2, 3, choices={"packing": True} if sys.argv[3] == "packed" else {})
tiny.train(Path(sys.argv[2]), scenario, resume=sys.argv[4] == "resume" and 3)
"""

# The second process runs out of memory once in a step and once in an evaluation, then on every single row.
TIGHT_WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import laras.training.validation as validation
import tiny_training as tiny
from laras.errors import OutOfMemoryError
from laras.models.step import eager_step

second, original = os.environ["RANK"] == "1", validation.evaluate_split
most_rows, events = 1, []

def make_step(model):
    inner = eager_step(model)
    def step(batch, scale):
        loss = inner(batch, scale)
        if second and len(batch["input_ids"]) > most_rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return loss
    return tiny.StepOf(step)

def evaluate(*given, **named):
    if second and named["batch_size"] > 2:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return original(*given, **named)

validation.evaluate_split = evaluate
result, _ = tiny.train(Path(sys.argv[2]), tiny.Scenario(2, 3), make_step=make_step)
assert sum(event.kind == "out_of_memory" for event in result.events) == 2, result.events
most_rows = 0
try:
    tiny.train(Path(sys.argv[2] + "-never"), tiny.Scenario(2, 3), make_step=make_step)
except OutOfMemoryError as error:  # in the first process, too, which would else wait for ever
    assert "does not fit" in error.message and "max_length" in error.hint
else:
    raise SystemExit("no error")
"""


def run_processes(run_dir: Path, kind: str, *, count: int, resume: bool = False, worker: str = WORKER) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    tests = str(Path(__file__).parents[1])
    arguments = [sys.executable, "-c", worker, tests, str(run_dir), kind, "resume" if resume else "start"]
    processes = [
        subprocess.Popen(
            arguments, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_two_processes_give_the_losses_of_one(tmp_path: Path, kind: str) -> None:
    train(tmp_path / "one", Scenario(2, 3, choices={"packing": True} if kind == "packed" else {}))
    run_processes(tmp_path / "two", kind, count=2)  # three micro-batches a step: one process has two, the other one
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert RunResult.load(tmp_path / "two").status == "finished"
    final = "final/adapter_model.safetensors"
    expected, found = load_file(tmp_path / "one" / final), load_file(tmp_path / "two" / final)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-2, abs=1e-4)
    newest = max((tmp_path / "two" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(json.loads((newest / "training.json").read_text())["random"]) == 2
    if kind == "padded":  # and a resume with two ends where two ended
        before = (tmp_path / "two" / final).read_bytes()
        run_processes(tmp_path / "two", kind, count=2, resume=True)
        assert (tmp_path / "two" / final).read_bytes() == before


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_changes_no_result_and_is_told_to_all(tmp_path: Path) -> None:
    train(tmp_path / "one", Scenario(2, 3))
    run_processes(tmp_path / "two", "padded", count=2, worker=TIGHT_WORKER)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # every row is scored once
    revision = PlanRevision.load(tmp_path / "two")
    assert (revision.train_split_level, revision.eval_split_level) == (1, 1)
    assert "another process" in revision.changes[0].reason
    never = RunResult.load(tmp_path / "two-never")
    assert never.status == "failed" and any("does not fit" in event.detail for event in never.events)
