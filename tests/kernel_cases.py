"""Calls of the fused layers' kernels, for whoever compares two versions of them.

A case makes the tensors and a call `(module, *tensors)`; the tensors are what the call leaves in them. They are strided
as the fused layers hold them, and of widths that are no power of two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from laras.models.fused import kernels

TOKENS = 37
IGNORE_INDEX = -100
# Of the largest value: one rounding to bfloat16 is 2^-8, and a result may pass two; fp32 sums differ in their order.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
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


def swiglu_ranks(dtype: torch.dtype, width: int, ranks: int, activation: str, in_place: bool) -> Case:
    halves, out = strided(TOKENS, 2 * width, dtype, 0), strided(TOKENS, width + ranks, dtype, 2)
    a = strided(ranks, width, dtype, 3) / width**0.5

    def call(module: Any, halves: Tensor, a: Tensor, out: Tensor) -> None:
        gate, up = halves[:, :width], halves[:, width:]
        module.swiglu_ranks_(gate, up, a, up if in_place else out[:, :width], out[:, width:], activation)

    return [halves, a, out], call


def swiglu_backward_ranks(dtype: torch.dtype, width: int, ranks: int, activation: str, kept: bool) -> Case:
    halves, gradient = strided(TOKENS, 2 * width + 2 * ranks, dtype, 0), strided(TOKENS, width, dtype, 1)
    a, sb = strided(ranks, width, dtype, 3) / width**0.5, strided(2 * width, 2 * ranks, dtype, 4) / width**0.5
    own = None if kept else strided(TOKENS, ranks, dtype, 5)

    def call(module: Any, halves: Tensor, gradient: Tensor, a: Tensor, sb: Tensor, own: Tensor | None) -> None:
        parts = halves[:, :width], halves[:, width : 2 * width], gradient, a, sb, halves[:, 2 * width :], own
        module.swiglu_backward_ranks_(*parts, activation)

    return [halves, gradient, a, sb, own], call


def cross_entropy(dtype: torch.dtype, vocabulary: int) -> Case:
    logits = 4 * strided(TOKENS, vocabulary, dtype, 0)
    targets = torch.randint(0, vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(1))
    targets[::5] = IGNORE_INDEX
    targets[1], targets[2] = 0, vocabulary - 1
    return [logits, targets, torch.full((TOKENS,), 9.0)], lambda m, *tensors: m.cross_entropy_(*tensors)


def bounds(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First row and the row behind the last, of each row's document."""
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    return tuple(one.repeat_interleave(sizes).to(torch.int32) for one in (ends - sizes, ends))


def attention(dtype: torch.dtype, lengths: Sequence[int], heads: int, shared: int, channels: int) -> Case:
    """Query, key and value lie side by side, as the fused layers hold them."""
    tokens = sum(lengths)
    qkv = strided(tokens, (heads + 2 * shared) * channels, dtype, 0)
    out = strided(tokens, heads * channels, dtype, 1)
    starts, _ = bounds(lengths)

    def call(module: Any, qkv: Tensor, out: Tensor, lse: Tensor) -> None:
        q, k, v = _heads(qkv, heads + 2 * shared).split([heads, shared, shared], dim=1)
        module.document_attention_(q, k, v, starts.to(q.device), channels**-0.5, _heads(out, heads), lse)

    return [qkv, out, torch.zeros(heads, tokens)], call


def attention_backward(dtype: torch.dtype, lengths: Sequence[int], heads: int, shared: int, channels: int) -> Case:
    tokens, scale = sum(lengths), channels**-0.5
    (qkv, out, lse), forward = attention(dtype, lengths, heads, shared, channels)
    forward(kernels, qkv, out, lse)
    gradient = strided(tokens, heads * channels, dtype, 2)
    starts, ends = bounds(lengths)

    def call(module: Any, qkv: Tensor, out: Tensor, lse: Tensor, gradient: Tensor, delta: Tensor, to: Tensor) -> None:
        parts = [heads, shared, shared]
        q, k, v = _heads(qkv, sum(parts)).split(parts, dim=1)
        targets = _heads(to, sum(parts)).split(parts, dim=1)
        own = (one.to(q.device) for one in (starts, ends))
        module.document_attention_backward_(
            _heads(gradient, heads), q, k, v, *own, scale, _heads(out, heads), lse, delta, *targets
        )

    return [qkv, out, lse, gradient, torch.zeros(heads, tokens), torch.zeros_like(qkv)], call


# Longer than a block and shorter, of one token, and ending where a block does.
_DOCUMENTS = (128, 5, 1, 61, 150, 17, 2)

_ATTENTION: dict[str, Callable[[torch.dtype], Case]] = {
    f"{name}, {heads}": functools.partial(make, **sizes)
    for name, make in (("attention", attention), ("attention backward", attention_backward))
    for heads, sizes in {
        "64 channels": {"lengths": _DOCUMENTS, "heads": 6, "shared": 2, "channels": 64},
        "128 channels": {"lengths": _DOCUMENTS, "heads": 2, "shared": 1, "channels": 128},
        "one document": {"lengths": (300,), "heads": 2, "shared": 2, "channels": 64},
        "96 channels": {"lengths": _DOCUMENTS, "heads": 2, "shared": 2, "channels": 96},
        "8 channels": {"lengths": (3, 40), "heads": 4, "shared": 2, "channels": 8},
        "256 channels": {"lengths": _DOCUMENTS, "heads": 2, "shared": 1, "channels": 256},
    }.items()
}

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
    "swiglu, ranks": lambda dtype: swiglu_ranks(dtype, 328, 16, "silu", True),
    "swiglu, ranks, gelu": lambda dtype: swiglu_ranks(dtype, 256, 48, "gelu_tanh", False),
    "swiglu backward, ranks": lambda dtype: swiglu_backward_ranks(dtype, 328, 16, "silu", False),
    "swiglu backward, ranks kept": lambda dtype: swiglu_backward_ranks(dtype, 256, 48, "gelu_tanh", True),
    "cross entropy 5003": lambda dtype: cross_entropy(dtype, 5003),
    "cross entropy 151936": lambda dtype: cross_entropy(dtype, 151936),
    **_ATTENTION,
}


def triton_versions() -> SimpleNamespace:
    """What a call takes for the Triton kernels."""
    from laras.models.fused import triton_attention, triton_kernels

    return SimpleNamespace(**{**vars(triton_kernels), **vars(triton_attention)})


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
