"""One launch that unpacks the 4-bit weights of linear layers with one input into their places beside their adapters.

bitsandbytes needs four launches a layer (scales, offset, weights, a copy into place) and two for the adapters. The
arithmetic is the same, in the same order and without fused multiply-adds, so the bits are too. Shapes: N outputs of all
layers, K inputs, R ranks; the storage is that of `laras.models.fused.lora`. Imported on CUDA only.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from laras.models.fused.launching import launch

_MOST_SOURCES = 3
_BLOCK = 2048


@triton.jit
def _unpack_row(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, nested_code_ptr, code_ptr, target, row, column, inside, K,
    SCALED: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    element = row * K + column
    byte = tl.load(packed_ptr + element // 2, mask=inside, other=0).to(tl.int32)
    index = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // SCALED
    scale = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
    absmax = tl.load(nested_code_ptr + scale) * tl.load(nested_ptr + block // NESTED, mask=inside, other=0.0)
    value = tl.load(code_ptr + index) * (absmax + tl.load(offset_ptr))
    tl.store(target + column, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _unpack(
    packed_0, absmax_0, nested_0, offset_0, packed_1, absmax_1, nested_1, offset_1, packed_2, absmax_2, nested_2,
    offset_2, nested_code_ptr, code_ptr, factors_ptr, out_ptr, factors_stride, out_stride, K, N, R, row_1, row_2,
    SCALED: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    target = out_ptr + row * out_stride
    if row >= N:  # A of the adapters
        below = tl.load(factors_ptr + (row - N) * factors_stride + column, mask=inside, other=0.0)
        tl.store(target + column, below, mask=inside)
    else:
        if row < row_1:
            _unpack_row(
                packed_0, absmax_0, nested_0, offset_0, nested_code_ptr, code_ptr, target, row, column, inside, K,
                SCALED, NESTED,
            )  # fmt: skip
        elif row < row_2:
            _unpack_row(
                packed_1, absmax_1, nested_1, offset_1, nested_code_ptr, code_ptr, target, row - row_1, column, inside,
                K, SCALED, NESTED,
            )  # fmt: skip
        else:
            _unpack_row(
                packed_2, absmax_2, nested_2, offset_2, nested_code_ptr, code_ptr, target, row - row_2, column, inside,
                K, SCALED, NESTED,
            )  # fmt: skip
        if tl.program_id(1) == 0:  # B, scaled, transposed
            rank = tl.arange(0, RANKS)
            beside = tl.load(factors_ptr + rank * factors_stride + K + row, mask=rank < R, other=0.0)
            tl.store(target + K + rank, beside, mask=rank < R)


def unpack_refusal(states: Sequence[Any], inputs: int) -> str | None:
    """Why the kernel does not take weights of these quantisation states; None when it does."""
    if len(states) > _MOST_SOURCES:
        return f"{len(states)} layers, at most {_MOST_SOURCES}"
    if any(one.quant_type != "nf4" or not one.nested for one in states):
        return "not NF4 with double quantisation"
    first = states[0]
    if any((one.blocksize, one.state2.blocksize) != (first.blocksize, first.state2.blocksize) for one in states):
        return "block sizes differ"
    if inputs % 2:
        return f"{inputs} inputs, an odd number"
    alike = all(torch.equal(one.code, first.code) and torch.equal(one.state2.code, first.state2.code) for one in states)
    return None if alike else "code books differ"


def unpack_(
    packed: Sequence[Tensor], states: Sequence[Any], row_starts: Sequence[int], factors: Tensor, storage: Tensor
) -> None:
    """Fills a storage (N + R, K + R), but for its last corner, which nothing reads.

    Args:
        packed: The 4-bit weights of one to three layers.
        states: Their `bitsandbytes.functional.QuantState`, for which `unpack_refusal` is None.
        row_starts: First row of each layer, and N.
        factors: (R, K + N): A of all adapters, and beside it B^T, scaled.
        storage: Is written.
    """
    outputs, ranks = row_starts[-1], factors.shape[0]
    inputs = factors.shape[1] - outputs
    sources: list[Tensor] = []
    for index in range(_MOST_SOURCES):
        which = min(index, len(states) - 1)
        state = states[which]
        sources += [packed[which], state.absmax, state.state2.absmax, state.offset]
    ends = [*row_starts[1:], outputs, outputs]
    first = states[0]
    launch(
        _unpack, (outputs + ranks, triton.cdiv(inputs, _BLOCK)),
        (*sources, first.state2.code, first.code, factors, storage),
        (factors.stride(0), storage.stride(0), inputs, outputs, ranks, ends[0], ends[1]),
        (first.blocksize, first.state2.blocksize, _BLOCK, triton.next_power_of_2(ranks)),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
