"""Optimizers in 8 bits on a GPU: queued steps take upstream's way, and paged states are paged after a resume, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laras.training.optimizers import queue_steps
from laras.training.state import load_optimizer, save_optimizer

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = ((4096, 1024), (512, 64), (16, 8))  # paged, on the device, and too small for 8 bits


def begun(queued: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    from bitsandbytes.optim import PagedAdamW8bit

    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in SHAPES]
    optimizer = PagedAdamW8bit(weights, lr=1e-2)
    return weights, queue_steps(optimizer) if queued else optimizer


def take_steps(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).cuda()
        optimizer.step()


def test_queued_steps_give_the_bits_of_upstream() -> None:
    (one, upstream), (other, queued) = begun(queued=False), begun(queued=True)
    take_steps(one, upstream, range(20))
    take_steps(other, queued, range(20))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_resume_pages_what_was_paged_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    weights, optimizer = begun(queued=True)
    take_steps(weights, optimizer, range(5))
    rest = save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    resumed, fresh = begun(queued=True)
    for weight, saved in zip(resumed, weights, strict=True):
        weight.data.copy_(saved.data)
    before = torch.cuda.memory_allocated()
    load_optimizer(fresh, tmp_path / "optimizer.safetensors", rest)
    assert torch.cuda.memory_allocated() - before < 2 * 2**20  # the paged states are two of 4 MiB

    def paged(of: Any) -> list[bool]:
        states = [of.state[weight]["state1"] for group in of.param_groups for weight in group["params"]]
        return [getattr(state, "is_paged", False) for state in states]

    assert paged(fresh) == paged(optimizer) == [True, False, False]
    take_steps(weights, optimizer, range(5, 10))
    take_steps(resumed, fresh, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))
