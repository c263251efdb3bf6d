"""PyTorch's caching allocator in pure Python: what a step really reserves, and whether it fits a capacity.

The sum of the live tensors is not what a process holds: blocks are rounded, cut out of segments and kept for reuse. A
step that reserves far more than it allocates when memory is plentiful still fits a small card, since the allocator
returns its unused segments and tries again before it gives up. So "fits" is decided by a replay at the card's capacity.

Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11, one stream, default settings.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(slots=True)
class _Block:
    size: int
    segment: int  # address of the segment that it is cut from
    before: int | None  # addresses of its neighbours in the segment
    after: int | None
    small: bool
    free: bool = False


def block_bytes(request_bytes: int) -> int:
    """What a request counts in `torch.cuda.memory_allocated`, without the rest of a block that is not split off."""
    return max(MIN_BLOCK_BYTES, -(-request_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)


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
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small? → sorted (size, address)
        self._blocks: dict[int, _Block] = {}
        self._segments: dict[int, int] = {}
        self._next_address = 1

    def malloc(self, request_bytes: int) -> int:
        """Allocates; returns the address.

        Raises:
            CapacityExceeded: When it does not fit even after every unused segment was returned.
        """
        size = block_bytes(request_bytes)
        small = size <= _SMALL_BYTES
        pool = self._free[small]
        index = bisect.bisect_left(pool, (size, 0))
        address = pool.pop(index)[1] if index < len(pool) else self._new_segment(size, small)
        block = self._blocks[address]
        block.free = False
        rest = block.size - size
        if rest >= MIN_BLOCK_BYTES if small else rest > _SMALL_BYTES:
            self._split(address, block, size)
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return address

    def free(self, address: int) -> None:
        """Gives a block back to its pool, joined with its free neighbours."""
        block = self._blocks[address]
        self.allocated_bytes -= block.size
        if block.after is not None and self._blocks[block.after].free:
            self._join(address, block.after)
        if block.before is not None and self._blocks[block.before].free:
            before = block.before
            self._join(before, address, listed=True)
            address, block = before, self._blocks[before]
        block.free = True
        bisect.insort(self._free[block.small], (block.size, address))

    def release_unused(self) -> None:
        """Returns every segment that holds nothing, as `torch.cuda.empty_cache` does."""
        for pool in self._free.values():
            kept = []
            for size, address in pool:
                if self._segments.get(address) == size:
                    self.reserved_bytes -= self._segments.pop(address)
                    del self._blocks[address]
                else:
                    kept.append((size, address))
            pool[:] = kept

    def _new_segment(self, size: int, small: bool) -> int:
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
        self._blocks[address] = _Block(segment, address, None, None, small)
        return address

    def _split(self, address: int, block: _Block, size: int) -> None:
        rest = address + size
        self._blocks[rest] = _Block(block.size - size, block.segment, address, block.after, block.small, free=True)
        if block.after is not None:
            self._blocks[block.after].before = rest
        bisect.insort(self._free[block.small], (block.size - size, rest))
        block.after, block.size = rest, size

    def _join(self, address: int, after: int, *, listed: bool = False) -> None:
        """Makes one block of two neighbours; the free one of the two leaves the pool's list."""
        block, other = self._blocks[address], self._blocks[after]
        free_size, free_address = (block.size, address) if listed else (other.size, after)
        pool = self._free[block.small]
        pool.pop(bisect.bisect_left(pool, (free_size, free_address)))
        block.size += other.size
        block.after = other.after
        if other.after is not None:
            self._blocks[other.after].before = address
        del self._blocks[after]


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
    events: Iterable[int],
    capacity_bytes: int | None = None,
    *,
    released_at: int | None = None,
    first: int | None = None,
) -> Replay:
    """Runs a sequence of requests through the allocator.

    Args:
        events: `n > 0` allocates n bytes; `-i` frees the i-th allocation, counted from 1.
        capacity_bytes: Most that may be reserved; None is unlimited.
        released_at: Unused segments are returned, and peaks begin again, before the event of this number.
        first: So many events are looked at by themselves too, and those that follow.
    """
    allocator = CachingAllocator(capacity_bytes)
    addresses: list[int] = []
    fits, at_first = True, 0
    try:
        for number, event in enumerate(events):
            if number == first:
                at_first = allocator.peak_allocated_bytes
                allocator.peak_allocated_bytes = allocator.allocated_bytes
            if number == released_at:
                allocator.release_unused()
                allocator.peak_allocated_bytes = allocator.allocated_bytes
                allocator.peak_reserved_bytes = allocator.reserved_bytes
            if event > 0:
                addresses.append(allocator.malloc(event))
            else:
                allocator.free(addresses[-event - 1])
    except CapacityExceeded:
        fits = False
    after, reserved = allocator.peak_allocated_bytes, allocator.peak_reserved_bytes
    return Replay(fits, max(at_first, after), reserved, allocator.retries, at_first or after, after)
