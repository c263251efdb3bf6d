"""A bound on the memory that decoding what a stranger wrote may take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ADDRESS_SPACE = Path("/proc/self/statm")  # its first number: pages of this process' address space
_LOCK = threading.Lock()
_inside: list[tuple[int, int]] = []  # the limits as they were before the first block; one entry for each open block


@contextmanager
def memory_limit(extra_bytes: int) -> Iterator[None]:
    """Lets the process grow by so much inside the block; an allocation beyond it is a MemoryError.

    The bound is the kernel's, on the address space, so that it holds for libraries in C too. It is one of the whole
    process: where blocks of several threads overlap, that of the newest holds, and none when the last has ended. Linux
    only: elsewhere the block runs without it.
    """
    try:
        import resource

        pages = int(_ADDRESS_SPACE.read_text(encoding="ascii").split()[0])
    except (ImportError, OSError, ValueError, IndexError):
        yield
        return
    with _LOCK:
        before = _inside[0] if _inside else resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + extra_bytes
        known = [limit for limit in before if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), before[1]))
        _inside.append(before)
    try:
        yield
    finally:
        with _LOCK:
            _inside.pop()
            if not _inside:
                resource.setrlimit(resource.RLIMIT_AS, before)
