"""Two processes on two GPUs, through NCCL, train the run that one process trains on one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import several_processes
from laras.records import RunResult
from tiny_training import metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

LIMIT_S = 200


def start(folder: Path, processes: int, device: str = "cuda") -> list[subprocess.Popen[str]]:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(Path(several_processes.__file__))
    launched = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, script, str(folder), device], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
        )
        for rank in range(processes)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of run, with one process in `1` and with two in `2`, at the same time."""
    folder = tmp_path_factory.mktemp("gpus")
    running = [*start(folder / "1", 1), *start(folder / "2", 2)]
    try:
        for process in running:
            _, errors = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    return folder


@pytest.mark.parametrize("kind", several_processes.KINDS)
def test_two_gpus_give_the_losses_of_one(trained: Path, kind: str) -> None:
    def told(count: str) -> list[dict[str, Any]]:
        """Less the lines that say how much memory a rehearsal took."""
        return [line for line in metrics(trained / count / kind) if line.keys() - {"step", "epoch"}]

    one, two = told("1"), told("2")
    assert [line.keys() for line in one] == [line.keys() for line in two] and len(one) > several_processes.STEPS
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3 if kind == "padded" else 2e-2)
    assert RunResult.load(trained / "2" / kind).status == "finished"


@pytest.mark.parametrize("kind", several_processes.KINDS)
def test_a_resume_on_two_gpus_ends_with_the_same_bytes(trained: Path, kind: str) -> None:
    assert (trained / "2" / f"{kind}.resumed").read_text() == "the same"
