"""A bound on the memory that decoding what a stranger wrote may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ADDRESS_SPACE = Path("/proc/self/statm")  # its first number: pages of this process' address space


@contextmanager
def memory_limit(extra_bytes: int) -> Iterator[None]:
    """Lets the process grow by so much inside the block; an allocation beyond it is a MemoryError.

    The bound is the kernel's, on the address space, so that it holds for libraries in C too. Linux only: elsewhere the
    block runs without it.
    """
    try:
        import resource

        pages = int(_ADDRESS_SPACE.read_text(encoding="ascii").split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError, ValueError, IndexError):
        yield
        return
    wanted = pages * resource.getpagesize() + extra_bytes
    known = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
