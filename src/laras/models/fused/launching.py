"""Launches of Triton kernels, with what Triton finds out at each launch remembered. Imported on CUDA only.

Triton binds the arguments, specialises and looks the kernel up at every launch, in Python, and asks the driver about
every pointer: tens of microseconds, more than many kernels of a layer run. Here a compiled kernel is kept by what it
was specialised for, and called as Triton calls it, with addresses for tensors.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.runtime import driver

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    **options: Any,
) -> None:
    """Runs a kernel whose parameters are pointers, then numbers, then constants.

    Args:
        kernel: Of `triton.jit`.
        grid: Blocks, up to three numbers.
        tensors: On one GPU; their first elements are what the pointers point to.
        numbers: Sizes, strides and factors.
        constants: Values of its `constexpr` parameters.
        options: Of the compilation, such as `num_warps`; the same names at every launch of a kernel.
    """
    places = [one.data_ptr() for one in tensors]
    # Triton specialises by types, by addresses that are multiples of 16, and by numbers that are, or are 1.
    aligned = tuple([place % 16 == 0 for place in places])
    device = tensors[0].device.index
    dtypes = tuple([one.dtype for one in tensors])
    key = (id(kernel), device, numbers, constants, dtypes, aligned, *options.values())
    found = _compiled.get(key)
    if found is None:
        # None where Triton interprets, which therefore launches every time.
        _compiled[key] = kernel[grid](*tensors, *numbers, *constants, **options)
        return
    # As `triton/runtime/jit.py` of Triton 3.6 and 3.7 ends, without hooks; torch's Inductor calls `run` so, too.
    found.run(
        *grid, *(1,) * (3 - len(grid)), driver.active.get_current_stream(device), found.function,
        found.packed_metadata, None, None, None, *places, *numbers, *constants,
    )  # fmt: skip
