"""Rows keep their split along a line of runs: what is known of them is a hash, and a move is found."""

from __future__ import annotations

import pyarrow as pa
import pytest

from laras.data.duplicates import DuplicateFinder
from laras.data.members import joined_members, members_digest, members_of, split_conflicts
from laras.data.split import SPLITS
from laras.data.store import read_tokens, write_tokens

LONG = "the quick brown fox jumps over the lazy dog and then runs along the river until the evening comes"


def members(**texts: list[str]) -> pa.Table:
    """Members of a dataset whose rows, in alphabetical order, are divided as named."""
    split_of = {text: split for split, some in texts.items() for text in some}
    rows = sorted(split_of)
    finder = DuplicateFinder(0.8)
    finder.add([{"text": text} for text in rows])
    places = range(0, 10 * len(rows), 10)  # positions in the source, where other rows were bad
    table = pa.table({"row": pa.array(places, pa.int64())})
    splits = {
        split: pa.table({"row": pa.array([p for p, t in zip(places, rows, strict=True) if split_of[t] == split])})
        for split in SPLITS
    }
    splits = {split: part.cast(pa.schema([("row", pa.int64())])) for split, part in splits.items()}
    return members_of(table, splits, finder.groups())


def test_every_row_of_a_split_is_a_member_and_its_text_cannot_be_read() -> None:
    found = members(train=["alpha", "beta"], validation=["gamma"], test=["delta"])
    assert found.schema.names == ["content", "group", "split"]
    assert found["split"].to_pylist() == ["train", "train", "validation", "test"]
    assert len(set(found["content"].to_pylist())) == 4
    assert all(len(content) == 16 for content in found["content"].to_pylist())
    assert found["content"].equals(found["group"])  # nothing is like anything else


@pytest.mark.parametrize("now", SPLITS)
@pytest.mark.parametrize("before", SPLITS)
def test_a_row_that_leaves_its_split_is_found_in_every_direction(now: str, before: str) -> None:
    earlier = members(**{before: ["alpha", "beta"]})
    conflicts = split_conflicts(members(**{now: ["alpha", "new"]}), earlier)
    assert conflicts == ({} if now == before else {(now, before): 1})


def test_a_near_duplicate_of_a_row_that_is_still_there_is_found_by_their_group() -> None:
    changed = LONG.replace("comes", "falls")  # of the group of LONG
    earlier = members(test=[LONG])
    assert split_conflicts(members(train=[LONG, changed]), earlier) == {("train", "test"): 2}
    assert split_conflicts(members(test=[LONG, changed]), earlier) == {}


def test_what_an_earlier_run_had_in_both_splits_may_stay_in_both() -> None:
    changed = LONG.replace("comes", "falls")  # files given for validation and test may resemble each other
    same = members(validation=[LONG], test=[changed])
    assert split_conflicts(same, same) == {}


def test_joined_members_remember_all_runs_before_and_hold_each_row_once() -> None:
    first, second = members(train=["alpha"], test=["beta"]), members(train=["gamma"], test=["beta"])
    both = joined_members(second, first)
    assert both.num_rows == 3
    assert split_conflicts(members(test=["alpha"]), both) == {("test", "train"): 1}
    assert split_conflicts(members(test=["gamma"]), both) == {("test", "train"): 1}
    assert joined_members(first, both).equals(both)


def test_the_digest_is_of_what_the_members_say_and_they_survive_the_disk(tmp_path) -> None:
    found = members(train=["alpha", "beta"], test=["gamma"])
    assert members_digest(found) == members_digest(members(train=["alpha", "beta"], test=["gamma"]))
    assert members_digest(found) != members_digest(members(train=["alpha"], test=["beta", "gamma"]))
    assert members_digest(found) != members_digest(members(train=["alpha", "betb"], test=["gamma"]))
    pieces = pa.concat_tables([found.slice(0, 1), found.slice(1)])
    assert members_digest(pieces) == members_digest(found)
    write_tokens(found, tmp_path / "members.parquet")
    assert read_tokens(tmp_path / "members.parquet").equals(found)
