"""The rows of an optimizer step are a function of seed, epoch and position, each row once an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

import tiny_training as tiny
from laras.training.batches import TokenRows, TrainBatches


def batches(rows: TokenRows, **changed: Any) -> TrainBatches:
    settings = {
        "micro_rows": 4, "micro_batches": 2, "max_length": 16, "bin_tokens": None, "seed": 1, "pad_token_id": 0,
    } | changed  # fmt: skip
    return TrainBatches(rows, **settings)


ROWS = TokenRows(tiny.rows(50, 3))


def epoch_of(made: TrainBatches, epoch: int) -> list[list[int]]:
    return [[row for micro in made.step(epoch, i).micro_batches for row in micro] for i in range(len(made))]


@pytest.mark.parametrize("packing", [False, True])
def test_every_row_comes_once_an_epoch_in_another_order(packing: bool) -> None:
    made = batches(ROWS, bin_tokens=64 if packing else None)
    first, second = epoch_of(made, 0), epoch_of(made, 1)
    for epoch in (first, second):
        assert sorted(row for step in epoch for row in step) == list(range(50))
    assert first != second
    assert epoch_of(batches(ROWS, bin_tokens=64 if packing else None), 0) == first
    assert epoch_of(batches(ROWS, bin_tokens=64 if packing else None, seed=2), 0) != first


def test_a_step_holds_the_same_rows_however_it_is_cut() -> None:
    steps = [[set(step) for step in epoch_of(batches(ROWS, micro_rows=8 // n, micro_batches=n), 3)] for n in (1, 2, 8)]
    assert steps[0] == steps[1] == steps[2]


def test_rows_of_like_length_share_a_micro_batch() -> None:
    for micro in batches(ROWS, micro_rows=2, micro_batches=8).step(0, 0).micro_batches:
        assert np.ptp(ROWS.lengths[micro]) <= 2


@pytest.mark.parametrize("packing", [False, True])
def test_cutting_loses_no_row_and_collating_no_token(packing: bool) -> None:
    made = batches(ROWS, bin_tokens=64 if packing else None)
    for micro in made.step(0, 0).micro_batches:
        for level in range(8):
            pieces = made.cut(micro, level)
            assert [row for piece in pieces for row in piece] == micro
            labels = [made.collate(piece, level)["labels"][:, 1:] for piece in pieces]
            assert sum(int((one != -100).sum()) for one in labels) == int(ROWS.targets[micro].sum())
        assert all(len(piece) == 1 for piece in made.cut(micro, 7))


def test_a_step_counts_targets_and_tokens_of_all_its_rows() -> None:
    step = batches(ROWS).step(0, 2)
    rows = [row for micro in step.micro_batches for row in micro]
    assert step.tokens == sum(len(ROWS[row]["input_ids"]) for row in rows)
    assert step.targets == sum(int((ROWS[row]["labels"][1:] != -100).sum()) for row in rows)


def test_rows_are_those_of_the_dataset_whatever_its_chunks_and_selection() -> None:
    whole = concatenate_datasets([tiny.rows(5, 1), tiny.rows(1, 2), tiny.rows(7, 3)]).select([12, 3, 5, 0, 0, 8])
    whole = whole.add_column("row", [40, 41, 42, 43, 44, 45])
    read = TokenRows(whole)
    assert len(read) == 6 and read.sources.tolist() == [40, 41, 42, 43, 44, 45]
    for index, row in enumerate(whole):
        found = read[index]
        assert found["input_ids"].tolist() == row["input_ids"] and found["labels"].tolist() == row["labels"]
        assert read.lengths[index] == len(row["input_ids"])
        assert read.targets[index] == sum(label != -100 for label in row["labels"][1:])


def test_a_row_that_is_all_target_has_one_target_less_than_tokens() -> None:
    rows = TokenRows(Dataset.from_dict({"input_ids": [[2, 3, 4], [5]], "labels": [[2, 3, 4], [5]]}))
    assert rows.targets.tolist() == [2, 0]
