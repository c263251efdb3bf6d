"""Every card of the catalogue can be found, and the local device is what it is."""

import os

import psutil
import pytest

from laras.errors import ConfigError
from laras.planning import hardware
from laras.planning.catalogue import CATALOGUE, find_gpu, match_device_name
from laras.planning.hardware import _host_available_bytes, cpu_hardware, load_hardware


def test_the_catalogue_holds_at_least_25_distinct_cards():
    assert len({gpu.name for gpu in CATALOGUE}) == len(CATALOGUE) >= 25


@pytest.mark.parametrize("gpu", CATALOGUE, ids=lambda gpu: gpu.name)
def test_every_card_is_complete_and_found_by_its_name(gpu):
    assert find_gpu(gpu.name) is gpu
    spec = load_hardware(f"NVIDIA {gpu.name.lower().replace(' ', '-')}")
    assert spec.gpu_name == gpu.name
    assert spec.source.startswith("NVIDIA ")
    assert 0.9 * gpu.memory_gib < spec.total_bytes / 2**30 < gpu.memory_gib
    assert spec.peak_flops["fp16"] >= 1.9 * spec.peak_flops["fp32"]
    assert spec.native_bf16 == (spec.peak_flops["bf16"] == spec.peak_flops["fp16"])


def test_native_bf16_begins_with_compute_capability_8():
    assert [find_gpu(name).native_bf16 for name in ("p100", "v100", "t4", "a100", "l4")] == [False] * 3 + [True] * 2


def test_a_name_without_memory_means_the_smaller_card():
    assert find_gpu("a100").name == "A100 40GB"
    assert find_gpu("NVIDIA V100").name == "V100 16GB"


def test_an_unknown_card_names_those_like_it():
    with pytest.raises(ConfigError, match=r"did you mean.*RTX 4090") as caught:
        find_gpu("rtx 4099")
    assert "H200" in str(caught.value)
    with pytest.raises(ConfigError, match="no GPU"):
        find_gpu("")


def test_a_driver_name_finds_its_card():
    for name, card in {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA GeForce RTX 3090 Ti": "RTX 3090 Ti",
        "Tesla T4": "T4",
        "NVIDIA A100-SXM4-80GB": "A100 80GB",
        "NVIDIA RTX A4000": "RTX A4000",
    }.items():
        assert match_device_name(name).name == card
    assert match_device_name("Radeon") is None


def test_the_cpu_leaves_out_memory_that_is_taken():
    spec = cpu_hardware()
    assert spec.total_bytes == psutil.virtual_memory().total
    assert 0 < spec.other_processes_bytes < spec.total_bytes
    assert spec.compute_capability is None


def test_the_way_to_main_memory_is_that_of_the_generation_and_the_lanes():
    links = {name: find_gpu(name).to_hardware().host_link_bytes_per_s / 1e9 for name in ("t4", "l4", "h100")}
    assert links == pytest.approx({"t4": 12.6, "l4": 25.2, "h100": 50.4}, rel=0.01)
    narrow = find_gpu("rtx 4060").to_hardware().host_link_bytes_per_s
    assert narrow == pytest.approx(find_gpu("t4").to_hardware().host_link_bytes_per_s, rel=0.01)
    assert find_gpu("h100").to_hardware().host_available_bytes is None


def test_main_memory_is_what_a_container_leaves_to_each_process(tmp_path, monkeypatch):
    free = psutil.virtual_memory().available
    assert _host_available_bytes(tmp_path) == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 500000\n")
    assert _host_available_bytes(tmp_path) == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("4000000\n")
    assert _host_available_bytes(tmp_path) == 1_500_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _host_available_bytes(tmp_path) == 750_000
    (tmp_path / "memory.max").write_text("1000000\n")
    assert _host_available_bytes(tmp_path) == 0


def test_the_local_device_is_used_when_none_is_named():
    import torch

    spec = load_hardware()
    assert spec.kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert spec.source == "local"


@pytest.mark.parametrize("gpu", CATALOGUE, ids=lambda gpu: gpu.name)
def test_the_figures_of_a_card_are_plausible_and_say_where_they_are_from(gpu):
    assert any(kind in gpu.source for kind in ("datasheet", "whitepaper"))
    assert 20 < gpu.half_tflops * 1e3 / gpu.bandwidth_gb_per_s < 450  # operations a byte
    tensor_cores = gpu.compute_capability >= (7, 0)
    consumer = gpu.name.startswith("RTX ") and not gpu.name.startswith(("RTX A", "RTX 6000", "RTX PRO"))
    ratio = gpu.half_tflops / gpu.fp32_tflops
    if not tensor_cores:
        assert ratio == pytest.approx(2, rel=0.02)
    elif consumer and gpu.compute_capability >= (8, 0):
        assert ratio == pytest.approx(2, rel=0.02)  # half the rate when sums are fp32
    else:
        assert 3.5 < ratio < 31
    names = {
        "H": (9, 0),
        "B2": (10, 0),
        "RTX 50": (12, 0),
        "RTX 40": (8, 9),
        "RTX 30": (8, 6),
        "A100": (8, 0),
        "L4": (8, 9),
    }
    for name, capability in names.items():
        if gpu.name.startswith(name):
            assert gpu.compute_capability == capability


def test_what_a_desktop_holds_is_not_free(monkeypatch):
    """NVML does not run here; it lists programs that draw apart from those that compute."""
    from types import SimpleNamespace as Of

    here, nvml = os.getpid(), Of(NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlShutdown=lambda: None)
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda _: [
        Of(pid=here, usedGpuMemory=500),
        Of(pid=-1, usedGpuMemory=70),
        Of(pid=-2, usedGpuMemory=None),  # where the driver does not say
    ]
    nvml.nvmlDeviceGetGraphicsRunningProcesses = lambda _: [
        Of(pid=-1, usedGpuMemory=70),
        Of(pid=-3, usedGpuMemory=300),
    ]
    monkeypatch.setattr(hardware, "import_module", {"pynvml": nvml}.get)
    assert hardware._other_processes_bytes("a") == 370
