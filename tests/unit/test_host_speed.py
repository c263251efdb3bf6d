"""The time that is told for a plan on this machine is that of its own host."""

import os

import pytest

from laras.planning import host_speed
from laras.planning.catalogue import find_gpu
from laras.planning.host_speed import host_times_as_slow
from laras.planning.throughput import recorded_step_s
from laras.planning.work import Work

H100 = find_gpu("h100").to_hardware()
HOST, DEVICE = Work(calls=10_000), Work(moved_bytes=10**12)


def times_as_slow(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> float:
    pieces = iter(seconds + [max(seconds)] * 1000)
    monkeypatch.setattr(host_speed, "piece_of_python_s", lambda: next(pieces))
    monkeypatch.setattr(host_speed.time, "sleep", lambda _: None)
    return host_times_as_slow()


def test_the_piece_is_as_much_work_as_it_has_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    once = min(host_speed.piece_of_python_s() for _ in range(20))
    monkeypatch.setattr(host_speed, "_TURNS", 10 * host_speed._TURNS)
    assert 3 < min(host_speed.piece_of_python_s() for _ in range(20)) / once < 30
    assert 1e-5 < once < 1e-1


@pytest.mark.parametrize(("share", "told"), [(1.0, 1.0), (1.1, 1.0), (1.7, 1.75), (2.1, 2.0), (0.1, 0.5), (50.0, 4.0)])
def test_a_slower_host_is_told_in_quarters(share: float, told: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert times_as_slow([share * 320e-6], monkeypatch) == told


def test_a_tenant_that_leaves_meanwhile_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert times_as_slow([640e-6] * 30 + [325e-6] + [640e-6] * 10, monkeypatch) == 1.0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be bound here")
def test_a_tenant_that_stays_on_a_core_makes_no_difference_where_another_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = os.sched_getaffinity(0)
    if len(before) == 1:
        pytest.skip("there is one core")
    busy = min(before)
    monkeypatch.setattr(host_speed, "piece_of_python_s", lambda: 640e-6 if busy in os.sched_getaffinity(0) else 320e-6)
    assert host_times_as_slow() == 1.0
    assert os.sched_getaffinity(0) == before


def test_a_slower_host_slows_what_it_issues_and_not_what_the_device_does() -> None:
    slow = H100.model_copy(update={"host_times_as_slow": 2.0})
    assert recorded_step_s({"forward": HOST}, slow, span_tokens=1) == pytest.approx(
        2 * recorded_step_s({"forward": HOST}, H100, span_tokens=1)
    )
    alone = {"forward": DEVICE}
    assert recorded_step_s(alone, slow, span_tokens=1) == recorded_step_s(alone, H100, span_tokens=1)
