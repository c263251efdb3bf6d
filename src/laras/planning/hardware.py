"""The device to plan for: a card of the catalogue, the local GPU, or the CPU."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from laras.planning.catalogue import NATIVE_BF16_SINCE, Gpu, find_gpu, host_link_bytes_per_s, match_device_name
from laras.planning.host_speed import host_times_as_slow
from laras.records import HardwareSpec

# Rates of a CPU differ by an order of magnitude; this is what two AVX-512 cores reached each in the built-in example
# (`make demo`: 60 steps of 4 rows, 2.8 s a step).
_CPU_FLOPS_PER_CORE = 4e10
_CPU_BANDWIDTH_BYTES_PER_S = 20e9
# For a local GPU that the catalogue lacks: fp32 rate of one multiprocessor, 128 lanes x 2 operations x 1.5 GHz.
_UNKNOWN_SM_FLOPS = 3.8e11
_UNKNOWN_BANDWIDTH_BYTES_PER_S = 300e9
_UNKNOWN_LINK_BYTES_PER_S = 12e9  # PCI Express of the third generation, 16 lanes


def load_hardware(gpu: str | None = None) -> HardwareSpec:
    """The device to plan for.

    Args:
        gpu: A name of the catalogue; None for the local GPU, or the CPU where there is none.

    Raises:
        ConfigError: When the catalogue has no such GPU.
    """
    if gpu is not None:
        return find_gpu(gpu).to_hardware()
    return _local_gpu() or cpu_hardware()


def cpu_hardware() -> HardwareSpec:
    """The CPU: its memory now used by others (programs and this one) is subtracted; rates are rough."""
    import psutil

    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    rate = cores * _CPU_FLOPS_PER_CORE
    return HardwareSpec(
        kind="cpu",
        gpu_name="CPU",
        count=1,
        total_bytes=int(memory.total),
        other_processes_bytes=int(memory.total - memory.available),
        compute_capability=None,
        native_bf16=False,
        bandwidth_bytes_per_s=_CPU_BANDWIDTH_BYTES_PER_S,
        peak_flops={"bf16": rate, "fp16": rate, "fp32": rate},
        source="local",
    )


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None where NVML cannot say."""
    nvml: Any = import_module("pynvml")
    with suppress(nvml.NVMLError):
        nvml.nvmlInit()
        try:
            return str(nvml.nvmlSystemGetDriverVersion())
        finally:
            nvml.nvmlShutdown()
    return None


def local_capability() -> tuple[int, int] | None:
    """Highest compute capability of the cards of this machine by NVML, without torch; None where there is none."""
    with suppress(Exception):  # no NVML, no driver, no card
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            major, minor = max(tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)) for handle in handles)
            return int(major), int(minor)
        finally:
            nvml.nvmlShutdown()
    return None


def _local_gpu() -> HardwareSpec | None:
    """The first visible CUDA device as torch sees it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = (int(properties.major), int(properties.minor))
    native_bf16 = capability >= NATIVE_BF16_SINCE
    known = match_device_name(properties.name)
    if known is not None:
        figures = known.to_hardware()
        rates, bandwidth = figures.peak_flops, figures.bandwidth_bytes_per_s
    else:
        single = properties.multi_processor_count * _UNKNOWN_SM_FLOPS
        half = 2 * single if capability >= (7, 0) else single
        rates = {"bf16": half if native_bf16 else single, "fp16": half, "fp32": single}
        bandwidth = _UNKNOWN_BANDWIDTH_BYTES_PER_S
    return HardwareSpec(
        kind="cuda",
        gpu_name=properties.name,
        count=torch.cuda.device_count(),
        total_bytes=int(properties.total_memory),
        other_processes_bytes=_other_processes_bytes(str(properties.uuid)),
        compute_capability=capability,
        native_bf16=native_bf16,
        bandwidth_bytes_per_s=bandwidth,
        peak_flops=rates,
        source="local",
        host_link_bytes_per_s=_host_link_bytes_per_s(str(properties.uuid), known),
        host_available_bytes=_host_available_bytes(),
        host_times_as_slow=host_times_as_slow(),
    )


def _host_link_bytes_per_s(uuid: str, known: Gpu | None) -> float:
    """Of copies to main memory: what the card and the slot that it is in can do, by NVML, at most what the card can.

    Its best generation is asked for: a card that has nothing to do goes down to a lower one.
    """
    limit = _UNKNOWN_LINK_BYTES_PER_S if known is None else host_link_bytes_per_s(known.pcie_generation, known.lanes)
    nvml: Any = import_module("pynvml")
    with suppress(nvml.NVMLError):
        nvml.nvmlInit()
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            generation, lanes = (
                nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
                nvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
            )
            if generation and lanes:
                return min(limit, host_link_bytes_per_s(generation, lanes))
        finally:
            nvml.nvmlShutdown()
    return min(limit, _UNKNOWN_LINK_BYTES_PER_S)


def _host_available_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Main memory for each process of this machine: what is free, or what a container still allows.

    Args:
        folder: Where the kernel tells the limits of a container.
    """
    import psutil

    available = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(kept["inactive_file"]))
    return max(0, available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _other_processes_bytes(uuid: str) -> int:
    """Bytes that other processes hold on the card, by NVML; 0 where NVML cannot say.

    Asked by UUID, since CUDA_VISIBLE_DEVICES renumbers the devices for torch and not for NVML.
    """
    nvml: Any = import_module("pynvml")
    with suppress(nvml.NVMLError):
        nvml.nvmlInit()
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            # A desktop and its programs draw, and do not compute; some do both.
            running = [*nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
            running += nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
            held = {process.pid: int(process.usedGpuMemory or 0) for process in running}
            return sum(size for pid, size in held.items() if pid != os.getpid())
        finally:
            nvml.nvmlShutdown()
    return 0
