"""Which rows make each optimizer step, and how they are cut into micro-batches.

The rows of a step are a function of seed, epoch and position alone: no process count, micro-batch size or resume moves
one. A micro-batch is a list of row indices until it is collated, so that it can be cut finer at any time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch import Tensor

from laras.data.collate import PadCollator
from laras.data.masks import IGNORE_INDEX
from laras.data.pack import PackCollator, PackShape, pack_documents, pack_shape

MicroBatch = list[int]  # row indices


class TokenRows:
    """Tokenised rows (`input_ids`, `labels`) as numpy views into their Arrow table, without copies.

    Attributes:
        table: The rows.
        lengths: Tokens of each row.
        targets: Tokens of each row that carry loss; the first token of a row is predicted by nothing.
        sources: Where each row is in the user's data, counted from 0.
    """

    def __init__(self, rows: Dataset) -> None:
        whole: pa.Table = rows.with_format("arrow")[:]
        self.table = whole.select(["input_ids", "labels"])
        known = "row" in whole.column_names
        self.sources = whole.column("row").to_numpy() if known else np.arange(len(whole))
        self._chunks: list[tuple[Any, Any, Any]] = []
        self._starts: list[int] = []
        lengths, targets, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for batch in self.table.to_batches():
            ids, labels = batch.column(0), batch.column(1)
            offsets = np.concatenate([[0], np.cumsum(ids.value_lengths().to_numpy(zero_copy_only=False))])
            label_values = labels.flatten().to_numpy(zero_copy_only=False)
            counted = np.concatenate([[0], np.cumsum(label_values != IGNORE_INDEX)])
            first = np.minimum(offsets[:-1] + 1, offsets[1:])
            self._starts.append(start)
            self._chunks.append((offsets, ids.flatten().to_numpy(zero_copy_only=False), label_values))
            lengths.append(np.diff(offsets))
            targets.append(counted[offsets[1:]] - counted[first])
            start += len(ids)
        self.lengths, self.targets = np.concatenate(lengths), np.concatenate(targets)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chunk = bisect_right(self._starts, index) - 1
        offsets, ids, labels = self._chunks[chunk]
        begin, end = offsets[index - self._starts[chunk]], offsets[index - self._starts[chunk] + 1]
        return {"input_ids": ids[begin:end].copy(), "labels": labels[begin:end].copy()}  # Arrow's own are read-only


@dataclass(frozen=True)
class StepRows:
    """One optimizer step over all processes."""

    micro_batches: tuple[MicroBatch, ...]
    targets: int  # tokens that carry loss
    tokens: int  # without padding


class TrainBatches:
    """The micro-batches of every optimizer step of a run.

    Args:
        rows: The training split.
        micro_rows: Rows of a padded micro-batch.
        micro_batches: Micro-batches of an optimizer step over all processes.
        max_length: Tokens of the longest row.
        bin_tokens: Whole documents are put into bins of so many tokens, or of the longest row; None pads rows.
        seed: Of the order.
        pad_token_id: Fills what is not a row.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        micro_rows: int,
        micro_batches: int,
        max_length: int,
        bin_tokens: int | None,
        seed: int,
        pad_token_id: int | None,
    ) -> None:
        self.rows = rows
        self._micro_rows, self._micro_batches, self._seed = micro_rows, micro_batches, seed
        self._max_length, self._pad_token_id = max_length, pad_token_id
        self._bin_tokens = max(bin_tokens or 0, max_length)
        self._bins: list[MicroBatch] | None = None
        self._shape: PackShape | None = None
        self._epoch_order: tuple[int, Any] | None = None
        if bin_tokens is not None:
            lengths = rows.lengths.tolist()
            self._bins = pack_documents(lengths, self._bin_tokens, seed)
            self._shape = pack_shape(self._bins, lengths, rows.targets.tolist(), self._bin_tokens, max_length)

    def __len__(self) -> int:
        """Optimizer steps of an epoch."""
        units, unit = (len(self.rows), self._micro_rows) if self._bins is None else (len(self._bins), 1)
        return math.ceil(units / (unit * self._micro_batches))

    def step(self, epoch: int, index: int) -> StepRows:
        """The rows of optimizer step `index` of an epoch, both counted from 0."""
        order_of_epoch = self._order(epoch)
        if self._bins is None:
            # A step holds the same rows however it is cut; within it, rows of like length share a micro-batch.
            size = self._micro_rows * self._micro_batches
            chosen = order_of_epoch[index * size : (index + 1) * size]
            order = chosen[np.argsort(-self.rows.lengths[chosen], kind="stable")].tolist()
            micro = [order[start : start + self._micro_rows] for start in range(0, len(order), self._micro_rows)]
        else:
            size = self._micro_batches
            chosen = order_of_epoch[index * size : (index + 1) * size]
            micro = [self._bins[number] for number in chosen]
        every = [row for one in micro for row in one]
        return StepRows(tuple(micro), int(self.rows.targets[every].sum()), int(self.rows.lengths[every].sum()))

    def _order(self, epoch: int) -> Any:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            units = len(self.rows) if self._bins is None else len(self._bins)
            self._epoch_order = (epoch, generator.permutation(units))
        return self._epoch_order[1]

    def longest(self) -> MicroBatch:
        """The micro-batch that needs the most memory: of bins, which are all as long, that with most targets; of rows,
        the longest one beside those with most targets, since nothing keeps them from meeting in a step.
        """
        if self._bins is not None:
            return max(self._bins, key=lambda one: (int(self.rows.targets[one].sum()), len(one)))
        first = int(self.rows.lengths.argmax())
        by_targets = np.argsort(-self.rows.targets, kind="stable")
        return [first, *by_targets[by_targets != first][: self._micro_rows - 1].tolist()]

    def cut(self, micro: MicroBatch, level: int) -> list[MicroBatch]:
        """A micro-batch in pieces of at most 1 / 2^level of the planned size; a single row stays whole."""
        if self._bins is None:
            size = max(1, self._micro_rows >> level)
            return [micro[start : start + size] for start in range(0, len(micro), size)]
        budget = self._budget(level)
        pieces: list[MicroBatch] = [[]]
        used = 0
        for row in micro:
            length = int(self.rows.lengths[row])
            if pieces[-1] and used + length > budget:
                pieces.append([])
                used = 0
            pieces[-1].append(row)
            used += length
        return pieces

    def size(self, level: int) -> str:
        """The size of a micro-batch at a level, for people."""
        if self._bins is None:
            return f"{max(1, self._micro_rows >> level)} rows"
        return f"{self._budget(level)} tokens"

    def collate(self, rows: Sequence[int], level: int = 0) -> dict[str, Tensor]:
        """The batch of a micro-batch, or of a piece of one cut at `level`, on CPU."""
        examples = [self.rows[row] for row in rows]
        if self._shape is None:
            return PadCollator(self._pad_token_id)(examples)
        return self._collator(int(self.rows.lengths[list(rows)].sum()), level, self._shape)(examples)

    def _budget(self, level: int) -> int:
        return max(1, self._bin_tokens >> level)

    def _collator(self, tokens: int, level: int, shape: PackShape) -> PackCollator:
        """The shape of the run, halved up to `level` times while it holds so many tokens: few shapes to compile."""
        halvings = 0
        while halvings < level and self._budget(halvings + 1) >= tokens:
            halvings += 1
        budget = self._budget(halvings)
        return PackCollator(
            budget_tokens=budget,
            max_documents=shape.max_documents + (-(-budget // self._max_length) if halvings else 0),
            max_length=self._max_length,
            max_targets=min(shape.max_targets, budget),
            pad_token_id=self._pad_token_id,
        )
