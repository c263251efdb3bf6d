"""A bar for notebooks: what a run is doing, as tqdm shows it in a notebook and in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from laras.progress import Observer, StepReport, ValidationReport, training_words

if TYPE_CHECKING:
    from laras.records import TrainPlan


class ProgressBar(Observer):
    """A bar for what is going on, and a line for what stays.

    laras.train("laras.yaml", observer=laras.ProgressBar())
    """

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None
        self._training: Any = None  # stays while a validation has a bar of its own below it

    def message(self, text: str) -> None:
        """See `Observer`."""
        tqdm.write(text)

    def warning(self, text: str) -> None:
        """See `Observer`."""
        tqdm.write(f"warning: {text}")

    def stage_started(self, name: str) -> None:
        """See `Observer`."""
        self._close()
        self._stage = name
        tqdm.write(name)

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        """See `Observer`."""
        if self._bar is self._training:
            name = "validating" if self._training is not None else self._stage
            self._bar = tqdm(desc=name, total=total, unit=f" {unit}", leave=False)
        self._bar.n = done
        self._bar.refresh()

    def training_started(self, plan: TrainPlan, first_step: int) -> None:
        """See `Observer`."""
        self._close()
        for text in training_words(plan, first_step):
            tqdm.write(text)
        self._bar = self._training = tqdm(desc="training", total=plan.total_steps, initial=first_step, unit=" steps")

    def step_finished(self, report: StepReport) -> None:
        """See `Observer`."""
        if self._bar is not self._training:
            self._bar.close()  # of a validation, which is over
            self._bar = self._training
        self._bar.set_postfix_str(str(report), refresh=False)
        self._bar.n = report.step
        self._bar.refresh()

    def validated(self, report: ValidationReport) -> None:
        """See `Observer`."""
        tqdm.write(str(report))

    def training_finished(self, status: str) -> None:
        """See `Observer`."""
        self._close()
        tqdm.write(f"training {status}")

    def _close(self) -> None:
        for bar in (self._bar, self._training):
            if bar is not None:
                bar.close()
        self._bar = self._training = None
