"""PyTorch's caching allocator in pure Python: what a step really reserves, and whether it fits a capacity.

The sum of the live tensors is not what a process holds: blocks are rounded, cut out of segments and kept for reuse. A
step that reserves far more than it allocates when memory is plentiful still fits a small card, since the allocator
returns its unused segments and tries again before it gives up. So "fits" is decided by a replay at the card's capacity.

Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11, one stream, default settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_MIB = 2**20
MIN_BLOCK_BYTES = 512
_SMALL_BYTES = _MIB  # requests up to this size come from the small pool
_SMALL_SEGMENT_BYTES = 2 * _MIB
_LARGE_SEGMENT_BYTES = 20 * _MIB  # for requests below `_MIN_LARGE_BYTES`
_MIN_LARGE_BYTES = 10 * _MIB
_ROUND_LARGE_BYTES = 2 * _MIB


class CapacityExceeded(Exception):
    """A request does not fit although every unused segment was returned."""

    def __init__(self, request_bytes: int, capacity_bytes: int) -> None:
        super().__init__(f"{request_bytes} bytes do not fit a capacity of {capacity_bytes}")
        self.request_bytes = request_bytes


@dataclass(slots=True, eq=False)
class _Block:
    size: int
    address: int
    small: bool
    before: _Block | None = None  # its neighbours in the segment
    after: _Block | None = None
    free: bool = False


_Pool = list[tuple[int, int, _Block]]  # free blocks, sorted by size and address


def block_bytes(request_bytes: int) -> int:
    """What a request counts in `torch.cuda.memory_allocated`, without the rest of a block that is not split off."""
    return -(-request_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES or MIN_BLOCK_BYTES


class CachingAllocator:
    """Counts what PyTorch's allocator would have allocated and reserved.

    Args:
        capacity_bytes: Most that may be reserved; None is unlimited.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self._small: _Pool = []
        self._large: _Pool = []
        self._segments: dict[int, int] = {}
        self._next_address = 1

    def malloc(self, request_bytes: int) -> _Block:
        """Allocates; returns what `free` wants.

        Raises:
            CapacityExceeded: When it does not fit even after every unused segment was returned.
        """
        size = block_bytes(request_bytes)
        small = size <= _SMALL_BYTES
        pool = self._small if small else self._large
        index = bisect_left(pool, (size,))
        block = pool.pop(index)[2] if index < len(pool) else self._new_segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= MIN_BLOCK_BYTES if small else rest > _SMALL_BYTES:
            after = block.after
            split = _Block(rest, block.address + size, small, block, after, True)
            if after is not None:
                after.before = split
            block.after, block.size = split, size
            insort(pool, (rest, split.address, split))
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: _Block) -> None:
        """Gives a block back to its pool, joined with its free neighbours."""
        self.allocated_bytes -= block.size
        pool = self._small if block.small else self._large
        before, after = block.before, block.after
        if after is not None and after.free:
            pool.pop(bisect_left(pool, (after.size, after.address)))
            _join(block, after)
        if before is not None and before.free:
            pool.pop(bisect_left(pool, (before.size, before.address)))
            _join(before, block)
            block = before
        block.free = True
        insort(pool, (block.size, block.address, block))

    def release_unused(self) -> None:
        """Returns every segment that holds nothing, as `torch.cuda.empty_cache` does."""
        for pool in (self._small, self._large):
            kept = []
            for size, address, block in pool:
                if self._segments.get(address) == size:
                    self.reserved_bytes -= self._segments.pop(address)
                else:
                    kept.append((size, address, block))
            pool[:] = kept

    def layout(self) -> tuple[dict[int, int], list[tuple[int, int]]]:
        """Segments, and free blocks: with the blocks that live, all that decides what the next requests do."""
        return dict(self._segments), [(size, address) for size, address, _ in (*self._small, *self._large)]

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            segment = _SMALL_SEGMENT_BYTES
        elif size < _MIN_LARGE_BYTES:
            segment = _LARGE_SEGMENT_BYTES
        else:
            segment = -(-size // _ROUND_LARGE_BYTES) * _ROUND_LARGE_BYTES
        if self.capacity_bytes is not None and self.reserved_bytes + segment > self.capacity_bytes:
            self.retries += 1
            self.release_unused()
            if self.reserved_bytes + segment > self.capacity_bytes:
                raise CapacityExceeded(size, self.capacity_bytes)
        address = self._next_address
        self._next_address += segment
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._segments[address] = segment
        return _Block(segment, address, small)


def _join(block: _Block, after: _Block) -> None:
    """Makes one block of two neighbours."""
    block.size += after.size
    block.after = after.after
    if after.after is not None:
        after.after.before = block


@dataclass(frozen=True)
class Replay:
    """What the allocator did with a sequence of requests.

    Attributes:
        fits: Nothing failed.
        peak_allocated_bytes: As `torch.cuda.max_memory_allocated` counts; up to the failure where there was one.
        peak_reserved_bytes: As `torch.cuda.max_memory_reserved` counts.
        retries: How often unused segments had to be returned to make room; each costs time.
        allocated_at_first_bytes: Peak of the allocated bytes before the event that `first` names; of all without.
        allocated_after_first_bytes: From there on.
    """

    fits: bool
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    retries: int
    allocated_at_first_bytes: int = 0
    allocated_after_first_bytes: int = 0


def replay(
    events: Sequence[int],
    capacity_bytes: int | None = None,
    *,
    released_at: int | None = None,
    first: int | None = None,
    starts: Sequence[int] = (),
) -> Replay:
    """Runs a sequence of requests through the allocator.

    Args:
        events: `n > 0` allocates n bytes; `-i` frees the i-th allocation, counted from 1.
        capacity_bytes: Most that may be reserved; None is unlimited.
        released_at: Unused segments are returned, and peaks begin again, before the event of this number.
        first: So many events are looked at by themselves too, and those that follow.
        starts: Where steps begin, up to the event that `first` names; those after the first are alike, and what they
            allocate ends with them. When one leaves the allocator as it found it, so would the next, which is not run.
    """
    allocator = CachingAllocator(capacity_bytes)
    blocks: list[Any] = []
    fits, at_first = True, 0
    layout: Any = None
    stops = sorted({0, *starts, *(one for one in (released_at, first) if one is not None), len(events)})
    try:
        for start, end in pairwise(stops):
            if start == first:
                at_first = allocator.peak_allocated_bytes
                allocator.peak_allocated_bytes = allocator.allocated_bytes
            if start == released_at:
                allocator.release_unused()
                allocator.peak_allocated_bytes = allocator.allocated_bytes
                allocator.peak_reserved_bytes = allocator.reserved_bytes
            if start in starts:
                before, layout = layout, allocator.layout()
                if layout == before:
                    blocks += [None] * sum(event > 0 for event in events[start:end])  # freed within the step
                    continue
            _run(allocator, events[start:end], blocks)
    except CapacityExceeded:
        fits = False
    after, reserved = allocator.peak_allocated_bytes, allocator.peak_reserved_bytes
    return Replay(fits, max(at_first, after), reserved, allocator.retries, at_first or after, after)


def _run(allocator: CachingAllocator, events: Sequence[int], blocks: list[Any]) -> None:
    malloc, free, taken = allocator.malloc, allocator.free, blocks.append
    for event in events:
        if event > 0:
            taken(malloc(event))
        else:
            free(blocks[-event - 1])
