"""What a person sees while stages work: a live line in a terminal, plain lines elsewhere. All on stderr.

Words carry the meaning; colour only repeats it.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import redirect_stdout
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from laras.formatting import duration
from laras.progress import Observer, StepReport, ValidationReport, training_words

if TYPE_CHECKING:
    from laras.records import TrainPlan

_PLAIN_INTERVAL_S = 5.0
_SILENCE_S = 30.0
_BAR_COLUMNS = 10


class View(Observer):
    """Common words of both views. Use as a context manager, so that a live line is always taken away.

    Inside of it what libraries print goes to stderr: stdout is for the result, which comes after.
    """

    def __enter__(self) -> Self:
        self._printed = redirect_stdout(sys.stderr)
        self._printed.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._printed.__exit__(kind, error, trace)

    def line(self, text: str, style: str | None = None) -> None:
        """One line that stays."""
        raise NotImplementedError

    def message(self, text: str) -> None:
        """See `Observer`."""
        self.line(text)

    def warning(self, text: str) -> None:
        """See `Observer`."""
        self.line(f"warning: {text}", "yellow")

    def training_started(self, plan: TrainPlan, first_step: int) -> None:
        """See `Observer`."""
        for text in training_words(plan, first_step):
            self.line(text)

    def validated(self, report: ValidationReport) -> None:
        """See `Observer`."""
        self.line(str(report), "bold" if report.is_best else None)

    def training_finished(self, status: str) -> None:
        """See `Observer`."""
        self.line(f"training {status}")


class PlainView(View):
    """Lines, at most one every few seconds for progress, and a sign of life in a long silence; for logs and pipes."""

    def __init__(self) -> None:
        self._stage = ""
        self._last_s = self._line_s = self._stage_s = time.monotonic()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._break_silence, name="view", daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._ended.set()
        self._watch.join()

    def line(self, text: str, style: str | None = None) -> None:
        """One line, written at once."""
        self._line_s = time.monotonic()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def stage_started(self, name: str) -> None:
        """See `Observer`."""
        self._stage = name
        self._last_s = self._stage_s = time.monotonic()
        self.line(name)

    def training_started(self, plan: TrainPlan, first_step: int) -> None:
        """See `Observer`."""
        super().training_started(plan, first_step)
        self._stage, self._stage_s = "training", time.monotonic()

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        """See `Observer`."""
        if self._is_time():
            of = f" of {total:,}" if total else ""
            # What reports its progress between steps is a validation.
            stage = "validating" if self._stage == "training" else self._stage
            self.line(f"  {stage}: {done:,}{of} {unit}")

    def step_finished(self, report: StepReport) -> None:
        """See `Observer`."""
        if self._is_time() or report.step == report.total_steps:
            self.line(f"step {report.step:>5}/{report.total_steps}  {report}")

    def training_finished(self, status: str) -> None:
        """See `Observer`."""
        super().training_finished(status)
        self._stage = ""

    def _break_silence(self) -> None:
        while not self._ended.wait(1):
            now = time.monotonic()
            if self._stage and now - self._line_s >= _SILENCE_S:
                self.line(f"  {self._stage}: {duration(now - self._stage_s)} so far")

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self._last_s < _PLAIN_INTERVAL_S:
            return False
        self._last_s = now
        return True


class LiveView(View):
    """One line that moves, with what has happened above it."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(_BAR_COLUMNS),
            TimeElapsedColumn(Column(no_wrap=True)),
            # The last column is what a narrow terminal cuts.
            TextColumn("{task.fields[numbers]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=Console(stderr=True, highlight=False),
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None  # the one that is shown
        self._training: TaskID | None = None  # hidden while a validation is shown, so that its clock goes on

    def __enter__(self) -> Self:
        super().__enter__()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        super().__exit__(kind, error, trace)

    def line(self, text: str, style: str | None = None) -> None:
        """One line above the moving one."""
        self._progress.console.print(text, style=style, markup=False)

    def stage_started(self, name: str) -> None:
        """See `Observer`."""
        self._begin(name)

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        """See `Observer`."""
        if self._task is not None and self._task == self._training:
            self._progress.update(self._training, visible=False)
            self._task = self._progress.add_task("validating", total=total, numbers="")
        if self._task is not None:
            of = f" of {total:,}" if total else ""
            self._progress.update(self._task, completed=done, total=total, numbers=f"{done:,}{of} {unit}")

    def training_started(self, plan: TrainPlan, first_step: int) -> None:
        """See `Observer`."""
        super().training_started(plan, first_step)
        self._training = self._begin("training", plan.total_steps, first_step)

    def step_finished(self, report: StepReport) -> None:
        """See `Observer`."""
        if self._training is None:
            self._training = self._begin("training", report.total_steps, report.step)
        if self._task is not None and self._task != self._training:
            self._progress.remove_task(self._task)  # a validation, which is over
        self._task = self._training
        self._progress.update(
            self._training,
            visible=True,
            completed=report.step,
            total=report.total_steps,
            numbers=f"{report.step}/{report.total_steps}  {report}",
        )

    def training_finished(self, status: str) -> None:
        """See `Observer`."""
        self._clear()
        super().training_finished(status)

    def _begin(self, name: str, total: int | None = None, done: int = 0) -> TaskID:
        self._clear()
        self._task = self._progress.add_task(name, total=total, completed=done, numbers="")
        return self._task

    def _clear(self) -> None:
        for task in list(self._progress.task_ids):
            self._progress.remove_task(task)
        self._task = self._training = None


def open_view() -> View:
    """The live view in a terminal, plain lines elsewhere."""
    return LiveView() if sys.stderr.isatty() else PlainView()
