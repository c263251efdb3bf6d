"""Quantised linear layers on the meta device: bitsandbytes' own modules, with packed weights that hold no data.

Quantising needs a GPU and the weights; planning has neither. The shapes and types of what quantising leaves are known,
and bitsandbytes' operations run on meta tensors, so the recorded step is that of the real layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from laras.models.counting import register_work
from laras.models.recording import register_kernel_memory, register_operation
from laras.planning.step_forms import INT8_CALLS, NF4_CALLS, UNPACKING_CALLS
from laras.planning.work import WorkCounter

_BLOCK = 64  # weights that share a scale
_NESTED_BLOCK = 256  # scales that share a scale of their own
# Inputs of a layer that LLM.int8() keeps in half precision: at most 0.1% of the columns up to 13 billion parameters.
# Source: Dettmers et al. 2022, "LLM.int8()", section 4.
_OUTLIER_SHARE = 0.001
_INT8_AS_BYTES = 2  # elements of a product of int8: it is no faster than one in half precision


def quantize_on_meta(model: nn.Module, kind: Literal["nf4", "int8"], compute_dtype: torch.dtype) -> None:
    """Replaces the linear layers of a model on meta, the head excepted, as loading it quantised would.

    Args:
        model: Changed in place.
        kind: NF4 with double quantisation, or LLM.int8().
        compute_dtype: Type of the arithmetic.

    Source: bitsandbytes 0.50 `nn/modules.py`, transformers 5.17 `integrations/bitsandbytes.py`.
    """
    if kind == "int8":
        _register_int8()
    else:
        _register_nf4()
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
    weight = Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=_BLOCK, quant_type="nf4", bnb_quantized=True
    )
    weight.__deepcopy__ = lambda _: weight  # which DoRA asks for, and which bitsandbytes makes of CPU tensors only
    layer.weight = weight
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


def quantizing_bytes(module: nn.Module) -> tuple[int, ...]:
    """What quantising a layer on the device takes besides what it leaves: its weights whole, and their scales in fp32.

    Source: bitsandbytes 0.50 `nn/modules.py` (`_quantize`), `functional.py` (`quantize_4bit`).
    """
    weight: Any = module._parameters.get("weight")  # an adapter's layer shows that of the layer inside as well
    state = getattr(weight, "quant_state", None)
    if state is not None:
        count = state.shape.numel()
        return count * state.dtype.itemsize, 4 * -(-count // _BLOCK)
    if weight is not None and getattr(getattr(module, "state", None), "SCB", None) is not None:
        return (2 * weight.numel(),)
    return ()


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


# ------------------------------------------------------------ NF4


def _unpacked_bytes(input_TK: Tensor, _: Tensor, shape: Sequence[int], *__: Any, **___: Any) -> int:
    """The weights of a layer in the input's type, with their scales in fp32."""
    count = shape[0] * shape[1]
    return count * input_TK.element_size() + 4 * -(-count // _BLOCK)


def _count_nf4_product(counter: WorkCounter, input_TK: Tensor, packed: Tensor, shape: Sequence[int], *_: Any) -> None:
    rows, size = input_TK.numel() // input_TK.shape[-1], input_TK.element_size()
    counter.called(NF4_CALLS, in_graph=True)
    counter.launched(_unpacked_bytes(input_TK, packed, shape) + packed.numel())
    counter.multiplied(1, rows, shape[1], shape[0], size)


def _count_unpacking(counter: WorkCounter, packed: Tensor, *rest: Any) -> None:
    _scales, _block, _type, shape, dtype = rest
    counter.called(UNPACKING_CALLS, in_graph=True)
    counter.launched(packed.numel() + dtype.itemsize * shape[0] * shape[1])


def _register_nf4() -> None:
    """With more rows than a few, the product unpacks the weights first.

    Source: bitsandbytes 0.50 `backends/cuda/ops.py`, `gemm_4bit`.
    """
    import bitsandbytes  # noqa: F401 - defines the operations

    op: Any = torch.ops.bitsandbytes.gemm_4bit.default
    register_kernel_memory(op, _unpacked_bytes)
    register_work(op, _count_nf4_product)
    unpacking: Any = torch.ops.bitsandbytes.dequantize_4bit.default
    register_work(unpacking, _count_unpacking)


# ------------------------------------------------------------ LLM.int8()


def _outliers(inputs: int) -> int:
    return max(1, round(_OUTLIER_SHARE * inputs))


def _quantised_rows(half_TK: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows in int8, their scales, and the columns that stay in half precision."""
    rows_TK = half_TK.new_empty(half_TK.shape, dtype=torch.int8)
    scales_T = half_TK.new_empty(half_TK.numel() // half_TK.shape[-1], dtype=torch.float32)
    if threshold == 0.0:
        return rows_TK, scales_T, None
    return rows_TK, scales_T, half_TK.new_empty(_outliers(half_TK.shape[-1]), dtype=torch.int64)


def _quantised_rows_inside(half_TK: Tensor, threshold: float = 0.0) -> int:
    """Absolute values and whether each is an outlier."""
    return half_TK.numel() * (half_TK.element_size() + 1) if threshold > 0.0 else 0


def _mixed_product(input_TK: Tensor, rows_TK: Tensor, weights_NK: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The layer's output, and the columns of the input that were outliers, kept for backward."""
    output = input_TK.new_empty((*rows_TK.shape[:-1], weights_NK.shape[0]))
    columns = rest[2] if len(rest) > 2 else None
    kept = columns.numel() if columns is not None else 0
    return output, input_TK.new_empty((rows_TK.numel() // rows_TK.shape[-1], kept))


def _mixed_product_inside(input_TK: Tensor, rows_TK: Tensor, weights_NK: Tensor, *_: Any) -> int:
    """The int32 product and its fp16 version, while the result in the input's type is made."""
    results = rows_TK.numel() // rows_TK.shape[-1] * weights_NK.shape[0]
    return results * (4 + (0 if input_TK.dtype is torch.float16 else 2))


def _count_mixed_product(counter: WorkCounter, input_TK: Tensor, rows_TK: Tensor, weights_NK: Tensor, *_: Any) -> None:
    rows, (columns, inner) = rows_TK.numel() // rows_TK.shape[-1], weights_NK.shape
    counter.called(INT8_CALLS, in_graph=True)
    counter.launched(rows * columns * (4 + 2 * input_TK.element_size()) + columns * inner)
    counter.multiplied(1, rows, inner, columns, _INT8_AS_BYTES)


def _register_int8() -> None:
    """What bitsandbytes' int8 operations return and take on a GPU; their own shapes depend on data.

    Source: bitsandbytes 0.50 `backends/cuda/ops.py`, `backends/default/ops.py`.
    """
    import bitsandbytes  # noqa: F401 - defines the operations

    ops: Any = torch.ops.bitsandbytes
    register_operation(ops.int8_vectorwise_quant.default, _quantised_rows)
    register_kernel_memory(ops.int8_vectorwise_quant.default, _quantised_rows_inside)
    register_operation(ops.int8_mixed_scaled_mm.default, _mixed_product)
    register_kernel_memory(ops.int8_mixed_scaled_mm.default, _mixed_product_inside)
    register_work(ops.int8_mixed_scaled_mm.default, _count_mixed_product)
