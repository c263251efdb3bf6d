"""`torchrun -m laras train`: two processes, one run, one answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import write_workplace

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_train_one_run_and_the_first_one_scores_and_answers(tmp_path: Path) -> None:
    write_workplace(tmp_path, "num_train_epochs: 1\nlearning_rate: 0.01\nrun_name: two\n")
    done = subprocess.run(
        [sys.executable, *LAUNCH, "-m", "laras", "train", "laras.yaml", "--test", "--json"], cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)  # one object, of the first process
    assert (answer["status"], answer["test"]["openings"]) == ("finished", 1)
    assert answer["test"]["tuned"]["loss"] < answer["test"]["base"]["loss"]
    assert answer["plan"]["choices"]["gradient_accumulation_steps"] % 2 == 0
    newest = max((tmp_path / "runs" / "two" / "checkpoints").glob("step-*"), key=lambda path: path.stat().st_mtime)
    assert len(json.loads((newest / "training.json").read_text(encoding="utf-8"))["random"]) == 2
