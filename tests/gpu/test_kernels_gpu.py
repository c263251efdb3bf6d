"""Every Triton kernel gives what its plain reference gives, on strided tensors and widths that are no power of two."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import CASES, TOLERANCES, assert_close
from laras.models.fused import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(tensor):
    """The same values and strides on the GPU."""
    target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return target.copy_(tensor)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_its_reference_gives(dtype, name):
    references, call = CASES[name](dtype)
    before = [None if one is None else one.clone() for one in references]
    found = [None if one is None else on_gpu(one) for one in references]
    call(kernels, *references)
    call(kernels, *found)
    assert_close(name, dtype, references, found)
    assert any(one is not None and not torch.equal(one, old) for one, old in zip(references, before, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_launched_directly_gives_the_same_bits(monkeypatch, name):
    from laras.models.fused import launching

    monkeypatch.setattr(launching, "_compiled", {})
    tensors, call = CASES[name](torch.bfloat16)
    runs = [[None if one is None else on_gpu(one) for one in tensors] for _ in range(2)]
    call(kernels, *runs[0])  # by Triton, and remembered
    call(kernels, *runs[1])
    assert len(launching._compiled) == 1
    for by_triton, direct in zip(*runs, strict=True):
        assert by_triton is None or torch.equal(by_triton, direct)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "bf16"])
def test_rows_without_a_target_have_no_loss_and_no_gradient(dtype):
    (logits, targets, nll), call = CASES["cross entropy 5003"](dtype)
    found = [on_gpu(logits), on_gpu(targets), on_gpu(nll)]
    call(kernels, *found)
    assert not found[0].cpu()[::5].any()
    assert not found[2].cpu()[::5].any()


@pytest.mark.parametrize("names", [("q",), ("gate", "up"), ("q", "k", "v")])
def test_4bit_weights_are_unpacked_bit_for_bit(names):
    pytest.importorskip("bitsandbytes")
    from laras.models.fused.triton_nf4 import unpack_, unpack_refusal
    from nf4_cases import packed_group, unpacked_by_bitsandbytes

    group = packed_group(len(names), 1536, "cuda")
    assert unpack_refusal(group.states, 1536) is None
    found = torch.zeros_like(group.storage)
    unpack_(group.packed, group.states, group.row_starts, group.factors, found)
    assert torch.equal(found, unpacked_by_bitsandbytes(group))
