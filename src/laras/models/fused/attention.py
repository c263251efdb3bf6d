"""Attention over packed documents, forward and backward, on contiguous or strided heads.

Shapes: T tokens, H query heads, G key-value heads, C channels of a head, M documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laras.models.attention import document_mask, has_varlen_kernel


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a batch, and the rotations of their positions."""

    cu_seqlens: Tensor  # (M + 1,) int32
    longest_tokens: int
    cos_TC: Tensor
    sin_TC: Tensor
    rows: int | None = None  # where every document has the same length, as the rows of a padded batch have


def attention(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Any]:
    """Output (T, H, C), and what the backward pass wants of the kernel: None for the masked reference."""
    if q_THC.is_meta:
        logsumexp = q_THC.new_empty(q_THC.shape[1], q_THC.shape[0], dtype=torch.float32)
        return q_THC.new_empty(q_THC.shape), (logsumexp, None, None)
    if has_varlen_kernel(q_THC):
        longest = documents.longest_tokens
        out, logsumexp, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q_THC, k_TGC, v_TGC, documents.cu_seqlens, documents.cu_seqlens, longest, longest, 0.0, True, False,
            scale=scale,
        )  # fmt: skip
        return out, (logsumexp, state, unused)
    return _reference(q_THC, k_TGC, v_TGC, documents, scale), None


def attention_backward(
    gradient_THC: Tensor, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, out_THC: Tensor, saved: Any,
    documents: Documents, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to queries, keys and values."""
    if q_THC.is_meta:
        return _meta_backward(q_THC, k_TGC, documents)
    if saved is not None:
        logsumexp, state, unused = saved
        longest = documents.longest_tokens
        return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
            gradient_THC, q_THC, k_TGC, v_TGC, out_THC, logsumexp, documents.cu_seqlens, documents.cu_seqlens,
            longest, longest, 0.0, True, state, unused, scale=scale,
        )  # fmt: skip
    with torch.enable_grad():
        q, k, v = (one.detach().requires_grad_() for one in (q_THC, k_TGC, v_TGC))
        out = _reference(q, k, v, documents, scale)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), gradient_THC)
        return dq, dk, dv


def _reference(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, documents: Documents, scale: float) -> Tensor:
    groups = q_THC.shape[1] // k_TGC.shape[1]
    rows = documents.rows or 1
    q, k, v = (one.view(rows, -1, *one.shape[1:]).transpose(1, 2) for one in (q_THC, k_TGC, v_TGC))
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    mask_TT = None if documents.rows else document_mask(documents.cu_seqlens, q_THC.shape[0])
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_TT, is_causal=mask_TT is None, scale=scale
    )
    return out.transpose(1, 2).flatten(0, 1).contiguous()


def _meta_backward(q_THC: Tensor, k_TGC: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates what FlashAttention-2 does: float32 sums for the queries, keys and values of every query head.

    Source: pytorch 2.11, `aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`, `mha_varlen_bwd`.
    """
    tokens, heads, channels = q_THC.shape
    rows = tokens + 128 * (documents.cu_seqlens.shape[0] - 1)
    dq, dk, dv = q_THC.new_empty(q_THC.shape), k_TGC.new_empty(k_TGC.shape), k_TGC.new_empty(k_TGC.shape)
    softmax = q_THC.new_empty(heads, rows, dtype=torch.float32)
    total = q_THC.new_empty(rows, heads, channels, dtype=torch.float32)
    wide = [q_THC.new_empty(q_THC.shape) for _ in range(2)] if heads != k_TGC.shape[1] else []
    del softmax, total, wide
    return dq, dk, dv
