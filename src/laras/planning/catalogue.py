"""GPUs that a plan can be made for without owning one.

Figures are those of the vendor's documents: nominal memory, memory bandwidth, dense peak rates (no sparsity; tensor
cores with fp32 accumulation for half precision, plain fp32 otherwise), and lanes of PCI Express.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from laras.errors import ConfigError
from laras.records import HardwareSpec

_GIB = 2**30
# What a program sees of the nominal memory: the driver keeps a part, and ECC on GDDR memory another sixteenth.
_VISIBLE, _VISIBLE_WITH_ECC = 0.98, 0.915
NATIVE_BF16_SINCE = (8, 0)
# A lane of PCI Express, 1e9 bytes a second one way, by generation; large copies from pinned memory are taken to reach
# this share of it, which was not measured. Source: the rates of the standard, 8, 16 and 32 GT/s in 128 of 130 bits.
_LANE_GB_PER_S, _LINK_SHARE = {3: 0.985, 4: 1.969, 5: 3.938}, 0.8


@dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        name: As users write it.
        memory_gib: Nominal memory.
        bandwidth_gb_per_s: Memory bandwidth, 1e9 bytes a second.
        half_tflops: Dense fp16 rate with fp32 accumulation; also that of bf16 from compute capability 8.0.
        fp32_tflops: Rate of plain fp32.
        compute_capability: Major, minor.
        source: The document that the figures come from.
        ecc_in_memory: Error correction takes a part of the memory.
        lanes: Of PCI Express.
    """

    name: str
    memory_gib: float
    bandwidth_gb_per_s: float
    half_tflops: float
    fp32_tflops: float
    compute_capability: tuple[int, int]
    source: str
    ecc_in_memory: bool = False
    lanes: int = 16

    @property
    def total_bytes(self) -> int:
        """Bytes that a program sees, on the careful side."""
        return int(self.memory_gib * _GIB * (_VISIBLE_WITH_ECC if self.ecc_in_memory else _VISIBLE))

    @property
    def native_bf16(self) -> bool:
        """Whether the card multiplies bf16 at the rate of fp16."""
        return self.compute_capability >= NATIVE_BF16_SINCE

    @property
    def pcie_generation(self) -> int:
        """Third up to Turing, fourth with Ampere and Ada, fifth from Hopper on, as the documents of these say."""
        return 3 if self.compute_capability < (8, 0) else 4 if self.compute_capability < (9, 0) else 5

    def to_hardware(self) -> HardwareSpec:
        """The card as a device to plan for, with nothing else running on it."""
        half, single = self.half_tflops * 1e12, self.fp32_tflops * 1e12
        return HardwareSpec(
            kind="cuda",
            gpu_name=self.name,
            count=1,
            total_bytes=self.total_bytes,
            other_processes_bytes=0,
            compute_capability=self.compute_capability,
            native_bf16=self.native_bf16,
            bandwidth_bytes_per_s=self.bandwidth_gb_per_s * 1e9,
            peak_flops={"bf16": half if self.native_bf16 else single, "fp16": half, "fp32": single},
            source=self.source,
            host_link_bytes_per_s=host_link_bytes_per_s(self.pcie_generation, self.lanes),
        )


CATALOGUE: tuple[Gpu, ...] = (
    Gpu("P100 16GB", 16, 732, 18.7, 9.3, (6, 0), "NVIDIA Tesla P100 datasheet"),
    Gpu("V100 16GB", 16, 900, 112, 14, (7, 0), "NVIDIA V100 datasheet"),
    Gpu("V100 32GB", 32, 900, 112, 14, (7, 0), "NVIDIA V100 datasheet"),
    Gpu("T4", 16, 320, 65, 8.1, (7, 5), "NVIDIA T4 datasheet", ecc_in_memory=True),
    Gpu("RTX 2080 Ti", 11, 616, 53.8, 13.4, (7, 5), "NVIDIA Turing architecture whitepaper"),
    Gpu("A100 40GB", 40, 1555, 312, 19.5, (8, 0), "NVIDIA A100 datasheet"),
    Gpu("A100 80GB", 80, 2039, 312, 19.5, (8, 0), "NVIDIA A100 datasheet"),
    Gpu("A30", 24, 933, 165, 10.3, (8, 0), "NVIDIA A30 datasheet"),
    Gpu("A10", 24, 600, 125, 31.2, (8, 6), "NVIDIA A10 datasheet", ecc_in_memory=True),
    Gpu("A40", 48, 696, 149.7, 37.4, (8, 6), "NVIDIA A40 datasheet", ecc_in_memory=True),
    Gpu("RTX A4000", 16, 448, 76.7, 19.2, (8, 6), "NVIDIA RTX A4000 datasheet"),
    Gpu("RTX A5000", 24, 768, 111.1, 27.8, (8, 6), "NVIDIA RTX A5000 datasheet"),
    Gpu("RTX A6000", 48, 768, 154.8, 38.7, (8, 6), "NVIDIA RTX A6000 datasheet"),
    Gpu("RTX 3060", 12, 360, 25.5, 12.7, (8, 6), "NVIDIA GA102 architecture whitepaper and page"),
    Gpu("RTX 3060 Ti", 8, 448, 32.4, 16.2, (8, 6), "NVIDIA GA102 architecture whitepaper and page"),
    Gpu("RTX 3070", 8, 448, 40.6, 20.3, (8, 6), "NVIDIA GA102 architecture whitepaper"),
    Gpu("RTX 3080", 10, 760, 59.5, 29.8, (8, 6), "NVIDIA GA102 architecture whitepaper"),
    Gpu("RTX 3090", 24, 936, 71, 35.6, (8, 6), "NVIDIA GA102 architecture whitepaper"),
    Gpu("RTX 3090 Ti", 24, 1008, 80, 40, (8, 6), "NVIDIA GA102 architecture whitepaper"),
    Gpu("L4", 24, 300, 121, 30.3, (8, 9), "NVIDIA L4 datasheet", ecc_in_memory=True),
    Gpu("L40S", 48, 864, 362, 91.6, (8, 9), "NVIDIA L40S datasheet", ecc_in_memory=True),
    Gpu("RTX 6000 Ada", 48, 960, 364.2, 91.1, (8, 9), "NVIDIA RTX 6000 Ada datasheet"),
    Gpu("RTX 4060", 8, 272, 30.2, 15.1, (8, 9), "NVIDIA Ada architecture whitepaper and page", lanes=8),
    Gpu("RTX 4060 Ti 16GB", 16, 288, 44.1, 22.1, (8, 9), "NVIDIA Ada architecture whitepaper and page", lanes=8),
    Gpu("RTX 4070", 12, 504, 58.3, 29.1, (8, 9), "NVIDIA Ada architecture whitepaper"),
    Gpu("RTX 4070 Ti", 12, 504, 80.2, 40.1, (8, 9), "NVIDIA Ada architecture whitepaper"),
    Gpu("RTX 4080", 16, 717, 97.5, 48.7, (8, 9), "NVIDIA Ada architecture whitepaper"),
    Gpu("RTX 4090", 24, 1008, 165.2, 82.6, (8, 9), "NVIDIA Ada architecture whitepaper"),
    Gpu("H100", 80, 3350, 989, 67, (9, 0), "NVIDIA H100 SXM datasheet"),
    Gpu("H100 PCIe", 80, 2000, 756, 51, (9, 0), "NVIDIA H100 PCIe datasheet"),
    Gpu("H100 NVL", 94, 3900, 835, 60, (9, 0), "NVIDIA H100 NVL datasheet"),
    Gpu("H200", 141, 4800, 989, 67, (9, 0), "NVIDIA H200 datasheet"),
    Gpu("B200", 180, 8000, 2250, 75, (10, 0), "NVIDIA DGX B200 datasheet"),
    Gpu(
        "RTX 5060 Ti 16GB",
        16,
        448,
        47.4,
        23.7,
        (12, 0),
        "NVIDIA RTX Blackwell architecture whitepaper and product page",
        lanes=8,
    ),
    Gpu("RTX 5070", 12, 672, 61.7, 30.9, (12, 0), "NVIDIA RTX Blackwell architecture whitepaper"),
    Gpu("RTX 5070 Ti", 16, 896, 87.9, 43.9, (12, 0), "NVIDIA RTX Blackwell architecture whitepaper"),
    Gpu("RTX 5080", 16, 960, 112.6, 56.3, (12, 0), "NVIDIA RTX Blackwell architecture whitepaper"),
    Gpu("RTX 5090", 32, 1792, 209.5, 104.8, (12, 0), "NVIDIA RTX Blackwell architecture whitepaper"),
    Gpu("RTX PRO 6000 Blackwell", 96, 1792, 503.8, 125, (12, 0), "NVIDIA RTX PRO 6000 Blackwell datasheet"),
)


def host_link_bytes_per_s(generation: int, lanes: int) -> float:
    """Of large copies between main memory and a card, one way."""
    newest = max(one for one in _LANE_GB_PER_S if one <= max(generation, 3))
    return _LINK_SHARE * 1e9 * _LANE_GB_PER_S[newest] * lanes


def find_gpu(name: str) -> Gpu:
    """The card of that name; case, spaces, dashes and the words NVIDIA, GeForce, Tesla do not matter.

    A name that leaves the memory open (`a100`) means the smallest card that it fits.

    Raises:
        ConfigError: When no card has that name; names those most like it.
    """
    wanted = _normalized(name)
    by_key = {_normalized(gpu.name): gpu for gpu in CATALOGUE}
    if wanted in by_key:
        return by_key[wanted]
    open_memory = [gpu for gpu in CATALOGUE if _without_memory(gpu.name) == wanted]
    if wanted and open_memory:
        return min(open_memory, key=lambda gpu: gpu.memory_gib)
    close = [by_key[key].name for key in difflib.get_close_matches(wanted, by_key, n=3, cutoff=0.5)]
    raise ConfigError(
        f"no GPU {name!r} in the catalogue" + (f"; did you mean {', '.join(close)}?" if close else ""),
        hint="known: " + ", ".join(gpu.name for gpu in CATALOGUE),
    )


def match_device_name(device_name: str) -> Gpu | None:
    """The card that a driver's device name (`NVIDIA H100 80GB HBM3`) denotes; None when none does."""
    seen = _without_memory(device_name)
    stems = {_without_memory(gpu.name): gpu for gpu in CATALOGUE}
    found = [stem for stem in stems if re.search(rf"{stem}(?![0-9])", seen)]
    return stems[max(found, key=len)] if found else None


def _without_memory(name: str) -> str:
    """`A100 80GB` and `H100 80GB HBM3` without what says how much memory."""
    return _normalized(re.sub(r"[ -][0-9]+ ?GB\b.*", "", name, flags=re.IGNORECASE))


def _normalized(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|gib|[^a-z0-9]", lambda m: "gb" if m[0] == "gib" else "", name.lower())
