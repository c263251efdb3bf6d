"""Metrics are read whatever state the file is in, and reduced without losing an extreme."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from laras.reporting.history import Series, envelope, read_history


@given(arrays(np.float64, st.integers(1, 4000), elements=st.floats(-1e6, 1e6)), st.integers(1, 400))
def test_a_reduction_keeps_the_extremes_and_the_mean(values, buckets):
    reduced = envelope(Series(np.arange(len(values), dtype=float), values), buckets)
    assert len(reduced.step) <= buckets or reduced.points_per_bucket == 1
    assert reduced.low.min() == values.min()
    assert reduced.high.max() == values.max()
    assert (reduced.low <= reduced.mean + 1e-6).all()
    assert (reduced.mean <= reduced.high + 1e-6).all()


def test_a_short_series_is_drawn_as_it_is():
    series = Series(np.arange(5.0), np.array([1.0, 5, 2, 8, 3]))
    assert envelope(series, 5).points_per_bucket == 1
    assert envelope(series, 5).mean is series.value


def test_broken_lines_and_nulls_are_counted_and_later_lines_win(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "time_s": 2.5, "loss": 3.0, "note": "text"}\n'
        '{"step": 2, "time_s": 4.0, "loss": null}\n'
        '{"step": 3, "loss": 9.0}\n'
        '{"step": 3, "loss": 1.0}\n'
        '[1]\n{"loss": 1}\n{"step": 4, "lo'
    )
    history = read_history(path)
    loss = history.get("loss")
    assert loss.step.tolist() == [1, 3]
    assert loss.value.tolist() == [3.0, 1.0]
    assert loss.broken_steps == (2,)
    assert (history.last_step, history.elapsed_s, history.unreadable_lines) == (3, 4.0, 3)
    assert "note" not in history.series


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("")])
def test_a_run_without_metrics_has_an_empty_history(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    assert len(read_history(tmp_path / "metrics.jsonl").get("loss")) == 0
