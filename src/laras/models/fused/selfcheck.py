"""A look before a run whether the kernels compute on this device what their references compute.

A kernel that does not compile for a GPU, or computes something else there, costs the fused layers and not the run.
Shapes: T tokens, D hidden, H heads, C channels of a head, G key-value heads, R channels rotated, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laras.models.fused import kernels
from laras.models.fused.attention import document_bounds

_TOKENS = 3
_DOCUMENTS = (0, 150, 153, 200)  # longer than a block of attention, and shorter
_TOLERANCE = 2e-2  # of the largest value: results are rounded to half precision up to twice


@dataclass(frozen=True)
class KernelSizes:
    """Which kernels run, and at which sizes.

    Attributes:
        hidden: D.
        width: F.
        heads: H.
        channels: C.
        key_value_heads: G, None where attention is not by a kernel of our own.
        with_ranks: The gated product's kernels form adapters' products too.
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
    key_value_heads: int | None
    with_ranks: bool
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
        found = [one.to(device, copy=True) for one in tensors]
        try:
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
    if sizes.with_ranks:
        a, sb = (torch.randn(shape, generator=generator) / width**0.5 for shape in ((16, width), (2 * width, 32)))
        a, sb = a.to(sizes.dtype), sb.to(sizes.dtype)
        calls[f"{kind} with ranks"] = (
            [rows(width), rows(width), a, rows(width), rows(16)],
            lambda m, *tensors: m.swiglu_ranks_(*tensors, kind),
        )
        calls[f"{kind} with ranks backward"] = (
            [rows(width), rows(width), rows(width), a, sb, rows(32), rows(16)],
            lambda m, *tensors: m.swiglu_backward_ranks_(*tensors, kind),
        )
    if sizes.key_value_heads is not None:
        calls |= _attention_calls(sizes, sizes.key_value_heads, generator)
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


def _attention_calls(
    sizes: KernelSizes, key_value_heads: int, generator: torch.Generator
) -> dict[str, tuple[list[Tensor], Callable[..., None]]]:
    bounds = document_bounds(torch.tensor(_DOCUMENTS, dtype=torch.int32), _DOCUMENTS[-1])
    scale = sizes.channels**-0.5

    def heads(count: int) -> Tensor:
        return torch.randn(_DOCUMENTS[-1], count, sizes.channels, generator=generator).to(sizes.dtype)

    q, gradient, k, v = (heads(count) for count in (*[sizes.heads] * 2, *[key_value_heads] * 2))
    out, lse = torch.empty_like(q), torch.empty(sizes.heads, _DOCUMENTS[-1])
    kernels.document_attention_(q, k, v, bounds[0], scale, out, lse)
    targets = [torch.zeros_like(one) for one in (lse, q, k, v)]
    return {
        "attention": (
            [q, k, v, bounds[0], torch.zeros_like(out), torch.zeros_like(lse)],
            lambda m, q, k, v, starts, out, lse: m.document_attention_(q, k, v, starts, scale, out, lse),
        ),
        "attention backward": (
            [gradient, q, k, v, *bounds, out, lse, *targets],
            lambda m, g, q, k, v, starts, ends, *rest: m.document_attention_backward_(
                g, q, k, v, starts, ends, scale, *rest
            ),
        ),
    }
