"""The metrics of a run over its steps, and a reduction for plots that keeps every extreme."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

BUCKETS = 300  # a plot is about 700 points wide: finer buckets cannot be told apart
_POSITION_KEYS = frozenset({"step", "epoch", "time_s"})


@dataclass(frozen=True)
class Series:
    """One metric: vectors of shape (N,), ordered by step.

    Attributes:
        step: Optimizer steps, finite.
        value: The metric there, finite.
        broken_steps: Steps at which the value was not a finite number.
    """

    step: FloatArray
    value: FloatArray
    broken_steps: tuple[int, ...] = ()

    def __len__(self) -> int:
        return int(self.step.size)


@dataclass(frozen=True)
class Envelope:
    """A series reduced to buckets of neighbouring steps: vectors of shape (M,).

    Attributes:
        step: Mean step of each bucket.
        low: Lowest value of the bucket.
        mean: Mean value.
        high: Highest value.
        points_per_bucket: 1 when nothing was reduced.
    """

    step: FloatArray
    low: FloatArray
    mean: FloatArray
    high: FloatArray
    points_per_bucket: int


@dataclass(frozen=True)
class History:
    """Every metric that a run has logged so far."""

    series: dict[str, Series] = field(default_factory=dict)
    last_step: int = 0
    elapsed_s: float = 0.0
    unreadable_lines: int = 0

    def get(self, name: str) -> Series:
        """The series of a metric, empty when it was never logged."""
        return self.series.get(name, _EMPTY)


_EMPTY = Series(np.zeros(0), np.zeros(0))


def read_history(path: Path) -> History:
    """Reads `logs/metrics.jsonl`, also while a run appends to it.

    A line that a crash left unfinished is counted, not fatal. A step that appears twice counts as the later line
    has it.
    """
    try:
        with path.open("rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return History()
    steps: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    last_step, elapsed_s, unreadable = 0, 0.0, 0
    for text in lines:
        line = _parsed(text)
        if line is None:
            unreadable += 1
            continue
        step = line["step"]
        last_step, elapsed_s = max(last_step, int(step)), max(elapsed_s, _number(line.get("time_s"), 0.0))
        for key, value in line.items():
            if key not in _POSITION_KEYS and (value is None or type(value) in (int, float)):
                steps.setdefault(key, []).append(step)
                values.setdefault(key, []).append(math.nan if value is None else value)
    series = {name: _series(np.asarray(steps[name], float), np.asarray(values[name], float)) for name in steps}
    return History(series, last_step, elapsed_s, unreadable)


def envelope(series: Series, buckets: int = BUCKETS) -> Envelope:
    """The series in at most `buckets` buckets of equally many points; the extremes of all points stay extremes."""
    size = -(-len(series) // buckets) if len(series) > buckets else 1
    if size == 1:
        return Envelope(series.step, series.value, series.value, series.value, 1)
    starts = np.arange(0, len(series), size)
    counts = np.diff(np.append(starts, len(series)))
    return Envelope(
        step=np.add.reduceat(series.step, starts) / counts,
        low=np.minimum.reduceat(series.value, starts),
        mean=np.add.reduceat(series.value, starts) / counts,
        high=np.maximum.reduceat(series.value, starts),
        points_per_bucket=size,
    )


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if isinstance(step, int | float) and math.isfinite(step) else None


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else default


def _series(step: FloatArray, value: FloatArray) -> Series:
    if (np.diff(step) <= 0).any():
        # np.unique keeps the first of equals, so the vectors are turned round to keep the last.
        step, first = np.unique(step[::-1], return_index=True)
        value = value[::-1][first]
    finite = np.isfinite(value)
    return Series(step[finite], value[finite], tuple(int(s) for s in step[~finite]))
