"""Which number format the arithmetic of training uses, and why."""

from __future__ import annotations

from typing import Literal

from laras.errors import ConfigError
from laras.records import Precision

# bfloat16 has matrix units from Ampere on; float16 from Volta on.
# Source: CUDA C++ Programming Guide, "Arithmetic Instructions" and feature tables by compute capability.
BF16_CAPABILITY = (8, 0)
FP16_CAPABILITY = (7, 0)


def choose_precision(
    requested: Literal["auto"] | Precision,
    kind: Literal["cuda", "cpu"],
    compute_capability: tuple[int, int] | None,
) -> tuple[Precision, str]:
    """The best format that the device computes natively, bf16 before fp16 before fp32, or the requested one.

    Args:
        requested: `auto`, or a format to respect.
        kind: Of device.
        compute_capability: Of the GPU; None on CPU.

    Returns:
        The format and the reason in one line.

    Raises:
        ConfigError: The requested format does not train on this device.
    """
    if kind == "cpu" or compute_capability is None:
        if requested == "fp16":
            raise ConfigError("precision fp16 does not train on a CPU", hint="set `precision: auto`")
        if requested != "auto":
            return requested, "set in the configuration"
        return "fp32", "a CPU trains in fp32"
    name = _dotted(compute_capability)
    if requested == "bf16" and compute_capability < BF16_CAPABILITY:
        raise ConfigError(
            f"precision bf16 needs compute capability {_dotted(BF16_CAPABILITY)}; this GPU has {name}",
            hint="set `precision: auto`, which takes fp16 or fp32 here",
        )
    if requested != "auto":
        return requested, "set in the configuration"
    if compute_capability >= BF16_CAPABILITY:
        return "bf16", f"compute capability {name} computes bf16 natively"
    if compute_capability >= FP16_CAPABILITY:
        return "fp16", f"compute capability {name} has fast fp16 and no native bf16; the loss is scaled"
    return "fp32", f"compute capability {name} has neither native bf16 nor fast fp16"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
