"""Attention over packed documents in Triton, forward and backward; imported on CUDA only.

The documents of a batch lie behind one another, so a block of queries sees the keys from the first row of its first
row's document to its own last row. Blocks are counted by tokens: none is empty, however many documents there are and
however long the longest is. Softmax is taken block by block, as FlashAttention-2 takes it (arXiv:2307.08691, algorithms
1 and 2). The gradients to keys and values are summed over the query heads that share them inside one block, so no head
is expanded, nothing is added atomically, and two runs give the same bits.

Shapes: T tokens, H query heads, G key-value heads, C channels of a head; M queries and N keys of a block.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from laras.models.fused.launching import launch

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: M queries and N keys of a block, warps, and stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Cuts:
    """Of the three kernels, for heads of some width and a GPU's shared memory."""

    forward: Blocks
    to_queries: Blocks
    to_keys: Blocks


def cuts_for(channels: int, shared_bytes: int) -> Cuts:
    """What fits a GPU's shared memory a block: 163 KiB and more on A100 and H100, 99 KiB on L4 and RTX 30 to 50."""
    roomy = shared_bytes >= 160 * 1024
    if channels <= 64:
        return Cuts(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 8, 2))
    if channels <= 128:
        return Cuts(Blocks(128, 64, 8, 2 + roomy), Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2))
    return Cuts(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 1 + roomy), Blocks(32, 32, 4, 1 + roomy))


@triton.jit
def _rows(base, stride, first, tokens, ROWS: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Channels of the tokens from `first` on; zero beyond the last token and the last channel."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (first + row < tokens)[:, None]
    if COLUMNS != C:
        inside = inside & (column < C)[None, :]
    place = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _store(base, stride, first, tokens, block, ROWS: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (first + row < tokens)[:, None]
    if COLUMNS != C:
        inside = inside & (column < C)[None, :]
    place = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(place, block.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, starts_ptr, out_ptr, lse_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, tokens, scale_log2,
    GROUP: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * M, tl.program_id(1)
    row = first + tl.arange(0, M)
    start = tl.load(starts_ptr + row, mask=row < tokens, other=0)
    q = _rows(q_ptr + head * q_head, q_token, first, tokens, M, C, COLUMNS)
    k_ptr += head // GROUP * k_head
    v_ptr += head // GROUP * v_head
    best = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, COLUMNS), tl.float32)
    for begin in tl.range(tl.load(starts_ptr + first) // N * N, tl.minimum(first + M, tokens), N):
        key = begin + tl.arange(0, N)
        k = _rows(k_ptr, k_token, begin, tokens, N, C, COLUMNS)
        score = tl.dot(q, tl.trans(k)) * scale_log2
        score = tl.where((key[None, :] <= row[:, None]) & (key[None, :] >= start[:, None]), score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        top = tl.where(higher == float("-inf"), 0.0, higher)  # nothing of this row's document yet
        share = tl.exp2(score - top[:, None])
        fade = tl.exp2(best - top)
        total = total * fade + tl.sum(share, 1)
        v = _rows(v_ptr, v_token, begin, tokens, N, C, COLUMNS)
        out = tl.dot(share.to(v.dtype), v, out * fade[:, None])
        best = higher
    _store(out_ptr + head * out_head, out_token, first, tokens, out / total[:, None], M, C, COLUMNS)
    tl.store(lse_ptr + head * tokens + row, best + tl.log2(total), mask=row < tokens)


@triton.jit
def _backward_to_queries(
    q_ptr, k_ptr, v_ptr, starts_ptr, out_ptr, gradient_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, gradient_token, gradient_head,
    dq_token, dq_head, tokens, scale, scale_log2,
    GROUP: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * M, tl.program_id(1)
    row = first + tl.arange(0, M)
    inside = row < tokens
    start = tl.load(starts_ptr + row, mask=inside, other=0)
    q = _rows(q_ptr + head * q_head, q_token, first, tokens, M, C, COLUMNS)
    gradient = _rows(gradient_ptr + head * gradient_head, gradient_token, first, tokens, M, C, COLUMNS)
    out = _rows(out_ptr + head * out_head, out_token, first, tokens, M, C, COLUMNS)
    delta = tl.sum(out.to(tl.float32) * gradient.to(tl.float32), 1)
    tl.store(delta_ptr + head * tokens + row, delta, mask=inside)
    lse = tl.load(lse_ptr + head * tokens + row, mask=inside, other=0.0)
    k_ptr += head // GROUP * k_head
    v_ptr += head // GROUP * v_head
    dq = tl.zeros((M, COLUMNS), tl.float32)
    for begin in tl.range(tl.load(starts_ptr + first) // N * N, tl.minimum(first + M, tokens), N):
        key = begin + tl.arange(0, N)
        k = _rows(k_ptr, k_token, begin, tokens, N, C, COLUMNS)
        v = _rows(v_ptr, v_token, begin, tokens, N, C, COLUMNS)
        share = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
        share = tl.where((key[None, :] <= row[:, None]) & (key[None, :] >= start[:, None]), share, 0.0)
        to_score = share * (tl.dot(gradient, tl.trans(v)) - delta[:, None])
        dq = tl.dot(to_score.to(k.dtype), k, dq)
    _store(dq_ptr + head * dq_head, dq_token, first, tokens, dq * scale, M, C, COLUMNS)


@triton.jit
def _backward_to_keys(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, gradient_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, gradient_token, gradient_head,
    dk_token, dk_head, dv_token, dv_head, tokens, scale, scale_log2,
    GROUP: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    first, shared = tl.program_id(0) * N, tl.program_id(1)
    key = first + tl.arange(0, N)
    k = _rows(k_ptr + shared * k_head, k_token, first, tokens, N, C, COLUMNS)
    v = _rows(v_ptr + shared * v_head, v_token, first, tokens, N, C, COLUMNS)
    end = tl.load(ends_ptr + tl.minimum(first + N, tokens) - 1)
    dk = tl.zeros((N, COLUMNS), tl.float32)
    dv = tl.zeros((N, COLUMNS), tl.float32)
    for head in tl.range(shared * GROUP, (shared + 1) * GROUP):
        for begin in tl.range(first // M * M, end, M):
            row = begin + tl.arange(0, M)
            inside = row < tokens
            start = tl.load(starts_ptr + row, mask=inside, other=0)
            lse = tl.load(lse_ptr + head * tokens + row, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + head * tokens + row, mask=inside, other=0.0)
            q = _rows(q_ptr + head * q_head, q_token, begin, tokens, M, C, COLUMNS)
            gradient = _rows(gradient_ptr + head * gradient_head, gradient_token, begin, tokens, M, C, COLUMNS)
            share = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
            visible = (key[:, None] <= row[None, :]) & (key[:, None] >= start[None, :]) & inside[None, :]
            share = tl.where(visible, share, 0.0)
            dv = tl.dot(share.to(gradient.dtype), gradient, dv)
            to_score = share * (tl.dot(v, tl.trans(gradient)) - delta[None, :])
            dk = tl.dot(to_score.to(q.dtype), q, dk)
    _store(dk_ptr + shared * dk_head, dk_token, first, tokens, dk * scale, N, C, COLUMNS)
    _store(dv_ptr + shared * dv_head, dv_token, first, tokens, dv, N, C, COLUMNS)


def document_attention_(
    q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, starts_T: Tensor, scale: float, out_THC: Tensor, lse_HT: Tensor
) -> None:
    """As in `laras.models.fused.kernels`."""
    tokens, heads, _ = q_THC.shape
    cut = _cuts(q_THC).forward
    launch(
        _forward, (triton.cdiv(tokens, cut.queries), heads), (q_THC, k_TGC, v_TGC, starts_T, out_THC, lse_HT),
        (*_strides(q_THC, k_TGC, v_TGC, out_THC), tokens, scale * _LOG2_E), _constants(q_THC, k_TGC, cut),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def document_attention_backward_(
    gradient_THC: Tensor, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, starts_T: Tensor, ends_T: Tensor, scale: float,
    out_THC: Tensor, lse_HT: Tensor, delta_HT: Tensor, dq_THC: Tensor, dk_TGC: Tensor, dv_TGC: Tensor,
) -> None:  # fmt: skip
    """As in `laras.models.fused.kernels`."""
    tokens, heads, _ = q_THC.shape
    scales, cuts = (scale, scale * _LOG2_E), _cuts(q_THC)
    cut = cuts.to_queries
    launch(
        _backward_to_queries, (triton.cdiv(tokens, cut.queries), heads),
        (q_THC, k_TGC, v_TGC, starts_T, out_THC, gradient_THC, lse_HT, delta_HT, dq_THC),
        (*_strides(q_THC, k_TGC, v_TGC, out_THC, gradient_THC, dq_THC), tokens, *scales),
        _constants(q_THC, k_TGC, cut), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    cut = cuts.to_keys
    launch(
        _backward_to_keys, (triton.cdiv(tokens, cut.keys), k_TGC.shape[1]),
        (q_THC, k_TGC, v_TGC, starts_T, ends_T, gradient_THC, lse_HT, delta_HT, dk_TGC, dv_TGC),
        (*_strides(q_THC, k_TGC, v_TGC, gradient_THC, dk_TGC, dv_TGC), tokens, *scales),
        _constants(q_THC, k_TGC, cut), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def _strides(*heads: Tensor) -> list[int]:
    """Of tokens and of heads; channels lie side by side."""
    return [stride for one in heads for stride in one.stride()[:2]]


def _constants(q_THC: Tensor, k_TGC: Tensor, cut: Blocks) -> tuple[int, ...]:
    _, heads, channels = q_THC.shape
    columns = max(16, triton.next_power_of_2(channels))
    return heads // k_TGC.shape[1], channels, columns, cut.queries, cut.keys


def _cuts(q_THC: Tensor) -> Cuts:
    return cuts_for(q_THC.shape[-1], _shared_bytes(q_THC.device))


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have; elsewhere than on a GPU kernels are interpreted."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0
