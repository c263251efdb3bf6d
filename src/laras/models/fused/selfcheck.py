"""A look before a run whether the kernels compute on this device what their references compute.

A kernel that does not compile for a GPU, or computes something else there, costs the fused layers and not the run.
Shapes: T tokens, D hidden, H heads, C channels of a head, R of them rotated, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laras.models.fused import kernels

_TOKENS = 3
_TOLERANCE = 2e-2  # of the largest value: results are rounded to half precision up to twice


@dataclass(frozen=True)
class KernelSizes:
    """Which kernels run, and at which sizes.

    Attributes:
        hidden: D.
        width: F.
        heads: H.
        channels: C.
        rotated: R.
        activation: Of the gate.
        head_norm: Query and key are normed by head.
        dtype: Of the arithmetic.
        norm_dtype: Of what a norm multiplies by.
    """

    hidden: int
    width: int
    heads: int
    channels: int
    rotated: int
    activation: str
    head_norm: bool
    dtype: torch.dtype
    norm_dtype: torch.dtype


def disagreement(sizes: KernelSizes, device: torch.device, tested: Any = kernels) -> str | None:
    """The first kernel that is not what its reference is, in one line; None when there is none.

    Args:
        sizes: What the layers will call.
        device: Where `tested` runs; the references run on the CPU.
        tested: Has the functions of `laras.models.fused.kernels`.
    """
    for name, (tensors, call) in _calls(sizes).items():
        try:
            for _ in range(2):  # Triton's own launch, and a direct one
                found = [one.to(device, copy=True) for one in tensors]
                call(tested, *found)
        except Exception as error:  # noqa: BLE001 - a compiler can fail in any way
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            return f"the kernel of {name} does not run here: {first:.200}"
        call(kernels, *tensors)
        for reference, other in zip(tensors, found, strict=True):
            error_size = (other.cpu().float() - reference.float()).abs().max()
            if not bool(error_size <= _TOLERANCE * reference.abs().max().float()):  # false for NaN
                return f"the kernel of {name} does not give its reference's result here"
    return None


def _calls(sizes: KernelSizes) -> dict[str, tuple[list[Tensor], Callable[..., None]]]:
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(_TOKENS, *shape, generator=generator).to(sizes.dtype)

    def weight(columns: int) -> Tensor:
        return torch.randn(columns, generator=generator).to(sizes.norm_dtype)

    hidden, width, kind, eps, rotated = sizes.hidden, sizes.width, sizes.activation, 1e-6, sizes.rotated
    heads = (sizes.heads, sizes.channels)
    angles = torch.rand(_TOKENS, rotated // 2, generator=generator).repeat(1, 2)
    calls: dict[str, tuple[list[Tensor], Callable[..., None]]] = {
        "norm": (
            [rows(hidden), weight(hidden), rows(hidden)],
            lambda m, x, w, out: m.rms_norm_(x, w, eps, out),
        ),
        "norm backward": (
            [rows(hidden), weight(hidden), rows(hidden), rows(hidden)],
            lambda m, x, w, g, total: m.rms_norm_backward_(x, w, eps, g, total, g),
        ),
        "rotation": (
            [rows(*heads), angles.cos().to(sizes.dtype), angles.sin().to(sizes.dtype)],
            lambda m, x, cos, sin: m.rope_(x[..., :rotated], cos, sin, x[..., :rotated], -1.0),
        ),
        kind: (
            [rows(width), rows(width), rows(width)],
            lambda m, gate, up, out: m.swiglu_(gate, up, out, kind),
        ),
        f"{kind} backward": (
            [rows(width), rows(width), rows(width)],
            lambda m, gate, up, gradient: m.swiglu_backward_(gate, up, gradient, kind),
        ),
    }
    if sizes.head_norm:
        calls["head norm"] = (
            [rows(*heads), weight(sizes.channels), rows(*heads)],
            lambda m, x, w, out: m.head_norm_(x, w, eps, out),
        )
        calls["head norm backward"] = (
            [rows(*heads), weight(sizes.channels), rows(*heads)],
            lambda m, x, w, gradient: m.head_norm_backward_(x, w, eps, gradient, gradient),
        )
    return calls
