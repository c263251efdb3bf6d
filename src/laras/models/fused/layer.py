"""One decoder layer, forward and backward by hand; what is kept between the two is a choice.

| kept        | bytes a token (2-byte types)                                      | computed again in backward       |
|---|---|---|
| `none`      | everything: 2 (2 D + qkv + D + 2 F) + ranks                        | norms, the SwiGLU product        |
| `selective` | 2 (2 D + qkv + D)                                                  | also gate and up                 |
| `full`      | 2 D, the layer's input                                             | also q, k, v, attention, o       |
| `offload`   | as `full`, in main memory; on the device that of two layers        | as `full`                        |

(The names say how much is checkpointed; a layer knows `offload` as `full` with `inputs`.) Where query and key are
normed by head, what is kept of them is from before the norm, and backward norms and rotates them again. Gate, up and
their gradients exist for `mlp_chunk` tokens at a time unless they are kept. Shapes: T tokens, D hidden, F feed-forward
width, H heads, G key-value heads, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laras.models.fused.attention import Documents, attention, attention_backward
from laras.models.fused.kernels import (
    head_norm_,
    head_norm_backward_,
    rms_norm_,
    rms_norm_backward_,
    rope_,
    swiglu_,
    swiglu_backward_,
)
from laras.models.fused.lora import AdapterSums, LoraGroup
from laras.models.fused.offload import HostInputs
from laras.models.fused.variant import Variant


@dataclass(frozen=True)
class FusedLayer:
    """The parts of a decoder layer."""

    qkv: LoraGroup
    o: LoraGroup
    gate_up: LoraGroup
    down: LoraGroup
    input_norm: Tensor
    middle_norm: Tensor
    query_norm: Tensor | None  # over the channels of a head, before it is rotated
    key_norm: Tensor | None
    eps: float
    activation: str
    rotates: bool
    heads: int
    key_value_heads: int
    channels: int
    width: int  # F
    scale: float
    checkpoint_kind: str
    mlp_chunk: int
    variant: Variant
    number: int = 0
    inputs: HostInputs | None = None  # where inputs are kept that are all a layer keeps

    @property
    def spare(self) -> int:
        """Columns that a gradient's buffer has beside the hidden ones, for `dy sB`."""
        return max(self.o.ranks, self.down.ranks)

    @property
    def groups(self) -> tuple[LoraGroup, ...]:
        """In the order in which their adapters are passed."""
        return self.qkv, self.o, self.gate_up, self.down

    def __call__(self, hidden_TD: Tensor, documents: Documents) -> Tensor:
        """The layer's output (T, D)."""
        adapters = [parameter for group in self.groups for parameter in group.adapters]
        result: Tensor = _LayerFunction.apply(hidden_TD, self, documents, *adapters)  # type: ignore[no-untyped-call]
        return result


@dataclass
class _Attended:
    qkv: Tensor | None  # None: to be computed again
    ranks: Tensor | None  # x A^T of q, k, v
    out: Tensor | None  # (T, H C)
    saved: Any
    o_ranks: Tensor
    middle: Tensor | None  # hidden states after attention


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, layer: FusedLayer, documents: Documents, *adapters: Tensor) -> Tensor:
        kept = layer.checkpoint_kind
        ctx.hidden = hidden_TD if layer.inputs is None else layer.inputs.store(layer.number, hidden_TD)
        attended: _Attended | None = _attend(layer, hidden_TD, documents)
        layer.qkv.unload()
        layer.o.unload()
        assert attended is not None and attended.middle is not None
        middle = out = attended.middle
        if kept == "full" and layer.variant.middle_in_place:
            attended = None
        else:
            out = torch.empty_like(middle)
        chunk = hidden_TD.shape[0] if kept == "none" else layer.mlp_chunk
        layer.gate_up.load()
        layer.down.load()
        feed: tuple[Tensor, Tensor, Tensor] | None = None
        for rows in _chunks(hidden_TD.shape[0], chunk):
            part = middle[rows]
            feed = _feed(layer, part, part if out is middle else out[rows])
        layer.gate_up.unload()
        layer.down.unload()
        del middle
        if layer.inputs is not None:
            layer.inputs.let_go()
        ctx.layer, ctx.documents = layer, documents
        ctx.attended = attended if kept != "full" else None
        ctx.feed = feed
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        layer, documents, hidden = ctx.layer, ctx.documents, ctx.hidden
        attended, feed = ctx.attended, ctx.feed
        ctx.attended = ctx.feed = ctx.hidden = None
        if layer.inputs is not None:
            hidden = layer.inputs.load(hidden, gradients[0])
        tokens, width = hidden.shape
        total = _with_room(gradients[0], layer.spare)
        if attended is None:
            attended = _attend(layer, hidden, documents, whole=not layer.variant.middle_in_chunks)
            if layer.variant.qkv_again and layer.qkv.is_quantized:
                attended.qkv = attended.ranks = None
                layer.qkv.unload()
        sums = [AdapterSums() for _ in layer.groups]
        layer.gate_up.load()
        layer.down.load()
        for rows in _chunks(tokens, tokens if feed is not None else layer.mlp_chunk):
            _feed_backward(layer, _middle(layer, attended, hidden, rows), total[rows], feed, sums)
        del feed
        layer.gate_up.unload()
        layer.down.unload()
        attended.middle = None  # the peak is in the attention's backward
        _attend_backward(layer, hidden, attended, total, documents, sums)
        found = [one for group, own in zip(layer.groups, sums, strict=True) for one in group.gradients(own)]
        return total[:, :width], None, None, *found


def _with_room(gradient_TD: Tensor, spare: int) -> Tensor:
    """The gradient in a buffer of `spare` more columns: the one that the next layer returned, else a new one."""
    tokens, width = gradient_TD.shape
    stride = width + spare
    is_ours = gradient_TD.stride() == (stride, 1) and gradient_TD.storage_offset() == 0
    if is_ours and gradient_TD.untyped_storage().nbytes() >= tokens * stride * gradient_TD.element_size():
        return gradient_TD.as_strided((tokens, stride), (stride, 1))
    total = gradient_TD.new_empty(tokens, stride)
    total[:, :width].copy_(gradient_TD)
    return total


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _heads(layer: FusedLayer, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q (T, H, C), k and v (T, G, C)."""
    split = [layer.heads * layer.channels, *[layer.key_value_heads * layer.channels] * 2]
    parts = torch.split(qkv[:, : sum(split)], split, dim=1)
    q, k, v = (part.view(part.shape[0], -1, layer.channels) for part in parts)
    return q, k, v


def _attend(layer: FusedLayer, hidden: Tensor, documents: Documents, *, whole: bool = True) -> _Attended:
    """Attention; unless `whole`, without the hidden states after it, which `_middle` forms."""
    layer.qkv.load()
    layer.o.load()
    qkv, ranks = _project(layer, hidden)
    q, k, v = _heads(layer, qkv)
    q, k = _turned(layer, q, k, documents)
    out_THC, saved = attention(q, k, v, documents, layer.scale)
    out = out_THC.flatten(1)
    del q, k, v
    o_ranks = hidden.new_empty(hidden.shape[0], layer.o.ranks)
    middle = layer.o.add_forward(out, hidden, o_ranks) if whole else None
    return _Attended(qkv, ranks, out, saved, o_ranks, middle)


def _project(layer: FusedLayer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Query, key and value (T, (H + 2 G) C) before `_turned`, and x A^T."""
    buffer = layer.qkv.new_input(hidden)
    rms_norm_(hidden, layer.input_norm, layer.eps, buffer[:, : layer.qkv.inputs])
    qkv = hidden.new_empty(hidden.shape[0], layer.qkv.outputs)
    layer.qkv.forward(buffer, qkv)
    return qkv, buffer[:, layer.qkv.inputs :].clone()


def _middle(layer: FusedLayer, attended: _Attended, hidden: Tensor, rows: slice) -> Tensor:
    """Hidden states after attention, for some tokens."""
    if attended.middle is not None:
        return attended.middle[rows]
    assert attended.out is not None
    return layer.o.add_forward(attended.out[rows], hidden[rows], attended.o_ranks[rows])


def _turned(layer: FusedLayer, q: Tensor, k: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Query and key as attention takes them: rotated in place, or normed and rotated beside what backward needs."""
    turned = []
    for heads, weight in ((q, layer.query_norm), (k, layer.key_norm)):
        out = heads
        if weight is not None:
            out = heads.new_empty(heads.shape)
            head_norm_(heads, weight, layer.eps, out)
        if layer.rotates:
            rope_(out, documents.cos_TC, documents.sin_TC, out)
        turned.append(out)
    return turned[0], turned[1]


def _turned_back(
    layer: FusedLayer, weight: Tensor | None, gradient: Tensor, raw: Tensor, documents: Documents, out: Tensor
) -> None:
    """The gradient to what `_turned` took."""
    if weight is None and layer.rotates:
        rope_(gradient, documents.cos_TC, documents.sin_TC, out, -1.0)
    elif weight is None:
        out.copy_(gradient)
    else:
        if layer.rotates:
            rope_(gradient, documents.cos_TC, documents.sin_TC, gradient, -1.0)
        head_norm_backward_(raw, weight, layer.eps, gradient, out)


def _feed(layer: FusedLayer, middle: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Writes the feed-forward part's output, `middle` included, into `out`, which may be `middle`.

    Returns:
        Gate and up, and their and down's x A^T, where nothing is checkpointed.
    """
    is_kept = layer.checkpoint_kind == "none"
    gate_up, view = _gate_up(layer, middle)
    ranks = view.clone() if is_kept else None
    del view
    gate, up = gate_up[:, : layer.width], gate_up[:, layer.width : 2 * layer.width]
    if layer.variant.product_in_up and not is_kept:
        product = gate_up[:, layer.width : 2 * layer.width + layer.down.ranks]
    else:
        product = layer.down.new_input(middle)
    swiglu_(gate, up, product[:, : layer.width], layer.activation)
    torch.mm(product[:, : layer.width], layer.down.a.t(), out=product[:, layer.width :])
    weight = layer.down.storage[: layer.down.outputs].t()
    if out is middle:
        out.addmm_(product, weight)
    else:
        torch.addmm(middle, product, weight, out=out)
    if layer.down.bias is not None:
        out.add_(layer.down.bias)
    return (gate_up, ranks, product[:, layer.width :].clone()) if ranks is not None else None


def _gate_up(layer: FusedLayer, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up in a buffer with room for `dy sB`, and x A^T as a view of a buffer that a clone outlives."""
    buffer = layer.gate_up.new_input(middle)
    rms_norm_(middle, layer.middle_norm, layer.eps, buffer[:, : layer.gate_up.inputs])
    gate_up = middle.new_empty(middle.shape[0], layer.gate_up.outputs + layer.gate_up.ranks)
    layer.gate_up.forward(buffer, gate_up[:, : layer.gate_up.outputs])
    return gate_up, buffer[:, layer.gate_up.inputs :]


def _feed_backward(
    layer: FusedLayer,
    middle: Tensor,
    total: Tensor,
    feed: tuple[Tensor, Tensor, Tensor] | None,
    sums: list[AdapterSums],
) -> None:
    """Adds the feed-forward part's gradient to `total` (rows of a chunk, D + spare columns)."""
    hidden = middle.shape[1]
    if feed is not None:
        gate_up, ranks = feed[:2]
    else:
        gate_up, ranks = _gate_up(layer, middle)
        ranks = ranks.clone()
    product, dyb = layer.down.backward(total[:, : hidden + layer.down.ranks])
    gate, up = gate_up[:, : layer.width], gate_up[:, layer.width : 2 * layer.width]
    swiglu_backward_(gate, up, product, layer.activation)
    down_ranks = feed[2] if feed is not None else torch.mm(product, layer.down.a.t())
    layer.down.add_gradients(sums[3], product, down_ranks, total[:, :hidden], dyb)
    del product
    gradient, dyb = layer.gate_up.backward(gate_up)
    rms_norm_backward_(middle, layer.middle_norm, layer.eps, gradient, total[:, :hidden], gradient)
    layer.gate_up.add_gradients(sums[2], gradient, ranks, gate_up[:, : layer.gate_up.outputs], dyb)


def _attend_backward(
    layer: FusedLayer, hidden: Tensor, attended: _Attended, total: Tensor, documents: Documents, sums: list[AdapterSums]
) -> None:
    width = hidden.shape[1]
    layer.qkv.load()
    layer.o.load()
    o_gradient = total[:, : width + layer.o.ranks]
    dyb = layer.o.rank_gradient(o_gradient)
    assert attended.out is not None
    layer.o.add_gradients(sums[1], attended.out, attended.o_ranks, total[:, :width], dyb)
    qkv, ranks = attended.qkv, attended.ranks
    if qkv is None or ranks is None:
        qkv, ranks = _project(layer, hidden)
        if layer.query_norm is None:
            _turned(layer, *_heads(layer, qkv)[:2], documents)
    buffer = hidden.new_empty(hidden.shape[0], layer.qkv.outputs + layer.qkv.ranks)
    sources, targets = _heads(layer, qkv), _heads(layer, buffer)
    for few, many, out_THC, gradient_THC in _parts(layer, attended, o_gradient):
        raw_q, raw_k, v = sources[0][:, many], sources[1][:, few], sources[2][:, few]
        q, k = (raw_q, raw_k) if layer.query_norm is None else _turned(layer, raw_q, raw_k, documents)
        saved = attended.saved
        if saved is not None:
            saved = (saved[0][many].contiguous(), *saved[1:])
        dq, dk, dv = attention_backward(gradient_THC, q, k, v, out_THC, saved, documents, layer.scale)
        del q, k, out_THC, gradient_THC
        _turned_back(layer, layer.query_norm, dq, raw_q, documents, targets[0][:, many])
        _turned_back(layer, layer.key_norm, dk, raw_k, documents, targets[1][:, few])
        targets[2][:, few].copy_(dv)
        del dq, dk, dv
    layer.o.unload()
    gradient, dyb = layer.qkv.backward(buffer)
    layer.qkv.unload()
    rms_norm_backward_(hidden, layer.input_norm, layer.eps, gradient, total[:, :width], gradient)
    layer.qkv.add_gradients(sums[0], gradient, ranks, buffer[:, : layer.qkv.outputs], dyb)


def _parts(layer: FusedLayer, attended: _Attended, o_gradient: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Key-value heads and query heads whose backward runs at once, with the output of these and its gradient.

    The kernel's temporaries grow with the heads, so where memory is what counts it takes half of them at a time. It
    copies outputs and gradients that are strided, so each half has its own.
    """
    out, attended.out = attended.out, None
    assert out is not None
    each, group = layer.key_value_heads, layer.heads // layer.key_value_heads
    if each % 2 == 0 and not (layer.variant.whole_heads and layer.checkpoint_kind == "none"):
        each //= 2
    columns = each * group * layer.channels
    starts = range(0, out.shape[1], columns)
    if layer.variant.own_halves or len(starts) == 1:
        outs = [out[:, start : start + columns].contiguous() for start in starts]
        del out
        gradients = None
    else:
        outs = [out[:, start : start + columns] for start in starts]
        gradients = layer.o.input_gradient(o_gradient, slice(0, layer.o.inputs))
    shape = (-1, each * group, layer.channels)
    for part, start in enumerate(starts):
        place = slice(start, start + columns)
        few = slice(part * each, (part + 1) * each)
        many = slice(few.start * group, few.stop * group)
        if gradients is None:
            yield few, many, outs.pop(0).view(shape), layer.o.input_gradient(o_gradient, place).view(shape)
        else:
            yield few, many, outs.pop(0).view(shape), gradients[:, place].view(shape)
