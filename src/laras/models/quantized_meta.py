"""Quantised linear layers on the meta device: bitsandbytes' own modules, with packed weights that hold no data.

Quantising needs a GPU and the weights; planning has neither. The shapes and types of what quantising leaves are known,
and bitsandbytes' operations run on meta tensors, so the recorded step is that of the real layers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

_BLOCK = 64  # weights that share a scale
_NESTED_BLOCK = 256  # scales that share a scale of their own


def quantize_on_meta(model: nn.Module, kind: Literal["nf4", "int8"], compute_dtype: torch.dtype) -> None:
    """Replaces the linear layers of a model on meta, the head excepted, as loading it quantised would.

    Args:
        model: Changed in place.
        kind: NF4 with double quantisation, or LLM.int8().
        compute_dtype: Type of the arithmetic.

    Source: bitsandbytes 0.50 `nn/modules.py`, transformers 5.17 `integrations/bitsandbytes.py`.
    """
    whole: Any = model
    head = whole.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                replacement = _nf4(child, compute_dtype) if kind == "nf4" else _int8(child)
                setattr(parent, name, replacement)
    whole.is_quantized = True
    setattr(whole, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def _nf4(linear: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    count = linear.weight.numel()
    blocks = -(-count // _BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // _NESTED_BLOCK), dtype=torch.float32, device="meta"),
        blocksize=_NESTED_BLOCK,
        code=torch.empty(256, device="meta"),
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device="meta"),
        shape=linear.weight.shape,
        code=torch.empty(16, device="meta"),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=compute_dtype,
        offset=torch.empty((), device="meta"),
        state2=nested,
    )
    with torch.device("meta"):
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype, quant_type="nf4"
        )
    packed = torch.empty((-(-count // 2), 1), dtype=torch.uint8, device="meta")
    layer.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=_BLOCK, quant_type="nf4", bnb_quantized=True
    )
    layer.quant_state, layer.bias = state, linear.bias
    return layer  # type: ignore[no-any-return]


def _int8(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        layer = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0)
        weights = torch.empty(linear.weight.shape, dtype=torch.int8)
        scales = torch.empty(linear.out_features, dtype=torch.float32)
    layer.weight = Int8Params(weights, requires_grad=False, has_fp16_weights=False, CB=weights, SCB=scales)
    layer.state.CB, layer.state.SCB = weights, scales
    layer.bias = linear.bias
    return layer  # type: ignore[no-any-return]


def quantized_storages(module: nn.Module) -> list[torch.Tensor]:
    """What a quantised layer holds on the device besides its parameters: scales, codes, offsets."""
    weight: Any = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    held: list[torch.Tensor] = []
    if state is not None:
        held += [state.absmax, state.code]
        if getattr(state, "nested", False):
            held += [state.offset, state.state2.absmax, state.state2.code]
    own: Any = getattr(module, "state", None)
    if getattr(own, "SCB", None) is not None:
        held.append(own.SCB)
    return held
