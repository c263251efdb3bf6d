"""Every Triton kernel gives what its plain reference gives, on strided tensors and widths that are no power of two."""

from __future__ import annotations

import pytest
import torch

from laras.models.fused import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOKENS = 37
# Of the largest value: one rounding to bfloat16 is 2^-8, and a result may pass two; fp32 sums differ in their order.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=list(TOLERANCES), ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def strided(rows, columns, dtype, seed):
    """Values in the first columns of a wider buffer, as the fused layers hold them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns + 16, generator=generator).to(dtype)[:, :columns]


def on_gpu(tensor):
    """The same values and strides on the GPU."""
    target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return target.copy_(tensor)


def both(kernel, tensors, *others):
    """Runs the reference on the CPU and the kernel on copies; the tensors are what either left in them."""
    copies = [None if one is None else on_gpu(one) for one in tensors]
    kernel(*tensors, *others)
    kernel(*copies, *others)
    return [(one, copy) for one, copy in zip(tensors, copies, strict=True) if one is not None]


def assert_close(pairs, tolerance):
    for reference, found in pairs:
        largest = reference.abs().max().float()
        assert (found.cpu().float() - reference.float()).abs().max() <= tolerance * largest


@pytest.mark.parametrize("width", [512, 1536, 3584])
def test_norm(dtype, width):
    x, weight, out = strided(TOKENS, width, dtype, 0), strided(1, width, dtype, 1)[0], strided(TOKENS, width, dtype, 2)
    pairs = both(lambda x, w, out: kernels.rms_norm_(x, w, 1e-6, out), [x, weight, out])
    assert_close(pairs, TOLERANCES[dtype])


@pytest.mark.parametrize("writes", [False, True])
def test_norm_backward_adds_to_the_total(dtype, writes):
    x, gradient, total, out = (strided(TOKENS, 1536, dtype, seed) for seed in range(4))
    weight = strided(1, 1536, dtype, 4)[0]
    before = total.clone()
    pairs = both(
        lambda x, w, g, total, out: kernels.rms_norm_backward_(x, w, 1e-6, g, total, out),
        [x, weight, gradient, total, out if writes else None],
    )
    assert_close(pairs, TOLERANCES[dtype])
    assert not torch.equal(before, total)


def test_the_norm_of_backward_may_take_the_place_of_its_gradient(dtype):
    x, gradient, total = (strided(TOKENS, 1536, dtype, seed) for seed in range(3))
    weight = strided(1, 1536, dtype, 4)[0]
    pairs = both(
        lambda x, w, g, total: kernels.rms_norm_backward_(x, w, 1e-6, g, total, g), [x, weight, gradient, total]
    )
    assert_close(pairs, TOLERANCES[dtype])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("heads", "channels"), [(12, 128), (2, 128), (14, 64)])
def test_rope_in_place(dtype, heads, channels, sign):
    rows = strided(TOKENS, heads * channels, dtype, 0)
    angles = torch.outer(torch.arange(TOKENS) % 20, 1e4 ** (-torch.arange(channels // 2) * 2 / channels)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(rows, cos, sin):
        view = rows.unflatten(1, (heads, channels))
        kernels.rope_(view, cos, sin, view, sign)

    before = rows.clone()
    assert_close(both(rotate, [rows, cos, sin]), 2 * TOLERANCES[dtype])  # the reference rounds twice
    assert not torch.equal(before, rows)


@pytest.mark.parametrize("width", [1408, 8960])
def test_swiglu_forward_and_backward(dtype, width):
    both_halves, gradient = strided(TOKENS, 2 * width, dtype, 0), strided(TOKENS, width, dtype, 1)
    out = strided(TOKENS, width, dtype, 2)
    halves = both(lambda x, out: kernels.swiglu_(x[:, :width], x[:, width:], out), [both_halves, out])
    assert_close(halves, TOLERANCES[dtype])
    pairs = both(lambda x, g: kernels.swiglu_backward_(x[:, :width], x[:, width:], g), [both_halves, gradient])
    assert_close(pairs, TOLERANCES[dtype])


@pytest.mark.parametrize("vocabulary", [5003, 151936])
def test_cross_entropy_and_its_gradient(dtype, vocabulary):
    logits = 4 * strided(TOKENS, vocabulary, dtype, 0)
    targets = torch.randint(0, vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(1))
    targets[::5] = kernels.IGNORE_INDEX
    targets[1], targets[2] = 0, vocabulary - 1
    pairs = both(kernels.cross_entropy_, [logits, targets, torch.full((TOKENS,), 9.0)])
    assert_close(pairs, TOLERANCES[dtype])
    ignored = pairs[2][1].cpu()[::5]
    assert torch.equal(ignored, torch.zeros_like(ignored))
    assert not pairs[0][1].cpu()[::5].any()
