"""Bad numbers never reach the weights, and are told as what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_training as tiny
from laras.errors import TrainingAborted
from laras.models.step import TrainStep, eager_step
from laras.records import RunResult
from laras.training.checkpoints import list_checkpoints
from laras.training.numbers import LossWatch, Stopping
from laras.whole_folder import require_whole
from tiny_training import Scenario, StepOf, parameters, train


class Poison:
    """Turns loss, or a gradient, of the steps named into something that is not finite."""

    def __init__(self, steps: set[int], what: str, value: float = math.nan) -> None:
        self.steps, self.what, self.value, self.calls = steps, what, value, 0
        self.weights: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: nn.Module) -> TrainStep:
        inner = eager_step(model)

        def step(batch: Any, scale: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.weights.append(parameters(model))
            loss = inner(batch, scale)
            if self.calls in self.steps:
                if self.what == "loss":
                    return loss * self.value
                next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = self.value
            return loss

        return StepOf(step)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_is_skipped_counted_and_logged_as_what_it_is(tmp_path: Path, what: str, value: float) -> None:
    poison, observer = Poison({3}, what, value), tiny.Recorder()
    result, trained = train(tmp_path, Scenario(8, 1), make_step=poison, observer=observer)
    weights = poison.weights
    assert all(torch.equal(weights[3][name], value) for name, value in weights[2].items())  # untouched by step 3
    assert not all(torch.equal(weights[4][name], value) for name, value in weights[3].items())
    assert all(torch.isfinite(value).all() for value in parameters(trained).values())
    assert [(event.step, event.kind) for event in result.events] == [(3, "skipped_step")]
    assert any("skipped step" in text for text in observer.warnings)
    line = json.loads((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[2])
    assert line["step"] == 3
    assert (line["loss"] is None) == (what == "loss")
    assert line["grad_norm"] is None or what == "loss"
    assert result.train_loss is not None and math.isfinite(result.train_loss)


def test_the_optimizer_does_not_move_in_a_bad_step_either(tmp_path: Path) -> None:
    train(tmp_path / "bad", Scenario(8, 1, choices={"save_steps": 1}), make_step=Poison({3}, "loss"))
    before, after = (tmp_path / "bad" / "checkpoints" / f"step-{n}" for n in (4, 5))
    assert before.exists() and after.exists()
    train(tmp_path / "short", Scenario(8, 1, choices={"save_steps": 1}, config={"save_total_limit": 9}),
          make_step=Poison({3}, "gradient"))  # fmt: skip
    two, three = (tmp_path / "short" / "checkpoints" / f"step-{n}" / "optimizer.safetensors" for n in (2, 3))
    assert two.read_bytes() == three.read_bytes()


def test_persistent_trouble_ends_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    scenario = Scenario(8, 1, config={"max_skipped_steps": 2, "num_train_epochs": 4})
    with pytest.raises(TrainingAborted, match="2 steps in a row, up to step 6") as caught:
        train(tmp_path, scenario, make_step=Poison({2, 5, 6, 7}, "loss"))
    assert int(caught.value.exit_code) == 6
    result = RunResult.load(tmp_path)
    assert result.status == "failed"
    assert [event.kind for event in result.events] == ["skipped_step"] * 3 + ["failed"]
    step, newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert step == 3
    require_whole(newest, "")
    resumed, _ = train(tmp_path, scenario, resume=True)  # the cause is gone
    assert resumed.status == "finished"


def test_a_run_that_learned_in_no_step_is_not_finished(tmp_path: Path) -> None:
    few = Scenario(8, 1, config={"max_steps": 3})
    with pytest.raises(TrainingAborted, match="none of the 3 steps had a finite loss and gradient") as caught:
        train(tmp_path, few, make_step=Poison({1, 2, 3}, "loss"))
    assert caught.value.hint and RunResult.load(tmp_path).status == "failed"
    assert not (tmp_path / "final").exists()


def test_a_sudden_rise_is_flagged_once_it_can_be_told_from_noise(tmp_path: Path) -> None:
    watch = LossWatch()
    assert not any(watch.is_spike(2.0 + 0.1 * math.sin(n)) for n in range(40))
    assert watch.is_spike(6.0)
    assert not watch.is_spike(2.0)
    assert not any(LossWatch().is_spike(loss) for loss in (1.0, 9.0, 1.0, 9.0))  # too early
    poison = Poison({25}, "loss", 3.0)
    result, _ = train(tmp_path, Scenario(8, 1, config={"num_train_epochs": 10}), make_step=poison)
    assert [(event.step, event.kind) for event in result.events] == [(25, "loss_spike")]


def test_early_stopping_counts_from_the_last_real_improvement() -> None:
    stopping = Stopping(patience=2, min_delta=0.1)
    assert [stopping.should_stop(loss) for loss in (1.0, 0.95, 0.85, 0.8, math.nan)] == [False] * 4 + [True]
    assert stopping.reference == 0.85
    never = Stopping(patience=None, min_delta=0.0)
    assert not any(never.should_stop(1.0) for _ in range(100))
