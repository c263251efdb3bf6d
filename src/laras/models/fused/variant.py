"""Ways to compute the same result that a benchmark compares on a GPU, one by one.

A run takes the defaults. `benchmarks/throughput.py` replaces `CHOSEN` before it builds a model; nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Each is on or off by itself; all of them give the same losses and gradients, to rounding.

    Attributes:
        whole_heads: Attention's backward takes all heads at once where nothing is checkpointed.
        own_halves: Where it takes halves, each has an output and a gradient of its own, for the kernel copies strided
            ones.
        middle_in_place: Where a layer keeps its input alone, its output takes the place of the hidden states after
            attention, and what attention left is given back before the feed-forward part.
        middle_in_chunks: Backward forms those hidden states again a chunk at a time.
        qkv_again: With 4-bit weights, backward gives query, key and value back after attention's recomputation, and
            computes them again for its gradient: a product more, so that the feed-forward part, where unpacked weights
            weigh most, holds less.
        product_in_up: In a forward that keeps no gate and up, their product takes up's place.
        grouped_sums: The gradients of a group's adapters are summed as two tensors and scaled once, at the end.
        unpack_kernel: One launch unpacks the 4-bit weights of a group into place, where it gives the bits of
            bitsandbytes on those very weights; else bitsandbytes does.
    """

    whole_heads: bool = True
    own_halves: bool = True
    middle_in_place: bool = True
    middle_in_chunks: bool = True
    qkv_again: bool = True
    product_in_up: bool = True
    grouped_sums: bool = True
    unpack_kernel: bool = True


CHOSEN = Variant()
