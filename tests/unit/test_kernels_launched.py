"""A kernel launched directly gets what Triton would give it: the same blocks, numbers and addresses.

Needs triton, which torch for the CPU does not bring, and no GPU: what would be launched is only written down.
"""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernel_cases import CASES, norm

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton, and no TRITON_INTERPRET",
)


class Written:
    """Stands for a compiled kernel: keeps what it is launched with, tensors as their addresses."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[list[Any]] = []

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        blocks, after_hooks = arguments[:6], arguments[9:]
        self.launches.append([one.data_ptr() if hasattr(one, "data_ptr") else one for one in (*blocks, *after_hooks)])


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from laras.models.fused import launching

    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 3,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    found = Written()
    monkeypatch.setattr(driver, "_active", device)
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *_: found)
    monkeypatch.setattr(launching, "_compiled", {})
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_direct_launch_passes_what_triton_passes(written: Written, name: str) -> None:
    from laras.models.fused import triton_kernels

    tensors, call = CASES[name](torch.bfloat16)
    call(triton_kernels, *tensors)  # by Triton, and remembered
    call(triton_kernels, *tensors)
    by_triton, direct = written.launches
    assert direct == by_triton


def test_a_kernel_compiled_otherwise_is_another(written: Written) -> None:
    from laras.models.fused import launching, triton_kernels

    (x, weight, out), _ = norm(torch.bfloat16, 512)
    for warps in (4, 8, 4):
        numbers = (x.stride(0), out.stride(0), 1e-6)
        launching.launch(triton_kernels._norm, (len(x),), (x, weight, out), numbers, (512, 512), num_warps=warps)
    assert len(launching._compiled) == 2
