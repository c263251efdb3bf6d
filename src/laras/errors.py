"""Every error that Laras raises on purpose.

    LarasError                  exit code
    ├── ConfigError                 2   the configuration or the command line is wrong
    │   └── MissingExtraError       2   an optional package is asked for and absent
    ├── DataError                   3   the dataset cannot be used as it is
    │   └── BadRowsError                3   some of its rows cannot
    ├── PlanError                   4   no plan, or not the forced one, fits the device
    ├── TrainingInterrupted         5   stopped by a signal; nothing is lost, the hint says how to go on
    ├── TrainingAborted             6   numbers that do not train, or memory that no split cures
    │   └── OutOfMemoryError        6   one example alone, or the model itself, does not fit
    └── RunStateError               7   the run is in use, or its state refuses the request
        ├── CheckpointError         7   no usable checkpoint, or one that is damaged
        └── SealedTestError         7   the sealed test set may not be opened, or was altered

The message states the offending value and the limit; the hint says what to change. Any other exception that
reaches the command line is a defect of Laras.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

SHOWN_PROBLEMS = 20  # lines of an error's text; `problems` holds all


class ExitCode(IntEnum):
    """What the `laras` command returns; stable (documented in the README)."""

    DONE = 0
    USAGE = 2
    DATA = 3
    PLAN = 4
    INTERRUPTED = 5
    ABORTED = 6
    RUN_STATE = 7


class LarasError(Exception):
    """Root of the tree.

    Args:
        message: What is wrong, with the offending value and the limit.
        hint: What the user can change; shown after `hint:`.
        problems: When several things are wrong, each in one line; the text shows the first 20.
    """

    exit_code: ExitCode = ExitCode.USAGE

    def __init__(self, message: str, *, hint: str | None = None, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        """Whole, so that one process of several can tell the others what it raises."""
        return _restored, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        lines = [_printable(self.message)]
        lines += [f"  - {_printable(problem)}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  - … and {len(self.problems) - SHOWN_PROBLEMS:,} more")
        if self.hint:
            lines.append(f"hint: {_printable(self.hint)}")
        return "\n".join(lines)


def _restored(kind: type[LarasError], arguments: tuple[Any, ...], values: dict[str, Any]) -> LarasError:
    error = kind.__new__(kind)
    error.args = arguments
    error.__dict__.update(values)
    return error


def _printable(text: str) -> str:
    """One line without control characters: names and values of strangers must not steer the terminal."""
    return "".join(char if char >= " " and char != "\x7f" else repr(char)[1:-1] for char in text)


class ConfigError(LarasError):
    """The configuration or the command line is wrong."""

    exit_code = ExitCode.USAGE


class MissingExtraError(ConfigError):
    """An optional package is asked for and is not installed."""


class DataError(LarasError):
    """The dataset cannot be used as it is."""

    exit_code = ExitCode.DATA


class BadRowsError(DataError):
    """Rows cannot be used and the configuration says to stop.

    Args:
        message: How many, and how often each reason.
        hint: What the user can change.
        problems: Every bad row as `file:line: reason`.
        report: What is known of the data, as `laras inspect --json` names it: format, rows, kept_rows, problems.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, problems: Sequence[str] = (), report: dict[str, Any]
    ) -> None:
        super().__init__(message, hint=hint, problems=problems)
        self.report = report


class PlanError(LarasError):
    """No plan, or not the forced one, fits the device."""

    exit_code = ExitCode.PLAN


class TrainingInterrupted(LarasError):
    """Training was stopped by a signal: after its state was saved, or before there was any."""

    exit_code = ExitCode.INTERRUPTED


class TrainingAborted(LarasError):
    """Training cannot go on: numbers that do not train, or memory that no split cures."""

    exit_code = ExitCode.ABORTED


class OutOfMemoryError(TrainingAborted):
    """One example alone, the weights or the optimizer do not fit the device."""


class RunStateError(LarasError):
    """The run is in use by another process, or its state refuses the request."""

    exit_code = ExitCode.RUN_STATE


class CheckpointError(RunStateError):
    """No usable checkpoint, or one that is damaged."""


class SealedTestError(RunStateError):
    """The sealed test set may not be opened, or has been altered."""
