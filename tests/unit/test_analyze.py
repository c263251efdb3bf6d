import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.data.analyze import length_stats, planned_max_length


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_statistics_agree_with_the_standard_library(lengths):
    stats = length_stats(lengths, [length // 2 for length in lengths])
    assert (stats.rows, stats.min, stats.max) == (len(lengths), min(lengths), max(lengths))
    assert stats.mean == pytest.approx(statistics.fmean(lengths))
    assert stats.median == pytest.approx(statistics.median(lengths))
    assert stats.min <= stats.p90 <= stats.p95 <= stats.p99 <= stats.max
    assert stats.total == sum(lengths)
    assert stats.target_total == sum(length // 2 for length in lengths)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_the_histogram_counts_every_example_once_in_its_bin(lengths):
    stats = length_stats(lengths, lengths)
    edges = stats.histogram_edges
    assert len(edges) == len(stats.histogram_counts) + 1 <= 21
    expected = [sum(low <= length < high for length in lengths) for low, high in itertools.pairwise(edges)]
    assert list(stats.histogram_counts) == expected
    assert sum(expected) == len(lengths)
    assert stats.histogram_counts[-1] > 0


def test_percentiles_of_known_lengths():
    stats = length_stats(np.arange(1, 101, dtype=np.int32), np.ones(100, dtype=np.int32))
    assert (stats.median, stats.p90, stats.p95, stats.p99) == pytest.approx((50.5, 90.1, 95.05, 99.01))


def test_the_most_targets_of_an_example_and_of_its_tokens_are_known():
    stats = length_stats([10, 4, 100], [5, 4, 30])
    assert (stats.target_max, stats.target_share_max) == (30, 1.0)
    assert length_stats([8, 10], [2, 5]).target_share_max == 0.5


def test_an_empty_set_is_all_zero():
    stats = length_stats([], [])
    assert set(stats.model_dump(exclude={"histogram_edges", "histogram_counts"}).values()) == {0}
    assert stats.histogram_edges == stats.histogram_counts == ()


@pytest.mark.parametrize(
    ("longest", "cap", "context", "planned"),
    [
        (1, 4096, 8192, 128),
        (128, 4096, 8192, 128),
        (129, 4096, 8192, 256),
        (4000, 4096, 2048, 2048),
        (990, 1000, 2048, 1000),
        (0, 4096, 2048, 128),
        (40, 64, 2048, 64),
    ],
)
def test_planned_length_holds_the_longest_and_stays_below_the_caps(longest, cap, context, planned):
    assert planned_max_length(longest, cap, context) == planned


@given(st.integers(1, 10_000), st.integers(8, 10_000), st.integers(8, 10_000))
def test_planned_length_never_cuts_a_kept_example(longest, cap, context):
    kept = min(longest, cap, context)
    planned = planned_max_length(kept, cap, context)
    assert kept <= planned <= min(cap, context)
    assert planned < kept + 128
