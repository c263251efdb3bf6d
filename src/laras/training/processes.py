"""What several processes of a run do together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 256 * 2**20  # of gradients that are summed at once


def sum_gradients(model: nn.Module) -> None:
    """Sums the gradients over the processes, each of which holds those of its own rows.

    Once an optimizer step, after its last micro-batch, so that no process waits for one that does its part again or
    has fewer micro-batches.
    """
    bucket: list[Tensor] = []
    size = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (bucket[0].dtype != parameter.grad.dtype or size > _BUCKET_BYTES):
            _all_reduce(bucket)
            bucket, size = [], 0
        bucket.append(parameter.grad)
        size += parameter.grad.numel() * parameter.grad.element_size()
    _all_reduce(bucket)


def _all_reduce(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, reduced in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(reduced.view_as(tensor))
