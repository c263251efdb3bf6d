"""Numbers as a person reads them, the same in the terminal, in reports and in errors."""

from __future__ import annotations

import pytest

from laras import formatting


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [
        (None, "–"),
        (10, "10 B"),
        (3 * 2**10, "3 KiB"),
        (9.35 * 2**20, "9 MiB"),
        (2**30 - 2**20, "1,023 MiB"),
        (2**30, "1.00 GiB"),
        (79.126 * 2**30, "79.13 GiB"),
        (-(2**31), "-2.00 GiB"),
    ],
)
def test_sizes_have_two_decimals_from_a_gib_on_and_none_below(count_bytes: float | None, text: str) -> None:
    assert formatting.size(count_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (float("inf"), "–"),
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert formatting.duration(seconds) == text


def test_numbers_read_as_a_person_writes_them() -> None:
    assert formatting.number(None) == formatting.number(float("nan")) == "–"
    assert [formatting.number(value) for value in (1234567, 2.5, 2e-5)] == ["1,234,567", "2.500", "2.00e-5"]
    assert [formatting.short(count) for count in (1500, 12, 134_515_008, 7.6e9)] == ["1.5k", "12", "135M", "7.6B"]
    assert [formatting.plain(value) for value in (None, True, 12345, 4096, 16.0, ("a", "b"), "x")] == [
        "–", "yes", "12,345", "4096", "16", "a, b", "x",
    ]  # fmt: skip
    assert [formatting.setting(value) for value in (2e-4, 1e-5, 1e20, 2.0, 16, True, None, "linear")] == [
        "0.0002", "1e-5", "1e20", "2.0", "16", "true", "null", "linear",
    ]  # fmt: skip
    assert formatting.instant("2026-11-24T09:30:00+00:00") == "2026-11-24 09:30 UTC"
    assert formatting.instant("yesterday") == "yesterday"
    assert (formatting.percent(None), formatting.interval(None)) == ("–", "–")
