"""Calls of the fused layers' kernels, for whoever compares two versions of them.

A case makes the tensors and a call `(module, *tensors)`; the tensors are what the call leaves in them. They are strided
as the fused layers hold them, and of widths that are no power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOKENS = 37
IGNORE_INDEX = -100
# Of the largest value: one rounding to bfloat16 is 2^-8, and a result may pass two; fp32 sums differ in their order.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
Case = tuple[list[Tensor | None], Callable[..., Any]]


def strided(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values in the first columns of a wider buffer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns + 16, generator=generator).to(dtype)[:, :columns]


def norm(dtype: torch.dtype, width: int, weight_dtype: torch.dtype | None = None) -> Case:
    x, out = strided(TOKENS, width, dtype, 0), strided(TOKENS, width, dtype, 2)
    weight = strided(1, width, weight_dtype or dtype, 1)[0]
    return [x, weight, out], lambda module, x, w, out: module.rms_norm_(x, w, 1e-6, out)


def norm_backward(dtype: torch.dtype, target: str) -> Case:
    """The norm's output goes nowhere, into a tensor of its own, or into the gradient's place."""
    x, gradient, total, out = (strided(TOKENS, 1536, dtype, seed) for seed in range(4))
    weight = strided(1, 1536, dtype, 4)[0]
    if target == "in place":
        return [x, weight, gradient, total], lambda m, x, w, g, t: m.rms_norm_backward_(x, w, 1e-6, g, t, g)
    own = out if target == "own" else None
    return [x, weight, gradient, total, own], lambda m, x, w, g, t, o: m.rms_norm_backward_(x, w, 1e-6, g, t, o)


def _heads(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(1, (heads, -1))


def rope(dtype: torch.dtype, heads: int, channels: int, rotated: int, sign: float, in_place: bool) -> Case:
    rows, out = (strided(TOKENS, heads * channels, dtype, seed) for seed in range(2))
    angles = torch.outer(torch.arange(TOKENS) % 20, 1e4 ** (-torch.arange(rotated // 2) * 2 / rotated)).repeat(1, 2)

    def call(module: Any, rows: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        source = _heads(rows, heads)
        target = source if in_place else _heads(out, heads)
        module.rope_(source[..., :rotated], cos, sin, target[..., :rotated], sign)

    return [rows, angles.cos().to(dtype), angles.sin().to(dtype), out], call


def head_norm(dtype: torch.dtype, heads: int, channels: int, in_place: bool) -> Case:
    rows, out = (strided(TOKENS, heads * channels, dtype, seed) for seed in range(2))

    def call(module: Any, rows: Tensor, weight: Tensor, out: Tensor) -> None:
        module.head_norm_(_heads(rows, heads), weight, 1e-6, _heads(rows if in_place else out, heads))

    return [rows, strided(1, channels, dtype, 2)[0], out], call


def head_norm_backward(dtype: torch.dtype, heads: int, channels: int, in_place: bool) -> Case:
    rows, gradient, out = (strided(TOKENS, heads * channels, dtype, seed) for seed in range(3))

    def call(module: Any, rows: Tensor, weight: Tensor, gradient: Tensor, out: Tensor) -> None:
        target = gradient if in_place else out
        parts = (_heads(one, heads) for one in (rows, gradient, target))
        x, g, to = parts
        module.head_norm_backward_(x, weight, 1e-6, g, to)

    return [rows, strided(1, channels, dtype, 3)[0], gradient, out], call


def swiglu(dtype: torch.dtype, width: int, activation: str, in_place: bool) -> Case:
    halves, out = strided(TOKENS, 2 * width, dtype, 0), strided(TOKENS, width, dtype, 2)

    def call(module: Any, halves: Tensor, out: Tensor) -> None:
        gate, up = halves[:, :width], halves[:, width:]
        module.swiglu_(gate, up, up if in_place else out, activation)

    return [halves, out], call


def swiglu_backward(dtype: torch.dtype, width: int, activation: str) -> Case:
    halves, gradient = strided(TOKENS, 2 * width, dtype, 0), strided(TOKENS, width, dtype, 1)
    return [halves, gradient], lambda m, x, g: m.swiglu_backward_(x[:, :width], x[:, width:], g, activation)


def cross_entropy(dtype: torch.dtype, vocabulary: int) -> Case:
    logits = 4 * strided(TOKENS, vocabulary, dtype, 0)
    targets = torch.randint(0, vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(1))
    targets[::5] = IGNORE_INDEX
    targets[1], targets[2] = 0, vocabulary - 1
    return [logits, targets, torch.full((TOKENS,), 9.0)], lambda m, *tensors: m.cross_entropy_(*tensors)


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "norm 512": lambda dtype: norm(dtype, 512),
    "norm 1536": lambda dtype: norm(dtype, 1536),
    "norm 3584": lambda dtype: norm(dtype, 3584),
    "norm, weight in fp32": lambda dtype: norm(dtype, 1536, torch.float32),
    "norm backward": lambda dtype: norm_backward(dtype, "nowhere"),
    "norm backward, output too": lambda dtype: norm_backward(dtype, "own"),
    "norm backward, output in the gradient's place": lambda dtype: norm_backward(dtype, "in place"),
    "rope": lambda dtype: rope(dtype, 12, 128, 128, 1.0, True),
    "rope, inverse": lambda dtype: rope(dtype, 12, 128, 128, -1.0, True),
    "rope, two heads, beside": lambda dtype: rope(dtype, 2, 128, 128, -1.0, False),
    "rope, 14 heads": lambda dtype: rope(dtype, 14, 64, 64, 1.0, True),
    "rope, 96 channels": lambda dtype: rope(dtype, 5, 96, 96, 1.0, True),
    "rope, a part of 128 channels": lambda dtype: rope(dtype, 3, 128, 96, -1.0, False),
    "head norm": lambda dtype: head_norm(dtype, 14, 128, False),
    "head norm, in place": lambda dtype: head_norm(dtype, 3, 80, True),
    "head norm backward": lambda dtype: head_norm_backward(dtype, 14, 128, False),
    "head norm backward, in place": lambda dtype: head_norm_backward(dtype, 3, 80, True),
    "swiglu": lambda dtype: swiglu(dtype, 8960, "silu", False),
    "swiglu, in up's place": lambda dtype: swiglu(dtype, 1408, "silu", True),
    "gelu": lambda dtype: swiglu(dtype, 1408, "gelu_tanh", False),
    "swiglu backward": lambda dtype: swiglu_backward(dtype, 8960, "silu"),
    "gelu backward": lambda dtype: swiglu_backward(dtype, 1408, "gelu_tanh"),
    "cross entropy 5003": lambda dtype: cross_entropy(dtype, 5003),
    "cross entropy 151936": lambda dtype: cross_entropy(dtype, 151936),
}


def tolerance(name: str, dtype: torch.dtype) -> float:
    """Of the largest value of a tensor."""
    return TOLERANCES[dtype] * (2 if name.startswith("rope") else 1)  # rope's reference rounds twice


def assert_close(
    name: str, dtype: torch.dtype, references: list[Tensor | None], found: list[Tensor | None], slack: float = 1.0
) -> None:
    """Every tensor of a case, after both calls; `slack` multiplies the tolerance."""
    for reference, other in zip(references, found, strict=True):
        if reference is not None and other is not None:
            largest = reference.abs().max().float()
            error = (other.cpu().float() - reference.float()).abs().max()
            assert error <= slack * tolerance(name, dtype) * largest, f"{name}: off by {error} of {largest}"
