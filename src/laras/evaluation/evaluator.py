"""A model over a whole split: exact sums for every example, whatever the batch size and the number of processes.

Only the per-example sums (24 bytes each) and one batch are held; logits exist for one batch's target columns alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from laras.data.collate import PadCollator
from laras.data.masks import IGNORE_INDEX
from laras.evaluation.metrics import ExampleSums, IntArray
from laras.models.step import target_losses
from laras.progress import Observer


class Rows(Protocol):
    """Tokenised rows with `input_ids` and `labels`: a list of dicts or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def evaluate_split(
    model: nn.Module,
    rows: Rows,
    *,
    batch_size: int,
    pad_token_id: int | None,
    device: torch.device,
    observer: Observer,
    shared_rows: int | None = None,
) -> ExampleSums:
    """Scores every row; `laras.evaluation.metrics.score_of` makes the score of the result.

    In a process group each process scores its share of the batches and all return the same sums of the whole. The
    model's modules leave in the training or evaluation mode in which they came.

    Args:
        model: A causal language model on `device`, replicated in every process.
        rows: The split, the same in every process.
        batch_size: Rows a forward pass, at least 1.
        pad_token_id: As for `PadCollator`.
        device: Where this process computes.
        observer: Told how many of this process' rows are done.
        shared_rows: Rows that go to one process together; None: `batch_size`. The same in every process, where
            `batch_size` need not be: one may have less memory left than the others.

    Returns:
        The sums in the order of `rows`. Rows without targets have zeros, and cost no forward pass.

    Raises:
        ValueError: When `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rank, processes = _place()
    sums = ExampleSums.zeros(len(rows))
    order = _longest_first(rows)
    # Rows are shared out before they are cut into batches, so that each has one process whatever its batches are.
    shared = shared_rows or batch_size
    shares = [order[start : start + shared] for start in range(0, len(order), shared)][rank::processes]
    batches = [share[start : start + batch_size] for share in shares for start in range(0, len(share), batch_size)]
    total, done = sum(map(len, batches)), 0
    collate = PadCollator(pad_token_id)
    with _evaluation_mode(model), torch.inference_mode():
        for indices in batches:
            batch = collate([rows[int(index)] for index in indices])
            nll, targets, correct = _row_sums(model, {key: value.to(device) for key, value in batch.items()})
            sums.nll[indices], sums.targets[indices], sums.correct[indices] = nll, targets, correct
            done += len(indices)
            observer.stage_progress(done, total, "rows")
    return _sum_over_processes(sums, device) if processes > 1 else sums


def _row_sums(model: nn.Module, batch: Mapping[str, Tensor]) -> Sequence[np.ndarray[Any, np.dtype[np.float64]]]:
    losses = target_losses(model, batch)
    ones = torch.ones_like(losses.nll_N)
    per_token = torch.stack([losses.nll_N, ones, losses.correct_N.to(ones.dtype)]).double()
    row_sums = per_token.new_zeros(3, batch["labels"].shape[0]).index_add_(1, losses.row_N, per_token)
    return list(row_sums.cpu().numpy())


def _longest_first(rows: Rows) -> IntArray:
    """Indices of the rows that have a target, by falling length: little padding, and the largest batch fails first."""
    lengths = np.zeros(len(rows), dtype=np.int64)
    for index in range(len(rows)):
        labels = np.asarray(rows[index]["labels"])
        if (labels[1:] != IGNORE_INDEX).any():  # the first token is predicted by nothing
            lengths[index] = labels.size
    order = np.argsort(-lengths, kind="stable")
    return order[: np.count_nonzero(lengths)]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # one by one: a module that was frozen in evaluation mode stays so
            module.training = True


def _place() -> tuple[int, int]:
    """This process' rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _sum_over_processes(sums: ExampleSums, device: torch.device) -> ExampleSums:
    """Each row was scored by one process and is zero elsewhere, so the sum is exact."""
    total = torch.from_numpy(np.stack([sums.nll, sums.targets, sums.correct]).astype(np.float64)).to(device)
    dist.all_reduce(total)
    nll, targets, correct = total.cpu().numpy()
    return ExampleSums(nll, targets.astype(np.int64), correct.astype(np.int64))
