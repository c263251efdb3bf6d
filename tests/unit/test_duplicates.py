"""Rows that say the same, or nearly so, are one group, and a group keeps its name when rows are appended."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laras.data import duplicates
from laras.data.duplicates import DuplicateFinder, Groups, band_rows, jaccard


def passage(words: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(5000)}" for _ in range(words)]


def text(words: list[str]) -> dict[str, str]:
    return {"text": " ".join(words)}


def group(rows: list[dict], threshold: float = 0.8, batch: int = 3) -> Groups:
    finder = DuplicateFinder(threshold)
    for start in range(0, len(rows), batch):
        finder.add(rows[start : start + batch])
    return finder.groups()


def chat(question: str, answer: str, system: str | None = None, **extra) -> dict:
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]
    return {"messages": [*first, *turns]}


def true_similarity(one: list[str], two: list[str]) -> float:
    first, second = ({tuple(row[i : i + 5]) for i in range(len(row) - 4)} for row in (one, two))
    return len(first & second) / len(first | second)


def test_equal_rows_are_one_group_and_counted():
    rows = [text(["a"]), text(["b"]), text(["a"]), text(["a"])]
    found = group(rows)
    assert found.keys[0] == found.keys[2] == found.keys[3] != found.keys[1]
    assert (found.duplicate_rows, found.shared, found.largest) == (2, 1, 3)


def test_nothing_gives_no_groups():
    assert group([]) == Groups([], 0, 0, 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), changes=st.integers(0, 12), words=st.integers(30, 300))
def test_rows_are_joined_exactly_when_their_five_word_shingles_agree(seed, changes, words):
    one = passage(words, seed)
    two = list(one)
    for place in random.Random(seed).sample(range(words), min(changes, words)):
        two[place] = f"changed{place}"
    found = group([text(passage(words, seed + 1)), text(one), text(two)])
    similarity = true_similarity(one, two)
    if abs(similarity - 0.8) > 0.02:  # at the threshold itself a pair is found with a probability only
        assert (found.keys[1] == found.keys[2]) == (similarity >= 0.8)
    assert found.keys[0] != found.keys[1]


def test_threshold_of_one_joins_equal_rows_only():
    words = passage(200, 1)
    assert group([text(words), text([*words, "more"])], threshold=1).shared == 0
    assert group([text(words), text([*words, "more"])], threshold=0.999).shared == 0
    assert group([text(words), text([*words, "more"])]).shared == 1


def test_case_and_spacing_do_not_tell_rows_apart():
    assert group([{"text": "One two  three four five six"}, {"text": "one two three four\nfive six"}]).shared == 1


def test_short_texts_are_compared_as_a_whole():
    assert group([text(["yes"]), text(["yes", "please"])]).shared == 0
    assert group([text(["yes"]), text(["YES"])]).shared == 1


def test_scripts_without_spaces_are_compared_by_character():
    draw = random.Random(3)
    characters = [chr(draw.randrange(0x4E00, 0x9000)) for _ in range(200)]
    other = [*characters[:-1], "。"]
    assert group([{"text": "".join(characters)}, {"text": "".join(other)}]).shared == 1
    assert group([{"text": "".join(characters)}, {"text": "".join(reversed(characters))}]).shared == 0


def test_a_long_shared_system_message_makes_no_duplicates_but_tells_equal_rows_apart():
    system = " ".join(passage(500, 9))
    alike = [chat(" ".join(passage(20, n)), " ".join(passage(20, n + 50)), system) for n in range(5)]
    assert group(alike).shared == 0
    same = group([chat("one two three four five", "six", system), chat("one two three four five", "six", "other")])
    assert (same.duplicate_rows, same.shared) == (0, 1)


def test_tool_calls_count():
    first, second = (
        chat("q", "", tool_calls=[{"function": {"name": "f", "arguments": {"city": city}}}]) for city in ("a", "b")
    )
    assert group([first, second]).shared == 0
    assert group([first, first]).duplicate_rows == 1


def test_prompt_and_completion_are_told_apart():
    assert group([{"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": "a"}]).duplicate_rows == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 9))
def test_appended_rows_leave_the_names_of_old_groups(seed, batch):
    rows = [text(passage(60, seed + n // 2)) for n in range(8)]
    appended = [text([*passage(60, seed), "x"]), text(passage(60, seed + 10**6))]
    before, after = group(rows, batch=batch), group(rows + appended)
    assert after.keys[: len(rows)] == before.keys
    assert after.keys[len(rows)] == before.keys[0]


def test_a_row_that_resembles_two_groups_joins_them_under_the_earlier_name():
    words = passage(100, 1)
    left, right = [*words, *passage(14, 2)], [*words, *passage(14, 3)]
    middle = [*words, *passage(14, 2)[:7]]
    before = group([text(left), text(right)])
    assert before.shared == 0
    after = group([text(left), text(right), text(words), text(middle)])
    assert set(after.keys) == {before.keys[0]}


def test_a_bucket_larger_than_the_window_still_joins_neighbours(monkeypatch):
    monkeypatch.setattr(duplicates, "_WINDOW", 2)
    words = passage(100, 1)
    rows = [text([*words, f"end{n}"]) for n in range(10)]
    assert group(rows).largest == 10


def test_words_are_forgotten_when_there_are_too_many_without_changing_the_groups(monkeypatch):
    rows = [text(passage(50, n % 4)) for n in range(8)]
    expected = group(rows)
    monkeypatch.setattr(duplicates, "_MOST_KNOWN_WORDS", 10)
    assert group(rows) == expected


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.8, 0.9, 0.99])
def test_bands_find_two_rows_at_the_threshold(threshold):
    rows = band_rows(threshold)
    recall = 1 - (1 - threshold**rows) ** (duplicates.PERMUTATIONS // rows)
    assert rows == 1 or recall >= 0.999


def test_jaccard_counts_distinct_values():
    assert jaccard(np.array([1, 2, 3, 3]), np.array([3, 4])) == 0.25
