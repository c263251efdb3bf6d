"""Device memory that has run out: the error, what gives memory back, the same work with less at a time, or the end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from laras.errors import OutOfMemoryError

# Raised by the CUDA allocator; an allocation that fails on CPU ends in RuntimeError or in the kernel's killer.
DeviceOutOfMemory = torch.cuda.OutOfMemoryError
Result = TypeVar("Result")


def free_caches() -> None:
    """Gives back what the allocator holds without use. Call it outside the `except` block, whose traceback holds on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_fewer_rows(work: Callable[[int], Result], rows: int, on_smaller: Callable[[int, int, str], None]) -> Result:
    """The result of `work(rows)`, or of half as many rows at a time as often as memory runs out.

    Args:
        work: Gets how many rows to take at a time.
        rows: To begin with, at least 1.
        on_smaller: Gets the old and the new number of rows and the allocator's first line.

    Raises:
        DeviceOutOfMemory: One row at a time does not fit.
    """
    while True:
        try:
            return work(rows)
        except DeviceOutOfMemory as error:
            if rows == 1:
                raise
            text = str(error).partition("\n")[0]
        free_caches()
        on_smaller(rows, rows // 2, text)
        rows //= 2


@contextmanager
def required(what: str) -> Iterator[None]:
    """The block takes memory that no smaller batch makes less.

    Raises:
        OutOfMemoryError: It does not fit.
    """
    try:
        yield
        return
    except DeviceOutOfMemory as error:
        text = str(error).partition("\n")[0]
    raise OutOfMemoryError(
        f"no room on the device for {what}: {text}",
        hint="another program may hold its memory (`laras doctor` shows what is free); else take less in a new run: "
        "load_in_4bit: true, optim: paged_adamw_8bit, a lower lora_r",
    )
