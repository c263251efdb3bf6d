"""Loss in chunks of tokens: the logits of one chunk exist at a time, and their gradient replaces them in place.

The head is frozen, so the gradient to the hidden states is all that backward needs, and forward computes it at once.
Memory is flat in vocabulary x tokens. Shapes: N rows, V vocabulary, D hidden, K rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laras.models.fused.kernels import cross_entropy_


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk: int
    ) -> Tensor:
        nll_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden_ND.shape[0]))
            logits_KV = torch.nn.functional.linear(hidden_ND[rows], weight_VD, bias_V)
            cross_entropy_(logits_KV, targets_N[rows], nll_N[rows])
            torch.mm(logits_KV, weight_VD, out=gradient_ND[rows])
            del logits_KV
        ctx.gradient_ND = gradient_ND
        return nll_N.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient_ND, ctx.gradient_ND = ctx.gradient_ND, None
        return gradient_ND.mul_(gradients[0].to(gradient_ND.dtype)), None, None, None, None


def chunked_nll(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk_tokens: int
) -> Tensor:
    """Summed negative log-likelihood under a frozen head; rows whose target is -100 count nothing.

    Args:
        hidden_ND: Output of the decoder.
        weight_VD: The head.
        bias_V: Of the head.
        targets_N: Labels.
        chunk_tokens: Rows whose logits exist at once.
    """
    result: Tensor = _ChunkedNll.apply(hidden_ND, weight_VD.detach(), bias_V, targets_N, chunk_tokens)  # type: ignore[no-untyped-call]
    return result
