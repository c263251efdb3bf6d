"""The pointwise parts of a fused layer. Each writes into tensors that its caller allocated, so that a step on meta
tensors allocates what a step on a GPU does; Triton on CUDA, plain PyTorch elsewhere, nothing on meta.

A norm's weight in the type of its input multiplies what was rounded to that type, as Llama has it; one in float32 is
multiplied before rounding, as Gemma has it. Shapes: T tokens, D hidden, F feed-forward width, H heads, C channels of a
head, R of them rotated, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laras.data.masks import IGNORE_INDEX

# gelu's tanh form is x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3). Source: Hendrycks, Gimpel, arXiv:1606.08415.
_GELU, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


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
    out_TD.copy_(weight_D * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(weight_D.dtype))


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
        out_TD.copy_(weight_D * normed.to(weight_D.dtype))


def head_norm_(heads_THC: Tensor, weight_C: Tensor, eps: float, out_THC: Tensor) -> None:
    """`rms_norm_` over the channels of each head; `out` may be the input."""
    if heads_THC.is_meta:
        return
    if heads_THC.is_cuda:
        _triton().head_norm_(heads_THC, weight_C, eps, out_THC)
        return
    wide = heads_THC.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out_THC.copy_(weight_C * normed.to(weight_C.dtype))


def head_norm_backward_(heads_THC: Tensor, weight_C: Tensor, eps: float, gradient_THC: Tensor, out_THC: Tensor) -> None:
    """Writes the gradient to the input of `head_norm_` into `out`, which may be the gradient to its output."""
    if heads_THC.is_meta:
        return
    if heads_THC.is_cuda:
        _triton().head_norm_backward_(heads_THC, weight_C, eps, gradient_THC, out_THC)
        return
    wide = heads_THC.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed, weighted = wide * rstd, gradient_THC.float() * weight_C.float()
    out_THC.copy_((weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * rstd)


def rope_(heads_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_THC: Tensor, sign: float = 1.0) -> None:
    """Rotates the first R channels of heads by their positions, by the inverse with `sign` -1; `out` may be the input.

    Angles may have fewer columns than heads have channels; the other channels are copied.
    """
    rotated = cos_TR.shape[-1]
    if rotated < heads_THC.shape[-1]:
        if out_THC is not heads_THC and not heads_THC.is_meta:
            out_THC[..., rotated:].copy_(heads_THC[..., rotated:])
        heads_THC, out_THC = heads_THC[..., :rotated], out_THC[..., :rotated]
    if heads_THC.is_meta:
        return
    if heads_THC.is_cuda:
        _triton().rope_(heads_THC, cos_TR, sin_TR, out_THC, sign)
        return
    half = rotated // 2
    cos, sin = cos_TR[:, None, :half], sin_TR[:, None, :half] * sign
    first, second = heads_THC[..., :half], heads_THC[..., half:]
    out_THC.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))


def _inner(gate: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """u and du/dgate, None for 1, of an activation written as `gate * sigmoid(u)`."""
    if activation == "silu":
        return gate, None
    if activation != "gelu_tanh":
        raise ValueError(f"activation {activation!r}; known are silu and gelu_tanh")
    square = gate * gate
    return _GELU * gate * (1 + _CUBIC * square), _GELU * (1 + 3 * _CUBIC * square)


def swiglu_(gate_TF: Tensor, up_TF: Tensor, out_TF: Tensor, activation: str = "silu") -> None:
    """`out = act(gate) * up`, with silu or the tanh form of gelu; `out` may be up."""
    if gate_TF.is_meta:
        return
    if gate_TF.is_cuda:
        _triton().swiglu_(gate_TF, up_TF, out_TF, activation)
        return
    if activation == "silu":
        out_TF.copy_(torch.nn.functional.silu(gate_TF) * up_TF)
    else:
        wide = gate_TF.float()
        out_TF.copy_((wide * torch.sigmoid(_inner(wide, activation)[0])).to(gate_TF.dtype) * up_TF)


def swiglu_backward_(gate_TF: Tensor, up_TF: Tensor, gradient_TF: Tensor, activation: str = "silu") -> None:
    """In place: gate and up become their gradients, the gradient of the product becomes the product."""
    if gate_TF.is_meta:
        return
    if gate_TF.is_cuda:
        _triton().swiglu_backward_(gate_TF, up_TF, gradient_TF, activation)
        return
    gate, up, gradient = gate_TF.float(), up_TF.float(), gradient_TF.float()
    inner, inner_slope = _inner(gate, activation)
    sigmoid = torch.sigmoid(inner)
    activated = gate * sigmoid
    bend = activated * (1 - sigmoid)
    slope = sigmoid + (bend if inner_slope is None else bend * inner_slope)
    # All three before the first is written: in float32 the sources are the targets.
    to_gate, to_up, product = gradient * up * slope, gradient * activated, activated * up
    gate_TF.copy_(to_gate)
    up_TF.copy_(to_up)
    gradient_TF.copy_(product)


def unpack_4bit_(
    storage: Tensor, factors: Tensor, states: Sequence[Any], row_starts: Sequence[int], *packed: Tensor
) -> None:
    """Fills a group's storage (see `laras.models.fused.lora`) from 4-bit weights and adapters, in one launch.

    CUDA only: elsewhere bitsandbytes' own functions do it.
    """
    if storage.is_meta:
        return
    from laras.models.fused import triton_nf4

    triton_nf4.unpack_(packed, states, row_starts, factors, storage)


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
