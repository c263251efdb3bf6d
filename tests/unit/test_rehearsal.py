"""The rehearsal measures the largest batch and leaves no trace in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_oom import Room
from torch import Tensor, nn

import tiny_training as tiny
from laras.models.step import TrainStep, eager_step
from laras.training.batches import TokenRows, TrainBatches
from tiny_training import SCENARIOS, Scenario, StepOf, outcome, train


@pytest.mark.parametrize("name", ["padded", "packed"])
def test_a_rehearsed_run_is_the_same_run_to_the_byte(tmp_path: Path, name: str) -> None:
    train(tmp_path / "plain", SCENARIOS[name], rehearse=False)
    result, _ = train(tmp_path / "rehearsed", SCENARIOS[name], rehearse=True)
    plain, rehearsed = outcome(tmp_path / "plain"), outcome(tmp_path / "rehearsed")
    plain["metrics"] = [{"step": 0, "epoch": 0}, *plain["metrics"]]  # the line with the rehearsal's memory
    assert rehearsed == plain
    assert [event.kind for event in result.events] == ["rehearsal"]
    assert "planned 954 MiB" in result.events[0].detail
    first = json.loads((tmp_path / "rehearsed" / "logs" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["memory/rehearsal_peak_bytes"] > 10**8
    assert first["memory/rehearsal_over_plan"] == pytest.approx(first["memory/rehearsal_peak_bytes"] / 10**9 - 1)


def test_a_batch_that_does_not_fit_is_found_before_the_first_step(tmp_path: Path) -> None:
    result, _ = train(tmp_path, Scenario(8, 1), make_step=Room(tokens=64), rehearse=True)
    assert [(event.step, event.kind) for event in result.events] == [(0, "out_of_memory"), (0, "rehearsal")]


@pytest.mark.parametrize("rehearsals", [1, 3])
def test_the_largest_batch_is_run_until_the_step_holds_all_that_it_will_ever_hold(
    tmp_path: Path, rehearsals: int
) -> None:
    calls = []

    def counted(model: nn.Module) -> TrainStep:
        inner = eager_step(model)

        def step(batch: Any, scale: Tensor) -> Tensor:
            calls.append(batch)
            return inner(batch, scale)

        return StepOf(step, rehearsals=rehearsals)

    result, _ = train(tmp_path, Scenario(8, 1), make_step=counted, rehearse=True)
    assert len(calls) == rehearsals + result.steps


def test_an_eager_step_keeps_nothing_it_is_rehearsed_once_and_gives_nothing_back() -> None:
    step, batch = eager_step(tiny.model()), tiny_batch()
    before = step(batch, torch.tensor(1.0))
    step.release()
    assert step.rehearsals == 1 and torch.equal(step(batch, torch.tensor(1.0)), before)


def tiny_batch() -> dict[str, Tensor]:
    ids_BT = torch.arange(1, 13).view(2, 6)
    return {"input_ids": ids_BT, "labels": ids_BT, "attention_mask": torch.ones_like(ids_BT)}


@pytest.mark.parametrize("packing", [False, True])
def test_the_longest_micro_batch_is_no_smaller_than_any_other(packing: bool) -> None:
    batches = TrainBatches(
        TokenRows(tiny.rows(50, 3)), micro_rows=3, micro_batches=2, max_length=11,
        bin_tokens=33 if packing else None, seed=1, pad_token_id=0,
    )  # fmt: skip
    slots, targets = zip(
        *(
            ((batch := batches.collate(micro))["input_ids"].numel(), int(batches.rows.targets[micro].sum()))
            for index in range(len(batches))
            for micro in batches.step(0, index).micro_batches
        ),
        strict=True,
    )
    largest = batches.longest()
    assert batches.collate(largest)["input_ids"].numel() >= max(slots)
    spared = 0 if packing else int(batches.rows.targets.max())  # the longest row is one of them, whatever it has
    assert int(batches.rows.targets[largest].sum()) >= max(targets) - spared
    assert len(set(largest)) == len(largest)
    assert batch is not None and np.all(batches.rows.lengths <= 11)
