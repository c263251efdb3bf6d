"""Attention over packed documents for any model of transformers: kernels on CUDA, a masked reference elsewhere.

Registered with transformers under the name `varlen`. It takes `cu_seqlens` where a batch is packed; where none is given
(evaluation, generation) it is transformers' own masked `sdpa`. Shapes: T tokens, H heads, G key-value heads, C
channels of a head, M documents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "varlen"


def register_attention() -> None:
    """Makes `varlen` known to transformers; again and again does no harm."""
    AttentionInterface.register(VARLEN, _attention)
    AttentionMaskInterface.register(VARLEN, _mask)


def document_mask(cu_seqlens_M: Tensor, tokens: int, window: int | None = None) -> Tensor:
    """(T, T), True where the query (row) may see the key: the same document, not later, within the window."""
    position_T = torch.arange(tokens, device=cu_seqlens_M.device)
    document_T = torch.bucketize(position_T, cu_seqlens_M[1:].long(), right=True)
    distance_TT = position_T[:, None] - position_T[None, :]
    mask_TT = (document_T[:, None] == document_T[None, :]) & (distance_TT >= 0)
    return mask_TT if window is None else mask_TT & (distance_TT < window)


def has_varlen_kernel(tensor: Tensor) -> bool:
    """Whether torch's varlen kernel takes such queries: half precision, Ampere or later, heads up to 256."""
    if not tensor.is_cuda or tensor.dtype not in (torch.bfloat16, torch.float16) or tensor.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    max_document_tokens: int | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (1, H, T, C), key and value (1, G, T, C) to (1, T, H, C)."""
    if cu_seqlens is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return result
    tokens = query.shape[2]
    if has_varlen_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        query_THC, key_TGC, value_TGC = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
        longest = max_document_tokens or tokens
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        out_THC: Any = varlen_attn(
            query_THC, key_TGC, value_TGC, cu_seqlens, cu_seqlens, longest, longest,
            scale=scaling, window_size=window, **_grouped(query, key),
        )  # fmt: skip
        return out_THC.unsqueeze(0), None
    mask = document_mask(cu_seqlens, tokens, sliding_window)[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)


def _grouped(query: Tensor, key: Tensor) -> dict[str, Any]:
    """torch 2.12 asks whether heads share keys and values; torch 2.11 has no such argument and finds it by itself."""
    from torch.nn.attention.varlen import varlen_attn

    known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return {"enable_gqa": query.shape[1] != key.shape[1]} if known else {}


def _mask(**arguments: Any) -> Tensor | None:
    """transformers' mask, except for packed batches, whose T x T mask `cu_seqlens` replaces."""
    is_packed = arguments.get("attention_mask") is None and not arguments.get("allow_is_causal_skip", True)
    if is_packed and arguments["q_length"] == arguments["kv_length"] > 1:
        return None
    mask: Tensor | None = sdpa_mask(**arguments)
    return mask
