"""The Triton kernels compile for GPUs that are not there: down to their machine code, with Triton's own assembler.

Needs triton, which torch for the CPU does not bring. What this cannot show is what they compute: `tests/gpu`, and
without a GPU `test_kernels_interpreted`.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from kernel_cases import CASES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton, and no TRITON_INTERPRET",
)
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request, monkeypatch):
    """Launches compile instead; the names of the kernels and their sizes in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    found = []

    def compile_only(kernel, *args, grid, warmup, **options):
        signature, constants = {}, {}
        for parameter, value in zip(kernel.params, args, strict=True):
            if parameter.is_constexpr:
                signature[parameter.name], constants[(parameter.num,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(kernel, signature, constants)
        binary = triton.compile(source, target=GPUTarget("cuda", request.param, 32), options=options)
        found.append((kernel.__name__, len(binary.asm["cubin"])))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_compiles(compiled, name):
    from laras.models.fused import triton_kernels

    tensors, call = CASES[name](torch.bfloat16)
    call(triton_kernels, *tensors)
    assert compiled
    assert all(size > 0 for _, size in compiled)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_unpacking_of_4bit_weights_compiles(compiled, layers):
    pytest.importorskip("bitsandbytes")
    from laras.models.fused.triton_nf4 import unpack_
    from nf4_cases import packed_group

    group = packed_group(layers, 1536, "cpu")
    unpack_(group.packed, group.states, group.row_starts, group.factors, group.storage)
    assert [name for name, size in compiled if size > 0] == ["_unpack"]
