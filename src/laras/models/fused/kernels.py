"""The pointwise parts of a fused layer. Each writes into tensors that its caller allocated, so that a step on meta
tensors allocates what a step on a GPU does; Triton on CUDA, plain PyTorch elsewhere, nothing on meta.

Shapes: T tokens, D hidden, F feed-forward width, H heads, C channels of a head, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def _triton() -> Any:
    from laras.models.fused import triton_kernels

    return triton_kernels


def rms_norm_(x_TD: Tensor, weight_D: Tensor, eps: float, out_TD: Tensor) -> None:
    """`out = x / rms(x) * weight`, the rounding of transformers included."""
    if x_TD.is_meta:
        return
    if x_TD.is_cuda:
        _triton().rms_norm_(x_TD, weight_D, eps, out_TD)
        return
    wide = x_TD.float()
    out_TD.copy_(weight_D * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_TD.dtype))


def rms_norm_backward_(
    x_TD: Tensor, weight_D: Tensor, eps: float, gradient_TD: Tensor, total_TD: Tensor, out_TD: Tensor | None
) -> None:
    """Adds the gradient to the norm's input to `total`; recomputes the norm's output into `out`."""
    if x_TD.is_meta:
        return
    if x_TD.is_cuda:
        _triton().rms_norm_backward_(x_TD, weight_D, eps, gradient_TD, total_TD, out_TD)
        return
    wide = x_TD.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed, weighted = wide * rstd, gradient_TD.float() * weight_D.float()
    total_TD.add_(((weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * rstd).to(total_TD.dtype))
    if out_TD is not None:
        out_TD.copy_(weight_D * normed.to(x_TD.dtype))


def rope_(heads_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, out_THC: Tensor, sign: float = 1.0) -> None:
    """Rotates heads by their positions, by the inverse with `sign` -1; `out` may be the input."""
    if heads_THC.is_meta:
        return
    if heads_THC.is_cuda:
        _triton().rope_(heads_THC, cos_TC, sin_TC, out_THC, sign)
        return
    half = heads_THC.shape[-1] // 2
    cos, sin = cos_TC[:, None, :half], sin_TC[:, None, :half] * sign
    first, second = heads_THC[..., :half], heads_THC[..., half:]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    out_THC.copy_(rotated)


def swiglu_(gate_TF: Tensor, up_TF: Tensor, out_TF: Tensor) -> None:
    """`out = silu(gate) * up`."""
    if gate_TF.is_meta:
        return
    if gate_TF.is_cuda:
        _triton().swiglu_(gate_TF, up_TF, out_TF)
        return
    out_TF.copy_(torch.nn.functional.silu(gate_TF) * up_TF)


def swiglu_backward_(gate_TF: Tensor, up_TF: Tensor, gradient_TF: Tensor) -> None:
    """In place: gate and up become their gradients, the gradient of the product becomes the product."""
    if gate_TF.is_meta:
        return
    if gate_TF.is_cuda:
        _triton().swiglu_backward_(gate_TF, up_TF, gradient_TF)
        return
    gate, up, gradient = gate_TF.float(), up_TF.float(), gradient_TF.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    # All three before the first is written: in float32 the sources are the targets.
    to_gate, to_up, product = gradient * up * (sigmoid + silu * (1 - sigmoid)), gradient * silu, silu * up
    gate_TF.copy_(to_gate)
    up_TF.copy_(to_up)
    gradient_TF.copy_(product)


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor, nll_T: Tensor) -> None:
    """Writes each row's loss, 0 where the target is -100; the logits become the gradient of the summed loss."""
    if logits_TV.is_meta:
        return
    if logits_TV.is_cuda:
        _triton().cross_entropy_(logits_TV, targets_T, nll_T)
        return
    wide, counted = logits_TV.float(), targets_T != IGNORE_INDEX
    log_probability = torch.log_softmax(wide, dim=-1)
    index = targets_T.clamp(min=0)[:, None]
    nll_T.copy_(torch.where(counted, -log_probability.gather(1, index)[:, 0], 0.0))
    gradient = log_probability.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=wide.dtype))
    logits_TV.copy_(torch.where(counted[:, None], gradient, 0.0))
