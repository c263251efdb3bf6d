"""Documents into bins of one fixed number of tokens, and bins into batches whose shapes never change.

A batch is one row of `budget` tokens. Positions restart at each document and `cu_seqlens` names their borders, so that
attention keeps them apart. What a bin leaves free is filled by dummy documents without labels. Every shape is fixed for
the run: nothing recompiles, and a step can be captured once and replayed. Shapes: T tokens of the budget, M documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any

from laras.data.masks import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

_BALANCED_SLACK = 1.02  # bins of which at most 2% of the slots are free


@dataclass(frozen=True)
class PackShape:
    """The fixed shape that holds every bin of a run."""

    budget_tokens: int
    max_documents: int  # of a bin, dummy documents included
    max_targets: int  # target tokens of a bin, rounded up to 128


def pack_documents(lengths: Sequence[int], budget_tokens: int, seed: int) -> list[list[int]]:
    """Divides documents into bins of at most `budget_tokens`, as few and as alike as they can be.

    First the longest documents are spread over as many bins as the tokens need, each into the emptiest; bins then hold
    about equally many documents, and attention costs about the same in each. Where documents are too large for that,
    best fit decreasing takes over.

    Args:
        lengths: Tokens of each document, each between 1 and `budget_tokens`.
        budget_tokens: Slots of a bin.
        seed: Orders documents of one length, and the bins.

    Returns:
        Bins of indices into `lengths`; every index is in exactly one.

    Raises:
        ValueError: With the first document that no bin holds.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= budget_tokens:
            raise ValueError(f"document {index} has {length} tokens; a bin holds 1 to {budget_tokens}")
    if not lengths:
        return []
    random = Random(seed)
    order = list(range(len(lengths)))
    random.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    fewest = -(-sum(lengths) // budget_tokens)
    counts = range(fewest, max(fewest + 1, int(fewest * _BALANCED_SLACK)) + 1)
    balanced = (_emptiest_first(order, lengths, budget_tokens, count) for count in counts)
    bins = next((found for found in balanced if found is not None), None)
    best_fit = _best_fit(order, lengths, budget_tokens)
    if bins is None or len(best_fit) < len(bins):
        bins = best_fit
    random.shuffle(bins)
    return bins


def _emptiest_first(order: Sequence[int], lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """`count` balanced bins, or None when a document fits into none of them."""
    heap = [(0, number) for number in range(count)]  # used slots and number of each bin
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in order:
        used, number = heappop(heap)
        if used + lengths[index] > budget:
            return None
        bins[number].append(index)
        heappush(heap, (used + lengths[index], number))
    return bins


def _best_fit(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    free: list[tuple[int, int]] = []  # free slots and number of each bin, sorted
    bins: list[list[int]] = []
    for index in order:
        place = bisect_left(free, (lengths[index], -1))
        if place < len(free):
            room, number = free.pop(place)
        else:
            room, number = budget, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(free, (room - lengths[index], number))
    return bins


def pack_shape(
    bins: Sequence[Sequence[int]], lengths: Sequence[int], targets: Sequence[int], budget_tokens: int, max_length: int
) -> PackShape:
    """The shape that holds every one of the bins.

    Args:
        bins: As `pack_documents` gives them.
        lengths: Tokens of each document.
        targets: Labels of each document that are not ignored.
        budget_tokens: Slots of a bin.
        max_length: Tokens that a document, a dummy one too, has at most.
    """
    documents = most_targets = 0
    for one in bins:
        free = budget_tokens - sum(lengths[index] for index in one)
        documents = max(documents, len(one) + -(-free // max_length))
        most_targets = max(most_targets, sum(targets[index] for index in one))
    rounded = max(128, -(-most_targets // 128) * 128)
    return PackShape(budget_tokens, max(1, documents), min(rounded, budget_tokens))


@dataclass(frozen=True)
class PackCollator:
    """Lays the documents of one bin one after another.

    Attributes:
        budget_tokens: Slots of the batch.
        max_documents: Fixes the shape of `cu_seqlens`.
        max_length: Longest document in tokens, which the dummy ones respect; None for the whole budget.
        max_targets: Fixes the shape of `target_positions`; None leaves that out.
        pad_token_id: Of the dummy documents; any id does, as they carry no label.
    """

    budget_tokens: int
    max_documents: int
    max_length: int | None = None
    max_targets: int | None = None
    pad_token_id: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates `input_ids` and `labels` of a bin's rows.

        Returns:
            On CPU: `input_ids`, `labels` (-100 in the filling, and at the first token of a document, which nothing
            predicts) and `position_ids`, int64 of shape (1, T); `cu_seqlens` int32 of shape (M + 1,), its last value
            repeated; with `max_targets` also `target_positions` int64 of shape (`max_targets`,): where the hidden
            states that predict a label are, filled with the last position, which predicts none.

        Raises:
            ValueError: When the rows do not fit the shape, or a row has not one label a token.
        """
        import torch

        input_ids = torch.full((1, self.budget_tokens), self.pad_token_id or 0, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        position_ids = torch.zeros_like(input_ids)
        ends = [0]
        for index, row in enumerate(rows):
            length, start = len(row["input_ids"]), ends[-1]
            if len(row["labels"]) != length:
                raise ValueError(f"row {index} of the bin has {length} tokens and {len(row['labels'])} labels")
            if start + length > self.budget_tokens:
                raise ValueError(f"rows of {start + length} tokens or more do not fit a bin of {self.budget_tokens}")
            input_ids[0, start : start + length] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            labels[0, start : start + length] = torch.as_tensor(row["labels"], dtype=torch.int64)
            labels[0, start] = IGNORE_INDEX
            ends.append(start + length)
        while ends[-1] < self.budget_tokens:
            ends.append(min(self.budget_tokens, ends[-1] + (self.max_length or self.budget_tokens)))
        if len(ends) > self.max_documents + 1:
            raise ValueError(f"{len(ends) - 1} documents do not fit a batch of at most {self.max_documents}")
        for start, end in pairwise(ends):
            position_ids[0, start:end] = torch.arange(end - start)
        ends += [self.budget_tokens] * (self.max_documents + 1 - len(ends))
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
        }
        if self.max_targets is not None:
            batch["target_positions"] = self._target_positions(labels)
        return batch

    def _target_positions(self, labels: Tensor) -> Tensor:
        import torch

        found = (labels[0, 1:] != IGNORE_INDEX).nonzero().squeeze(1)
        if self.max_targets is None or len(found) > self.max_targets:
            raise ValueError(f"{len(found)} target tokens do not fit a batch of at most {self.max_targets}")
        positions = torch.full((self.max_targets,), self.budget_tokens - 1, dtype=torch.int64)
        positions[: len(found)] = found
        return positions
