"""The Triton kernels compile for GPUs that are not there: down to their machine code, with Triton's own assembler.

Needs triton, which torch for the CPU does not bring. What this cannot show is what they compute: `tests/gpu`, and
without a GPU `test_kernels_interpreted`.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from kernel_cases import CASES, triton_versions

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton, and no TRITON_INTERPRET",
)
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8",
    torch.int32: "*i32",
}  # fmt: skip


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request, monkeypatch):
    """Launches compile instead; the names of the kernels, their sizes and their shared memory, in bytes."""
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
        found.append((kernel.__name__, len(binary.asm["cubin"]), binary.metadata.shared))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_compiles(compiled, name):
    tensors, call = CASES[name](torch.bfloat16)
    call(triton_versions(), *tensors)
    assert compiled
    assert all(size > 0 for _, size, _ in compiled)


@pytest.mark.parametrize(("compiled", "limit_kib"), [(80, 163), (86, 99), (89, 99), (90, 227)], indirect=["compiled"])
@pytest.mark.parametrize("name", ["64 channels", "128 channels", "256 channels"])
def test_attention_fits_the_shared_memory_of_a_gpu(compiled, monkeypatch, limit_kib, name):
    from laras.models.fused import triton_attention

    monkeypatch.setattr(triton_attention, "_shared_bytes", lambda _: limit_kib * 1024)
    for direction in ("attention", "attention backward"):
        tensors, call = CASES[f"{direction}, {name}"](torch.bfloat16)
        call(triton_versions(), *tensors)
    assert [kernel for kernel, *_ in compiled] == ["_forward", "_backward_to_queries", "_backward_to_keys"]
    assert max(shared for *_, shared in compiled) <= limit_kib * 1024


@pytest.mark.parametrize("layers", [1, 3])
def test_the_unpacking_of_4bit_weights_compiles(compiled, layers):
    pytest.importorskip("bitsandbytes")
    from laras.models.fused.triton_nf4 import unpack_
    from nf4_cases import packed_group

    group = packed_group(layers, 1536, "cpu")
    unpack_(group.packed, group.states, group.row_starts, group.factors, group.storage)
    assert [name for name, size, _ in compiled if size > 0] == ["_unpack"]
