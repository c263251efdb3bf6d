"""What several processes of a run do together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from laras.errors import LarasError

_BUCKET_BYTES = 256 * 2**20  # of gradients that are summed at once


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Sums the gradients over the processes, each of which holds those of its own rows.

    Once an optimizer step, after its last micro-batch, so that no process waits for one that does its part again or
    has fewer micro-batches.
    """
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
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
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def raise_in_all(error: LarasError | None) -> NoReturn:
    """Raises the error of the first process that has one in every process; each of them calls this.

    Args:
        error: Of this process, if it has one.
    """
    errors: list[LarasError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    raise next(one for one in errors if one is not None)


def highest(value: int, device: torch.device) -> int:
    """The highest of the values of all processes."""
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)
