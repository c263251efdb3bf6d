"""What a person reads while stages work, without colour."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from laras.cli import view as view_module
from laras.cli.view import LiveView, PlainView, open_view
from laras.config import RunConfig
from laras.planning.architecture import model_spec_from_config
from laras.planning.catalogue import find_gpu
from laras.planning.planner import plan_training
from laras.progress import StepReport, ValidationReport
from laras.progress_bar import ProgressBar

SPEC = model_spec_from_config(
    {
        "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
        "intermediate_size": 1024, "vocab_size": 1000,
    },
    "m",
)  # fmt: skip


def report(step: int, loss: float | None = 1.25) -> StepReport:
    return StepReport(
        step=step,
        total_steps=10,
        epoch=0.5,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens_per_s=1234.5,
        eta_s=75,
        memory_bytes=3 * 2**30,
        memory_planned_bytes=4 * 2**30,
    )


def validation(without: int, patience: int | None = 5) -> ValidationReport:
    return ValidationReport(
        step=5,
        loss=0.5,
        perplexity=1.65,
        token_accuracy=0.71,
        is_best=without == 0,
        evaluations_without_improvement=without,
        patience=patience,
    )


def test_plain_lines_say_what_each_validation_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView() as view:
        for item in (validation(0), validation(1), validation(2, patience=None)):
            view.validated(item)
        view.warning("disk is nearly full")
        view.training_finished("finished")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("71.0%")[1].strip() for line in lines[:3]] == [
        "new best",
        "no improvement (1/5)",
        "no improvement",
    ]
    assert max(map(len, lines[:3])) <= 80
    assert lines[3:] == ["warning: disk is nearly full", "training finished"]


def test_plain_progress_is_a_line_every_few_seconds_and_the_last_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(view_module.time, "monotonic", lambda: clock[0])
    view = PlainView()
    view.stage_started("reading")
    for second in range(1, 13):
        clock[0] = 100.0 + second
        view.stage_progress(second, 12, "rows")
    clock[0] += 0.1
    view.step_finished(report(9))
    view.step_finished(report(10, loss=None))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["reading", "  reading: 5 of 12 rows", "  reading: 10 of 12 rows"]
    assert len(lines) == 4
    assert "10/10" in lines[3] and "loss -" in lines[3] and "memory 3.00 GiB, planned 4.00 GiB" in lines[3]


def test_live_view_keeps_lines_above_one_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    view = LiveView()
    columns = view._progress.columns
    view._progress = Progress(
        *columns, console=Console(file=screen, force_terminal=True, color_system=None, width=140), transient=True
    )
    with view:
        view.stage_started("reading")
        view.stage_progress(3, None, "rows")
        view._progress.refresh()
        view.message("a [bracket] stays as it is")
        view.step_finished(report(3))
        view._progress.refresh()
        view.validated(validation(0))
        view.training_finished("finished")
    shown = screen.getvalue()
    for text in ("3 rows", "a [bracket] stays as it is", "3/10  loss 1.2500", "1,234 tokens/s", "new best", "finished"):
        assert text in shown


def test_the_live_view_is_for_terminals_only() -> None:
    assert isinstance(open_view(), PlainView)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_cuts_the_least_important_numbers_only(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        view_module, "Console", lambda **_: Console(file=shown, width=columns, force_terminal=True, color_system=None)
    )
    with LiveView() as view:
        view._begin("training", 10)
        view.step_finished(report(3))
        view._progress.refresh()
    line = next(text for text in reversed(shown.getvalue().splitlines()) if "loss" in text)
    assert "training" in line and "3/10  loss 1.2500" in line
    assert ("1 min 15 s left" in line) == (columns >= 80) and ("memory 3.00 GiB, planned 4.00 GiB" in line) == (
        columns >= 120
    )


def test_the_clock_of_the_training_goes_on_through_a_validation() -> None:
    with LiveView() as view:
        view.step_finished(report(3))
        (training,) = view._progress.tasks
        view.stage_progress(1, 4, "rows")
        assert [task.description for task in view._progress.tasks if task.visible] == ["validating"]
        view.step_finished(report(4))
        assert view._progress.tasks == [training] and training.visible and training.completed == 4


def test_plain_lines_break_a_long_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "_SILENCE_S", 0.5)
    with PlainView() as view:
        view.stage_started("loading the model")
        time.sleep(1.6)
    assert re.search(r"^  loading the model: 1\.\d s so far$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("kind", [PlainView, LiveView])
def test_what_libraries_print_while_stages_work_stays_off_standard_output(
    kind: type[view_module.View], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="broken"), kind() as view:
        print("a greeting")
        view.message("a line")
        raise ValueError("broken")
    print("the result")
    shown = capsys.readouterr()
    assert shown.out == "the result\n"
    assert "a greeting" in shown.err and "a line" in shown.err


def test_a_bar_counts_the_steps_and_stays_while_a_validation_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.stage_started("reading")
    bar.stage_progress(3, 7, "rows")
    bar.training_started(plan_training(RunConfig(max_steps=10), None, None, SPEC, find_gpu("t4").to_hardware()), 2)
    training = bar._bar
    bar.step_finished(report(3))
    bar.stage_progress(1, 4, "rows")
    assert (bar._bar.desc, bar._bar.total, training.disable) == ("validating", 4, False)
    bar.step_finished(report(4))
    bar.validated(validation(0))
    assert bar._bar is training and (training.initial, training.n, training.total) == (2, 4, 10)
    bar.training_finished("finished")
    shown = capsys.readouterr()
    assert all(text in shown.out for text in ("reading", "10 steps of", "parameters learn", "new best", "finished"))
    assert "4/10" in shown.err and "loss 1.2500  1 min 15 s left" in shown.err
