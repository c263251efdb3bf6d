"""Memory that training really takes, as `memory/*` metrics; the monitor never stops a run."""

from __future__ import annotations

import psutil
import pynvml
import torch

from laras.progress import Observer

WARN_ABOVE = {"cuda": 0.985, "cpu": 0.95}  # of the card's memory, of which a plan may use 0.98, or of the machine's
_WARN_AGAIN_BELOW = 0.90


class MemoryMonitor:
    """Measures this process' device: NVML and torch's allocator on GPU, resident memory on CPU.

    Args:
        device: Where this process trains.
        planned_bytes: Predicted peak, for comparison.
        observer: Warned, once a crossing, when memory gets scarce, and when measuring fails.
    """

    def __init__(self, device: torch.device, planned_bytes: int, observer: Observer) -> None:
        self.planned_bytes = planned_bytes
        self._device, self._observer = device, observer
        self._process = psutil.Process()
        self._warned = self._failed = False

    def current_bytes(self) -> int:
        """Allocated at the peak since the last reset, or resident on CPU; 0 when it cannot be measured."""
        try:
            if self._device.type == "cuda":
                return torch.cuda.max_memory_allocated(self._device)
            return int(self._process.memory_info().rss)
        except (RuntimeError, OSError, psutil.Error) as error:
            self._announce(error)
            return 0

    def metrics(self) -> dict[str, float]:
        """`memory/*` metrics in bytes and fractions; empty when they cannot be measured."""
        try:
            found = self._gpu() if self._device.type == "cuda" else self._machine()
        except (RuntimeError, OSError, ValueError, psutil.Error, pynvml.NVMLError) as error:
            self._announce(error)
            return {}
        self._warn_when_scarce(found["memory/used_fraction"])
        return found

    def _gpu(self) -> dict[str, float]:
        stats = torch.cuda.memory_stats(self._device)
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}" if not uuid.startswith(("GPU-", "MIG-")) else uuid)
        whole = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            "memory/allocated_bytes": stats.get("allocated_bytes.all.current", 0),
            "memory/peak_allocated_bytes": stats.get("allocated_bytes.all.peak", 0),
            "memory/reserved_bytes": stats.get("reserved_bytes.all.current", 0),
            "memory/peak_reserved_bytes": stats.get("reserved_bytes.all.peak", 0),
            "memory/device_used_bytes": int(whole.used),
            "memory/used_fraction": int(whole.used) / int(whole.total),
            "memory/planned_peak_bytes": self.planned_bytes,
        }

    def _machine(self) -> dict[str, float]:
        return {
            "memory/rss_bytes": int(self._process.memory_info().rss),
            "memory/used_fraction": psutil.virtual_memory().percent / 100,
            "memory/planned_peak_bytes": self.planned_bytes,
        }

    def _warn_when_scarce(self, used_fraction: float) -> None:
        if used_fraction > WARN_ABOVE[self._device.type] and not self._warned:
            self._observer.warning(f"{used_fraction:.0%} of the memory is in use; training goes on")
            self._warned = True
        elif used_fraction < _WARN_AGAIN_BELOW:
            self._warned = False

    def _announce(self, error: Exception) -> None:
        if not self._failed:
            self._observer.warning(f"memory is not measured: {type(error).__name__}: {error}")
            self._failed = True
