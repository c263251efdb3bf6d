"""Two processes on two GPUs, through NCCL, train the run that one process trains on one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import several_processes
from laras.records import RunResult
from tiny_training import metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

LIMIT_S = 180


def start(folder: Path, processes: int, device: str = "cuda") -> list[subprocess.Popen[bytes]]:
    """What they write goes to files: a pipe that is full, and that nobody reads yet, would stop its process."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(Path(several_processes.__file__))
    launched = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, script, str(folder), device], stderr=(folder / f"stderr-{rank}.txt").open("wb"),
            env={**os.environ, **(launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
        )
        for rank in range(processes)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of run, with one process in `1` and with two in `2`, at the same time."""
    folder = tmp_path_factory.mktemp("gpus")
    running, ends_at = [*start(folder / "1", 1), *start(folder / "2", 2)], time.monotonic() + LIMIT_S
    try:
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, ends_at - time.monotonic()))
            assert process.returncode == 0, told(folder)
    finally:
        for process in running:
            process.kill()
    return folder


def told(folder: Path) -> str:
    """The end of what every process wrote."""
    return "\n".join(
        f"{path}: {path.read_text(errors='replace')[-2000:]}" for path in sorted(folder.glob("*/stderr-*"))
    )


@pytest.mark.parametrize("kind", several_processes.KINDS)
def test_two_gpus_give_the_losses_of_one(trained: Path, kind: str) -> None:
    def lines(count: str) -> list[dict[str, Any]]:
        """Less the lines that say how much memory a rehearsal took."""
        return [line for line in metrics(trained / count / kind) if line.keys() - {"step", "epoch"}]

    one, two = lines("1"), lines("2")
    assert [line.keys() for line in one] == [line.keys() for line in two] and len(one) > several_processes.STEPS
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3 if kind == "padded" else 2e-2)
    assert RunResult.load(trained / "2" / kind).status == "finished"


@pytest.mark.parametrize("kind", several_processes.KINDS)
def test_a_resume_on_two_gpus_ends_with_the_same_bytes(trained: Path, kind: str) -> None:
    assert (trained / "2" / f"{kind}.resumed").read_text() == "the same"
