"""Out of memory: the step is finished with smaller micro-batches and the gradient of a run that had room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laras.training.trainer as trainer_module
import laras.training.validation as validation_module
import tiny_training as tiny
from laras.errors import OutOfMemoryError
from laras.models.step import TrainStep, eager_step
from laras.record_base import digest_of
from laras.records import PlanRevision, RunResult, TrainPlan
from laras.training.checkpoints import list_checkpoints
from tiny_training import Scenario, StepOf, metrics, outcome, parameters, train

PACKED = {"packing": True}


class Room:
    """A step that runs out of memory on batches of more than `tokens` slots, before or after its backward pass."""

    def __init__(self, tokens: int = 10**9, fail_calls: tuple[int, ...] = (), after: bool = False) -> None:
        self.tokens, self.fail_calls, self.after, self.calls, self.failures = tokens, fail_calls, after, 0, 0
        self.gradients: list[torch.Tensor] = []

    def __call__(self, model: nn.Module) -> TrainStep:
        inner = eager_step(model)

        def step(batch: Any, scale: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            fails = batch["input_ids"].numel() > self.tokens or self.calls in self.fail_calls
            if not fails or self.after:
                loss = inner(batch, scale)
            if fails:
                self.failures += 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return loss

        return StepOf(step)


@pytest.fixture
def first_gradient(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradients of every step, before they are clipped."""
    seen: list[torch.Tensor] = []
    original = trainer_module.LarasTrainer._gradient_norm

    def spy(self: Any) -> torch.Tensor:
        seen.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters() if p.requires_grad]))
        return original(self)

    monkeypatch.setattr(trainer_module.LarasTrainer, "_gradient_norm", spy)
    return seen


ONE_STEP = {"max_steps": 1, "num_train_epochs": 1}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("after", [False, True], ids=["in forward", "after backward"])
def test_a_failure_at_any_micro_step_leaves_the_gradient_as_it_was(
    tmp_path: Path, first_gradient: list[torch.Tensor], packed: bool, after: bool
) -> None:
    scenario = Scenario(4, 3, config=ONE_STEP, choices=PACKED if packed else {})
    train(tmp_path / "roomy", scenario)
    expected = first_gradient.pop()
    for call in (1, 2, 3):
        room = Room(fail_calls=(call,), after=after)
        train(tmp_path / f"tight-{call}", scenario, make_step=room)
        assert room.failures == 1
        difference = (first_gradient.pop() - expected).norm() / expected.norm()
        assert difference <= 1e-6


@pytest.mark.parametrize(("packed", "slots"), [(False, 16), (True, 16)])
def test_repeated_failures_go_down_to_what_fits_and_keep_it(
    tmp_path: Path, first_gradient: list[torch.Tensor], packed: bool, slots: int
) -> None:
    scenario = Scenario(4, 2, choices=PACKED if packed else {}, config={"num_train_epochs": 1})
    train(tmp_path / "roomy", scenario)
    expected = list(first_gradient)
    first_gradient.clear()
    observer, room = tiny.Recorder(), Room(tokens=slots)
    result, _ = train(tmp_path / "tight", scenario, make_step=room, observer=observer)
    assert (first_gradient[0] - expected[0]).norm() / expected[0].norm() <= 1e-6
    events = [event.detail for event in result.events if event.kind == "out_of_memory"]
    assert room.failures == len(events) == 2  # both in the first step; the size is kept
    first, last = ("64 tokens -> 32 tokens", "32 tokens -> 16 tokens") if packed else ("4 rows -> 2", "2 rows -> 1")
    assert first in events[0] and last in events[1]
    assert len([text for text in observer.warnings if "out of memory" in text]) == 2


class Holding(Room):
    """Keeps memory between steps, as a captured graph does, and has room for smaller pieces once that is given back."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.released = 0

    def __call__(self, model: nn.Module) -> TrainStep:
        inner = super().__call__(model)

        def step(batch: Any, scale: torch.Tensor) -> torch.Tensor:
            assert self.released == self.failures, "tried again beside what is kept"
            return inner(batch, scale)

        def release() -> None:
            self.released += 1

        return StepOf(step, release)


def test_what_a_step_keeps_is_given_back_before_smaller_pieces_are_tried(tmp_path: Path) -> None:
    holding = Holding(tokens=16)
    result, _ = train(tmp_path, Scenario(4, 2, config={"num_train_epochs": 1}), make_step=holding)
    assert result.status == "finished"
    assert holding.released == holding.failures == 2


def test_a_run_that_ran_out_of_memory_ends_where_one_with_room_does(tmp_path: Path) -> None:
    scenario = Scenario(8, 1)
    _, roomy = train(tmp_path / "roomy", scenario)
    _, tight = train(tmp_path / "tight", scenario, make_step=Room(tokens=32))
    before = parameters(roomy)
    for name, value in parameters(tight).items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-5)
    for one, other in zip(metrics(tmp_path / "roomy"), metrics(tmp_path / "tight"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_smaller_size_survives_a_resume(tmp_path: Path) -> None:
    scenario = Scenario(8, 1)
    train(tmp_path, scenario, make_step=Room(tokens=32))
    room = Room(tokens=32)
    result, _ = train(tmp_path, scenario, resume=3, make_step=room)
    assert room.failures == 0 and room.calls > 0
    assert [event.kind for event in result.events].count("out_of_memory") >= 1


class Died(Exception):
    """Stands for the end of the process."""


class RoomUntil(Room):
    """One that dies some steps after memory ran out, before any checkpoint knows of it."""

    def __call__(self, model: nn.Module) -> TrainStep:
        inner = super().__call__(model)

        def step(batch: Any, scale: torch.Tensor) -> torch.Tensor:
            if self.failures and self.calls > 6:
                raise Died
            return inner(batch, scale)

        return StepOf(step)


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_killed_before_the_next_checkpoint_does_not_try_the_size_that_failed_again(
    tmp_path: Path, packed: bool
) -> None:
    scenario = Scenario(4, 2, choices=PACKED if packed else {})
    with pytest.raises(Died):
        train(tmp_path, scenario, make_step=RoomUntil(tokens=16))
    assert list_checkpoints(tmp_path / "checkpoints") == []
    plan, revision = scenario.train_plan(), PlanRevision.load(tmp_path)
    assert (revision.parent_digest, revision.train_split_level) == (plan.digest(), 2)
    assert revision.micro_batch == ("16 tokens" if packed else "1 rows")
    assert revision.per_device_eval_batch_size == 4
    levels = [(change.step, change.train_split_level) for change in revision.changes]
    assert levels == [(0, 1), (0, 2)] and "same gradient" in revision.changes[0].reason
    room = Room(tokens=16)
    result, _ = train(tmp_path, scenario, make_step=room)  # no checkpoint: it starts again
    assert room.failures == 0 and room.calls > 0
    assert result.parent_digest == revision.digest()
    assert PlanRevision.load(tmp_path) == revision


def test_without_trouble_the_plan_has_no_revision_and_one_of_another_plan_does_not_count(tmp_path: Path) -> None:
    result, _ = train(tmp_path / "roomy", Scenario(8, 1))
    assert not (tmp_path / "roomy" / "records" / "revision.json").exists()
    assert result.parent_digest == Scenario(8, 1).train_plan().digest()
    train(tmp_path / "tight", Scenario(8, 1), make_step=Room(tokens=32))
    room = Room()
    result, _ = train(tmp_path / "tight", Scenario(4, 2), make_step=room)
    assert result.parent_digest == Scenario(4, 2).train_plan().digest()
    assert room.calls == 12  # 6 steps of two whole micro-batches


def test_the_revision_of_a_plan_that_an_older_version_wrote_is_in_force_until_the_plan_is_changed(
    tmp_path: Path,
) -> None:
    scenario, run = Scenario(8, 1), tmp_path / "run"
    train(run, scenario, make_step=Room(tokens=32))
    path = scenario.train_plan().save(run)
    content = json.loads(path.read_text())
    del content["choices"]["cuda_graph"], content["warnings"]  # as from before these fields were there
    path.write_text(json.dumps(content))
    PlanRevision.load(run).model_copy(update={"parent_digest": digest_of(content)}).save(run)
    room = Room(tokens=32)
    train(run, scenario, make_step=room, plan=TrainPlan.load(run))
    assert room.failures == 0 and room.calls > 0
    path.write_text(json.dumps({**content, "total_steps": 2}))
    room = Room(tokens=32)
    train(run, scenario, make_step=room, plan=TrainPlan.load(run))
    assert room.failures > 0


def test_a_disk_that_takes_no_record_costs_the_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, run_dir: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PlanRevision, "save", full)
    observer = tiny.Recorder()
    result, _ = train(tmp_path, Scenario(8, 1), make_step=Room(tokens=32), observer=observer)
    assert result.status == "finished"
    assert "the new size is not recorded: No space left on device" in observer.warnings


@pytest.mark.parametrize("packed", [False, True])
def test_an_example_that_alone_does_not_fit_is_named(tmp_path: Path, packed: bool) -> None:
    with pytest.raises(OutOfMemoryError, match=r"row \d+ alone \(1[01] tokens\)") as caught:
        train(tmp_path, Scenario(4, 2, choices=PACKED if packed else {}), make_step=Room(tokens=8))
    assert int(caught.value.exit_code) == 6
    assert "max_length below 1" in (caught.value.hint or "")
    assert RunResult.load(tmp_path).status == "failed"


def test_no_step_takes_memory_for_the_optimizer_states_and_no_room_for_them_is_said_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, at = torch.optim.AdamW._init_group, []
    zeros_like = torch.zeros_like

    def watched(self: Any, *given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros_like", lambda *a, **n: (at.append(len(steps.steps)), zeros_like(*a, **n))[1])
            return original(self, *given)

    steps = tiny.Recorder()
    monkeypatch.setattr(torch.optim.AdamW, "_init_group", watched)
    train(tmp_path / "roomy", Scenario(8, 1), observer=steps)
    assert set(at) == {0} and len(steps.steps) == 6

    def full(self: Any, *given: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", full)
    with pytest.raises(OutOfMemoryError, match=r"for the optimizer's states: .*2\.00 GiB\n") as caught:
        train(tmp_path / "full", Scenario(8, 1), observer=(observer := tiny.Recorder()))
    assert int(caught.value.exit_code) == 6 and "paged_adamw_8bit" in (caught.value.hint or "")
    assert observer.steps == [] and RunResult.load(tmp_path / "full").status == "failed"


def test_an_optimizer_that_runs_out_of_memory_ends_the_run_clearly_and_a_resume_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "roomy", Scenario(8, 1))
    original, calls = torch.optim.AdamW.step, iter(range(10))

    def fails(self: Any, *given: Any) -> Any:
        if next(calls) == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fails)
        with pytest.raises(OutOfMemoryError, match="no room on the device for the optimizer's step"):
            train(tmp_path / "full", Scenario(8, 1))
    train(tmp_path / "full", Scenario(8, 1), resume=True)
    assert outcome(tmp_path / "full") == outcome(tmp_path / "roomy")


def test_an_evaluation_that_runs_out_of_memory_uses_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "roomy", Scenario(8, 1))
    original, sizes = validation_module.evaluate_split, []

    def tight(*args: Any, **options: Any) -> Any:
        sizes.append(options["batch_size"])
        if options["batch_size"] > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(*args, **options)

    monkeypatch.setattr(validation_module, "evaluate_split", tight)
    result, _ = train(tmp_path / "tight", Scenario(8, 1))
    assert sizes == [4, 2, 1, 1]
    assert len([event for event in result.events if "evaluation batch" in event.detail]) == 2
    revision = PlanRevision.load(tmp_path / "tight")
    assert (revision.train_split_level, revision.eval_split_level, revision.per_device_eval_batch_size) == (0, 2, 1)
    assert [change.step for change in revision.changes] == [3, 3]
    for one, other in zip(metrics(tmp_path / "roomy"), metrics(tmp_path / "tight"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
