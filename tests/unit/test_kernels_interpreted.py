"""The Triton kernels without a GPU: Triton's interpreter runs them on the CPU, beside their plain references.

Needs triton, which torch for the CPU does not bring, and `TRITON_INTERPRET=1` in the environment.
What the interpreter cannot show is whether they compile, and how fast they are: `tests/gpu`.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

from kernel_cases import CASES, TOLERANCES, assert_close
from laras.models.fused import kernels

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton and TRITON_INTERPRET=1",
)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_its_reference_gives(dtype, name):
    from laras.models.fused import triton_kernels

    if name.startswith("cross entropy") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 runs loops whose end is an argument with NumPy below 2.4 only")
    references, call = CASES[name](dtype)
    before = [None if one is None else one.clone() for one in references]
    found = [None if one is None else torch.empty_strided(one.shape, one.stride(), dtype=one.dtype) for one in before]
    for old, new in zip(references, found, strict=True):
        if old is not None:
            new.copy_(old)
    call(kernels, *references)
    call(triton_kernels, *found)
    # The interpreter cuts a float32 off where a GPU rounds it to bfloat16.
    assert_close(name, dtype, references, found, slack=2.0 if dtype == torch.bfloat16 else 1.0)
    assert any(one is not None and not torch.equal(one, old) for one, old in zip(references, before, strict=True))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])  # bfloat16: see above
@pytest.mark.parametrize("inputs", [64, 1536, 4160])
def test_4bit_weights_are_unpacked_bit_for_bit(layers, dtype, inputs):
    pytest.importorskip("bitsandbytes")
    from laras.models.fused.triton_nf4 import unpack_, unpack_refusal
    from nf4_cases import packed_group, unpacked_by_bitsandbytes

    group = packed_group(layers, inputs, "cpu", dtype)
    assert unpack_refusal(group.states, inputs) is None
    found = torch.zeros_like(group.storage)
    unpack_(group.packed, group.states, group.row_starts, group.factors, found)
    assert torch.equal(found, unpacked_by_bitsandbytes(group))


def test_a_group_unpacks_in_one_launch_where_that_gives_its_own_weights(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, inject_adapter_in_model

    from laras.models.fused import triton_nf4
    from laras.models.fused.lora import LoraGroup

    part = torch.nn.Module()
    for name, rows in (("gate", 96), ("up", 64)):
        linear = bitsandbytes.nn.Linear4bit(128, rows, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        linear.weight = bitsandbytes.nn.Params4bit(torch.randn(rows, 128), quant_type="nf4")
        setattr(part, name, linear.to("cpu"))
    part = inject_adapter_in_model(LoraConfig(r=4, target_modules=["gate", "up"]), part)
    group = LoraGroup([part.gate, part.up], torch.float32)
    group.refresh()
    group.load()
    expected = group.storage
    assert group._launch_agrees()
    group.unload()
    group._is_one_launch = True
    group._versions = None
    group.refresh()
    group.load()
    assert torch.equal(group.storage[:, :128], expected[:, :128])
    assert torch.equal(group.storage[:160], expected[:160])
    monkeypatch.setattr(triton_nf4, "unpack_", lambda *_: None)
    assert not group._launch_agrees()
