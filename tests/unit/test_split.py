from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.config import SplitConfig
from laras.data.split import SPLITS, assign_splits, length_drift, split_ratios, strata_counts
from laras.errors import DataError

RATIOS = (0.8, 0.1, 0.1)
keys = st.lists(st.text(max_size=6), min_size=3, max_size=60).filter(lambda values: len(set(values)) >= 3)


def names(count: int) -> list[str]:
    return [f"row {number}" for number in range(count)]


@pytest.mark.parametrize(
    ("rows", "ratios"),
    [
        (9_999, (0.70, 0.15, 0.15)),
        (10_000, (0.80, 0.10, 0.10)),
        (100_000, (0.80, 0.10, 0.10)),
        (100_001, (0.85, 0.10, 0.05)),
    ],
)
def test_automatic_ratios_follow_the_number_of_rows(rows, ratios):
    assert split_ratios(rows, SplitConfig()) == pytest.approx(ratios)


def test_given_ratios_are_respected_and_the_rest_is_shared():
    assert split_ratios(50, SplitConfig(train=0.9)) == pytest.approx((0.9, 0.05, 0.05))
    assert split_ratios(50, SplitConfig(test=0)) == pytest.approx((0.7 / 0.85, 0.15 / 0.85, 0))
    assert split_ratios(50, SplitConfig(validation=0.95)) == pytest.approx((0.05 * 70 / 85, 0.95, 0.05 * 15 / 85))
    assert split_ratios(50, SplitConfig(train=0.6, validation=0.3, test=0.1)) == (0.6, 0.3, 0.1)
    assert split_ratios(50, SplitConfig(train=0.6, validation=0.3)) == pytest.approx((0.6, 0.3, 0.1))


@given(keys, st.integers(0, 2**32 - 1), st.booleans())
def test_rows_of_a_group_share_a_split_and_no_split_is_empty(group_keys, seed, stratified):
    strata = [str(len(key) % 2) for key in group_keys] if stratified else None
    splits = assign_splits(group_keys, RATIOS, seed, strata)
    assert len(set(zip(group_keys, splits, strict=True))) == len(set(group_keys))
    assert set(splits) == set(SPLITS)


@pytest.mark.parametrize("stratified", [False, True])
@given(appended=st.lists(st.integers(0, 700), max_size=40), seed=st.integers(0, 1000))
def test_appended_rows_keep_the_split_of_old_rows(stratified, appended, seed):
    old = names(300)
    new = old + [f"row {number}" for number in appended]
    strata = [str(sum(key.encode()) % 3) for key in new] if stratified else None
    before = assign_splits(old, RATIOS, seed, strata and strata[: len(old)])
    assert assign_splits(new, RATIOS, seed, strata)[: len(old)] == before


def test_other_ratios_only_move_rows_into_or_out_of_train():
    before = assign_splits(names(3000), (0.7, 0.15, 0.15), 1)
    after = assign_splits(names(3000), (0.85, 0.10, 0.05), 1)
    moves = {pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]}
    assert moves == {("validation", "train"), ("test", "train")}


def test_splits_have_the_wanted_sizes_and_depend_on_the_seed():
    first, second = (Counter(assign_splits(names(20_000), RATIOS, seed)) for seed in (1, 2))
    assert first["train"] == pytest.approx(16_000, abs=250)
    assert first["validation"] == pytest.approx(2_000, abs=200)
    assert first["test"] == pytest.approx(2_000, abs=200)
    assert assign_splits(names(100), RATIOS, 1) != assign_splits(names(100), RATIOS, 2)
    assert first != second


def test_the_assignment_never_changes_between_versions():
    # A changed hash would mix old test rows into the training of everybody who updates.
    splits = assign_splits(names(2000), RATIOS, 42)
    assert [number for number, split in enumerate(splits) if split == "test"][:6] == [9, 16, 26, 30, 47, 64]


def test_nor_does_the_stratified_one():
    strata = ["ab"[number % 2] for number in range(60)]
    splits = assign_splits(names(60), RATIOS, 42, strata)
    assert [number for number, one in enumerate(splits) if one == "validation"] == [0, 7, 20, 33, 40, 47]
    assert [number for number, one in enumerate(splits) if one == "test"] == [13, 14, 27, 34, 53, 54]


@pytest.mark.parametrize(
    ("split", "other"), [("test", "train"), ("validation", "train"), ("train", "test"), ("train", "validation")]
)
@given(group_keys=keys, seed=st.integers(0, 1000))
def test_a_larger_split_keeps_its_rows_however_few_there_are(split, other, group_keys, seed):
    """Also the one that it was given because it was empty: a row that was tested on must not be trained on later."""
    before: set[str] = set()
    for ratio in (0.001, 0.01, 0.1, 0.3, 0.6):
        ratios = {split: ratio, other: 1 - ratio}
        splits = assign_splits(group_keys, tuple(ratios.get(one, 0.0) for one in SPLITS), seed)
        after = {key for key, one in zip(group_keys, splits, strict=True) if one == split}
        assert before <= after
        before = after


@pytest.mark.parametrize("seed", range(20))
def test_train_is_given_the_row_that_a_larger_train_would_have(seed):
    def trained(ratio):
        splits = assign_splits(names(20), (ratio, (1 - ratio) / 2, (1 - ratio) / 2), seed)
        return {number for number, split in enumerate(splits) if split == "train"}

    sets = [trained(ratio) for ratio in (1e-6, 0.03, 0.06, 0.1, 0.2)]
    assert len(sets[0]) == 1
    assert all(smaller <= larger for smaller, larger in pairwise(sets))


@given(st.lists(st.sampled_from("abc"), min_size=20, max_size=200), st.integers(0, 100))
def test_every_stratum_keeps_its_quota_within_two_rows(strata, seed):
    splits = assign_splits(names(len(strata)), RATIOS, seed, strata)
    for stratum, counts in strata_counts(strata, splits).items():
        rows = strata.count(stratum)
        for split, ratio in zip(SPLITS, RATIOS, strict=True):
            # + 1: the group that may have been moved to fill an empty split.
            assert abs(counts[split] - ratio * rows) <= 2 + (len(strata) < 60)


def test_the_manifest_gets_the_rows_of_each_stratum_in_each_split():
    assert strata_counts(["b", "a", "b", "b"], ["train", "test", "train", "validation"]) == {
        "a": {"train": 0, "validation": 0, "test": 1},
        "b": {"train": 2, "validation": 1, "test": 0},
    }


def test_many_strata_of_a_few_rows_reach_every_split():
    strata = [str(number // 3) for number in range(900)]
    counts = Counter(assign_splits(names(900), RATIOS, 3, strata))
    assert counts["validation"] == pytest.approx(90, abs=30)
    assert counts["test"] == pytest.approx(90, abs=30)


@pytest.mark.parametrize("strata", [None, ["a"] * 50])
def test_a_split_of_ratio_zero_stays_empty(strata):
    assert set(assign_splits(names(50), (0.9, 0.1, 0.0), 5, strata)) == {"train", "validation"}
    assert set(assign_splits(names(50), (0.9, 0.0, 0.1), 5, strata)) == {"train", "test"}


def test_so_it_does_where_rounded_ratios_leave_rows_that_no_split_is_behind_by():
    # Ratios may miss 1 by 1e-6, which is a row in a million; here by a row in a hundred.
    assert set(assign_splits(names(500), (0.89, 0.1, 0.0), 5, ["a"] * 500)) == {"train", "validation"}


def test_too_few_distinct_rows_say_how_many_are_needed():
    with pytest.raises(DataError, match=r"4 usable rows, 2 of them distinct.*at least 3 distinct rows") as caught:
        assign_splits(["a", "b", "a", "b"], RATIOS, 0)
    assert "split" in (caught.value.hint or "")
    assert sorted(assign_splits(["a", "b", "c"], RATIOS, 0)) == ["test", "train", "validation"]


def test_lone_surrogates_are_hashed():
    assert set(assign_splits(["\ud800", "b", "c"], RATIOS, 0)) == set(SPLITS)


def test_drift_is_small_for_like_lengths_and_large_for_unlike_ones():
    rng = np.random.default_rng(0)
    train, alike, longer = rng.integers(1, 500, 4000), rng.integers(1, 500, 400), rng.integers(200, 700, 400)
    validation, test = length_drift({"train": train, "validation": alike, "test": longer})
    assert (validation.split, test.split) == ("validation", "test")
    assert validation.ks_statistic < 0.08
    assert validation.p_value > 0.01
    assert test.ks_statistic == pytest.approx(0.4, abs=0.05)
    assert test.p_value < 1e-9


def test_drift_of_known_samples():
    (drift,) = length_drift({"train": [1, 2, 3, 4], "validation": [3, 4, 5, 6], "test": []})
    assert drift.ks_statistic == pytest.approx(0.5)
    x = (2**0.5 + 0.12 + 0.11 / 2**0.5) * 0.5
    assert drift.p_value == pytest.approx(2 * sum((-1) ** (k - 1) * np.exp(-2 * (k * x) ** 2) for k in range(1, 9)))
    (same,) = length_drift({"train": [1, 2], "validation": [2, 1]})
    assert (same.ks_statistic, same.p_value) == (0.0, 1.0)
    assert length_drift({"train": [], "validation": [1]}) == ()
