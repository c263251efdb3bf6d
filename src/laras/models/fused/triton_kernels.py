"""Triton versions of `laras.models.fused.kernels`; imported on CUDA only."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from laras.models.fused.launching import launch

# Of gelu's tanh form; see `laras.models.fused.kernels`.
_GELU: tl.constexpr = tl.constexpr(1.5957691216057308)
_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _norm(x_ptr, w_ptr, out_ptr, x_stride, out_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    weight = tl.load(w_ptr + column, mask=inside, other=0.0)
    normed = (wide * rstd).to(weight.dtype).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, (normed * weight.to(tl.float32)).to(x.dtype), mask=inside)


@triton.jit
def _norm_backward(
    x_ptr, w_ptr, g_ptr, t_ptr, out_ptr, x_stride, g_stride, t_stride, out_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    weight = tl.load(w_ptr + column, mask=inside, other=0.0)
    wide_weight = weight.to(tl.float32)
    weighted = tl.load(g_ptr + row * g_stride + column, mask=inside, other=0.0).to(tl.float32) * wide_weight
    normed = wide * rstd
    gradient = (weighted - normed * (tl.sum(weighted * normed, 0) / D)) * rstd
    total = tl.load(t_ptr + row * t_stride + column, mask=inside, other=0.0)
    tl.store(t_ptr + row * t_stride + column, (total.to(tl.float32) + gradient).to(total.dtype), mask=inside)
    if WRITES:
        out = normed.to(weight.dtype).to(tl.float32) * wide_weight
        tl.store(out_ptr + row * out_stride + column, out.to(x.dtype), mask=inside)


@triton.jit
def _rope(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_token, x_head, out_token, out_head, cos_token, sign, HEADS,
    HALF: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]  # a power of two; half of a head may be none
    inside = (head < HEADS) & (column < HALF)
    cos = tl.load(cos_ptr + token * cos_token + column, mask=column < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * cos_token + column, mask=column < HALF, other=0.0).to(tl.float32) * sign
    source = x_ptr + token * x_token + head * x_head + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + token * out_token + head * out_head + column
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _head_norm(
    x_ptr, w_ptr, out_ptr, x_token, x_head, out_token, out_head, eps, HEADS,
    C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (head < HEADS) & (column < C)
    x = tl.load(x_ptr + token * x_token + head * x_head + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / C + eps)[:, None]
    weight = tl.load(w_ptr + column, mask=column < C, other=0.0)
    out = (wide * rstd).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + token * out_token + head * out_head + column, out.to(x.dtype), mask=inside)


@triton.jit
def _head_norm_backward(
    x_ptr, w_ptr, g_ptr, out_ptr, x_token, x_head, g_token, g_head, out_token, out_head, eps, HEADS,
    C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (head < HEADS) & (column < C)
    wide = tl.load(x_ptr + token * x_token + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / C + eps)[:, None]
    weight = tl.load(w_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    gradient = tl.load(g_ptr + token * g_token + head * g_head + column, mask=inside, other=0.0).to(tl.float32)
    normed, weighted = wide * rstd, gradient * weight
    out = (weighted - normed * (tl.sum(weighted * normed, 1)[:, None] / C)) * rstd
    target = out_ptr + token * out_token + head * out_head + column
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activated(gate, GELU: tl.constexpr):
    """silu or the tanh form of gelu, in float32."""
    inner = gate
    if GELU:
        inner = _GELU * gate * (1.0 + _CUBIC * gate * gate)
    return gate * tl.sigmoid(inner)


@triton.jit
def _activated_and_slope(gate, GELU: tl.constexpr):
    """That, and its derivative."""
    if GELU:
        sigmoid = tl.sigmoid(_GELU * gate * (1.0 + _CUBIC * gate * gate))
        activated = gate * sigmoid
        slope = sigmoid + activated * (1 - sigmoid) * (_GELU * (1.0 + 3 * _CUBIC * gate * gate))
    else:
        sigmoid = tl.sigmoid(gate)
        activated = gate * sigmoid
        slope = sigmoid + activated * (1 - sigmoid)
    return activated, slope


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, stride, out_stride, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    out = _activated(gate, GELU).to(out_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(out_ptr + row * out_stride + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate_ptr, up_ptr, g_ptr, stride, g_stride, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    kind = g_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(g_ptr + row * g_stride + column, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activated_and_slope(gate, GELU)
    tl.store(gate_ptr + row * stride + column, (gradient * up * slope).to(kind), mask=inside)
    tl.store(up_ptr + row * stride + column, (gradient * activated).to(kind), mask=inside)
    tl.store(g_ptr + row * g_stride + column, (activated * up).to(kind), mask=inside)


@triton.jit
def _cross_entropy(logits_ptr, target_ptr, nll_ptr, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    base = logits_ptr + row * stride
    best = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(best, tl.max(x, 0))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher), 0)
        best = higher
    counted = target >= 0
    chosen = tl.load(base + tl.maximum(target, 0)).to(tl.float32)
    tl.store(nll_ptr + row, tl.where(counted, best + tl.log(total) - chosen, 0.0))
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    factor = tl.where(counted, 1.0 / total, 0.0)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - best) * factor - tl.where(column == target, 1.0, 0.0)
        tl.store(base + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < V)


def rms_norm_(x_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor) -> None:
    """As in `laras.models.fused.kernels`."""
    tokens, width = x_TD.shape
    launch(
        _norm, (tokens,), (x_TD, weight_D, out_TD), (x_TD.stride(0), out_TD.stride(0), eps),
        (width, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip


def rms_norm_backward_(
    x_TD: Tensor, weight_D: Tensor, eps: float, gradient_TD: Tensor, total_TD: Tensor, out_TD: Tensor | None
) -> None:
    """As in `laras.models.fused.kernels`."""
    tokens, width = x_TD.shape
    out = total_TD if out_TD is None else out_TD
    launch(
        _norm_backward, (tokens,), (x_TD, weight_D, gradient_TD, total_TD, out),
        (x_TD.stride(0), gradient_TD.stride(0), total_TD.stride(0), out.stride(0), eps),
        (width, triton.next_power_of_2(width), out_TD is not None), num_warps=4,
    )  # fmt: skip


def rope_(heads_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, out_THC: Tensor, sign: float) -> None:
    """As in `laras.models.fused.kernels`."""
    tokens, heads, channels = heads_THC.shape
    launch(
        _rope, (tokens,), (heads_THC, cos_TC, sin_TC, out_THC),
        (heads_THC.stride(0), heads_THC.stride(1), out_THC.stride(0), out_THC.stride(1), cos_TC.stride(0), sign, heads),
        (channels // 2, triton.next_power_of_2(heads), triton.next_power_of_2(channels // 2)), num_warps=4,
    )  # fmt: skip


def head_norm_(heads_THC: Tensor, weight_C: Tensor, eps: float, out_THC: Tensor) -> None:
    """As in `laras.models.fused.kernels`."""
    tokens, heads, channels = heads_THC.shape
    launch(
        _head_norm, (tokens,), (heads_THC, weight_C, out_THC),
        (heads_THC.stride(0), heads_THC.stride(1), out_THC.stride(0), out_THC.stride(1), eps, heads),
        (channels, triton.next_power_of_2(heads), triton.next_power_of_2(channels)), num_warps=4,
    )  # fmt: skip


def head_norm_backward_(heads_THC: Tensor, weight_C: Tensor, eps: float, gradient_THC: Tensor, out_THC: Tensor) -> None:
    """As in `laras.models.fused.kernels`."""
    tokens, heads, channels = heads_THC.shape
    launch(
        _head_norm_backward, (tokens,), (heads_THC, weight_C, gradient_THC, out_THC),
        (
            heads_THC.stride(0), heads_THC.stride(1), gradient_THC.stride(0), gradient_THC.stride(1), out_THC.stride(0),
            out_THC.stride(1), eps, heads,
        ),
        (channels, triton.next_power_of_2(heads), triton.next_power_of_2(channels)), num_warps=4,
    )  # fmt: skip


def swiglu_(gate_TF: Tensor, up_TF: Tensor, out_TF: Tensor, activation: str) -> None:
    """As in `laras.models.fused.kernels`."""
    tokens, width = gate_TF.shape
    launch(
        _swiglu, (tokens, triton.cdiv(width, 2048)), (gate_TF, up_TF, out_TF),
        (gate_TF.stride(0), out_TF.stride(0), width), (activation == "gelu_tanh", 2048), num_warps=4,
    )  # fmt: skip


def swiglu_backward_(gate_TF: Tensor, up_TF: Tensor, gradient_TF: Tensor, activation: str) -> None:
    """As in `laras.models.fused.kernels`."""
    tokens, width = gate_TF.shape
    launch(
        _swiglu_backward, (tokens, triton.cdiv(width, 2048)), (gate_TF, up_TF, gradient_TF),
        (gate_TF.stride(0), gradient_TF.stride(0), width), (activation == "gelu_tanh", 2048), num_warps=4,
    )  # fmt: skip


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor, nll_T: Tensor) -> None:
    """As in `laras.models.fused.kernels`."""
    launch(
        _cross_entropy, (logits_TV.shape[0],), (logits_TV, targets_T, nll_T), (logits_TV.stride(0), logits_TV.shape[1]),
        (4096,), num_warps=8,
    )  # fmt: skip


def triton_works(device: torch.device) -> bool:
    """Whether a kernel compiles and runs here; it needs a C compiler at run time."""
    try:
        one = torch.ones(1, 16, device=device)
        for _ in range(2):  # Triton's own launch, and a direct one
            rms_norm_(one, one[0], 1e-6, torch.empty_like(one))
    except Exception:  # noqa: BLE001 - any failure of a compiler means the same: not here
        return False
    return True
