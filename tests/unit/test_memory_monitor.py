"""The memory monitor measures, warns once, and never stops a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from laras.training.callbacks.memory import MemoryMonitor
from tiny_training import Recorder

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_resident_memory_is_measured_on_cpu() -> None:
    monitor = MemoryMonitor(CPU, 1000, Recorder())
    assert monitor.current_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    metrics = monitor.metrics()
    assert metrics["memory/rss_bytes"] > 10**7 and 0 < metrics["memory/used_fraction"] < 1
    assert metrics["memory/planned_peak_bytes"] == 1000


def test_scarce_memory_is_told_once_a_crossing(monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Recorder()
    monitor = MemoryMonitor(CPU, 0, observer)
    for percent in (50, 96, 97, 92, 99, 80, 96):
        monkeypatch.setattr(psutil, "virtual_memory", lambda p=percent: SimpleNamespace(percent=p))
        monitor.metrics()
    assert observer.warnings == ["96% of the memory is in use; training goes on"] * 2


def test_a_gpu_is_measured_by_driver_and_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.current": 1, "allocated_bytes.all.peak": 2, "reserved_bytes.all.current": 3,
             "reserved_bytes.all.peak": 4}  # fmt: skip
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    asked = []
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: asked.append(handle) or SimpleNamespace(used=30, total=40)
    )
    assert MemoryMonitor(GPU, 9, Recorder()).metrics() == {
        "memory/allocated_bytes": 1, "memory/peak_allocated_bytes": 2, "memory/reserved_bytes": 3,
        "memory/peak_reserved_bytes": 4, "memory/device_used_bytes": 30, "memory/used_fraction": 0.75,
        "memory/planned_peak_bytes": 9,
    }  # fmt: skip
    assert asked == ["GPU-abc"]


@pytest.mark.parametrize(
    "error", [pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN), RuntimeError("no driver"), OSError("no library")]
)
def test_what_cannot_be_measured_is_told_once_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "memory_stats", fail)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", fail)
    observer = Recorder()
    monitor = MemoryMonitor(GPU, 0, observer)
    assert [monitor.metrics(), monitor.metrics()] == [{}, {}]
    if not isinstance(error, pynvml.NVMLError):
        assert monitor.current_bytes() == 0
    assert len(observer.warnings) == 1 and "memory is not measured" in observer.warnings[0]
