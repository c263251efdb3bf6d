"""Groups of 4-bit linear layers, and what bitsandbytes makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RANKS = 16
ROWS = (192, 64, 72)  # the last one's blocks of scales do not fill a block of their own


@dataclass(frozen=True)
class Group:
    packed: list[Tensor]
    states: list[Any]
    row_starts: list[int]
    factors: Tensor
    storage: Tensor


def packed_group(layers: int, inputs: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Group:
    """Layers of `ROWS` outputs; adapters of random values."""
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator().manual_seed(0)
    packed, states, starts = [], [], [0]
    for rows in ROWS[:layers]:
        weight = (torch.randn(rows, inputs, generator=generator) * (1 + rows / 100)).to(dtype).to(device)
        data, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
        packed.append(data)
        states.append(state)
        starts.append(starts[-1] + rows)
    factors = torch.randn(RANKS, inputs + starts[-1], generator=generator).to(dtype).to(device)
    storage = torch.zeros(starts[-1] + RANKS, inputs + RANKS, dtype=dtype, device=device)
    return Group(packed, states, starts, factors, storage)


def unpacked_by_bitsandbytes(group: Group) -> Tensor:
    """The storage as `LoraGroup.load` fills it without the kernel."""
    from bitsandbytes.functional import dequantize_4bit

    storage, outputs = group.storage.clone(), group.row_starts[-1]
    inputs = storage.shape[1] - RANKS
    for data, state, start in zip(group.packed, group.states, group.row_starts, strict=False):
        rows = dequantize_4bit(data, state)
        storage[start : start + rows.shape[0], :inputs].copy_(rows)
    storage[outputs:, :inputs].copy_(group.factors[:, :inputs])
    storage[:outputs, inputs:].copy_(group.factors[:, inputs:].t())
    return storage
