"""The allocator's rules, one by one, and that a step fits a capacity when PyTorch would make it fit."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.planning.allocator import CachingAllocator, CapacityExceeded, block_bytes, replay
from laras.planning.trace import Unrolled

MIB = 2**20


def test_requests_are_rounded_to_512_bytes():
    assert [block_bytes(size) for size in (1, 512, 513)] == [512, 512, 1024]


@pytest.mark.parametrize(
    ("request_bytes", "segment"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)],
)
def test_a_request_takes_the_segment_that_pytorch_takes(request_bytes, segment):
    allocator = CachingAllocator()
    allocator.malloc(request_bytes)
    assert allocator.reserved_bytes == segment


def test_a_large_block_keeps_a_rest_of_at_most_one_mebibyte():
    assert replay([11 * MIB + 1]).peak_allocated_bytes == 12 * MIB
    allocator = CachingAllocator()
    allocator.malloc(10 * MIB + 1)
    assert allocator.allocated_bytes == 10 * MIB + 512  # 12 MiB reserved, the rest is split off


def test_freed_neighbours_are_joined_and_used_again():
    allocator = CachingAllocator()
    addresses = [allocator.malloc(5 * MIB) for _ in range(4)]
    for address in addresses:
        allocator.free(address)
    allocator.malloc(20 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_unused_segments_are_returned_before_a_request_fails():
    events = [60 * MIB, -1, 80 * MIB]
    assert replay(events).peak_reserved_bytes == 140 * MIB
    tight = replay(events, 100 * MIB)
    assert (tight.fits, tight.retries, tight.peak_reserved_bytes) == (True, 1, 80 * MIB)
    assert not replay([60 * MIB, 80 * MIB], 100 * MIB).fits


def test_what_does_not_fit_is_named():
    with pytest.raises(CapacityExceeded, match=str(30 * MIB)):
        CachingAllocator(20 * MIB).malloc(30 * MIB)


@given(st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=60), st.randoms())
def test_everything_freed_leaves_nothing_allocated_and_only_whole_segments(sizes, random):
    allocator = CachingAllocator()
    live = [allocator.malloc(size) for size in sizes]
    assert allocator.allocated_bytes >= sum(sizes)
    random.shuffle(live)
    for address in live:
        allocator.free(address)
    assert allocator.allocated_bytes == 0
    allocator.release_unused()
    assert allocator.reserved_bytes == 0


def test_states_that_come_after_the_first_step_keep_its_segments():
    weights, state, activation = 30 * MIB, 12 * MIB, 50 * MIB
    events = (weights, state, activation, activation, -4, -3, 8 * MIB, -5)
    marks = ((0, "weights"), (1, "states"), (2, "batch"), (6, "release"), (7, "evaluation"))
    before = Unrolled(events, marks)
    real = before.in_training(2)
    # weights | activations, then states in the gap that they left, the update | the same again | evaluation
    assert real.events[:5] == (weights, activation, activation, -3, -2)
    assert real.events[5] == state
    # What the update leaves until evaluation goes with the step.
    assert sum(event > 0 for event in real.events) == 2 + 2 * 3
    assert real.events[-2:] == (8 * MIB, -8)
    assert real.peaks()["batch"] == before.peaks()["batch"]
    assert [before.live_after(kind) for kind in ("weights", "states", "loss")] == [weights, weights + state, 0]
    released = {one: replay(one.events, released_at=one.starts[-1]) for one in (real,)}[real]
    assert released.peak_reserved_bytes > replay(before.events).peak_reserved_bytes
    live = [event for event in real.events if event > 0]
    freed = {-event for event in real.events if event < 0}
    assert [size for number, size in enumerate(live, 1) if number not in freed] == [weights, state]


def test_a_rehearsal_comes_before_the_first_step_and_leaves_no_segment():
    weights, state, activation = 30 * MIB, 12 * MIB, 50 * MIB
    events = (weights, state, activation, -3, 8 * MIB, -4, 40 * MIB, -5)
    marks = ((0, "weights"), (1, "states"), (2, "batch"), (4, "end"), (5, "optimizer"), (6, "evaluation"))
    before = Unrolled(events, marks)
    real = before.in_training(1, rehearsed=True)
    # weights | activation | evaluation | the step, with states at its end | evaluation
    assert real.events[: real.starts[0]] == (weights, activation, -2, 40 * MIB, -3)
    assert real.events[real.starts[0] :] == (activation, -4, 8 * MIB, state, -5, 40 * MIB, -7)
    assert real.until("evaluation") == real.events[:-2]
    rehearsed = replay(real.until("evaluation"), released_at=real.starts[0])
    assert rehearsed == replay(before.in_training(1).until("evaluation"), released_at=1)
    whole = replay(real.events, released_at=real.starts[0], first=len(real.events) - 2)
    assert whole.allocated_at_first_bytes == rehearsed.peak_allocated_bytes
    assert whole.allocated_after_first_bytes == weights + state + 40 * MIB


def test_a_step_that_leaves_the_allocator_as_it_found_it_is_not_run_again(monkeypatch):
    weights, state, activation = 30 * MIB, 3 * MIB, 50 * MIB
    events = (weights, state, activation, 700, -4, -3, 8 * MIB, -5, 40 * MIB, -6)
    marks = ((0, "weights"), (1, "states"), (2, "batch"), (6, "optimizer"), (8, "evaluation"))
    training = Unrolled(events, marks).in_training(20, rehearsed=True)
    places = {"released_at": training.starts[0], "first": len(training.until("evaluation"))}
    calls = []
    malloc = CachingAllocator.malloc
    monkeypatch.setattr(CachingAllocator, "malloc", lambda self, size: calls.append(size) or malloc(self, size))

    def ran(capacity, **options):
        calls.clear()
        return replay(training.events, capacity, **places, **options), len(calls)

    for capacity in (None, 100 * MIB, 90 * MIB, 60 * MIB):
        (short, few), (whole, all_of_them) = ran(capacity, starts=training.starts), ran(capacity)
        assert short == whole
        assert few < all_of_them / 3 or whole.retries


def test_steps_after_the_second_are_the_second_again():
    events = (30 * MIB, 12 * MIB, 50 * MIB, 700, -3, 8 * MIB, -4, -5, 40 * MIB, -6)
    marks = ((0, "weights"), (1, "states"), (2, "batch"), (5, "optimizer"), (8, "evaluation"))
    real = Unrolled(events, marks).in_training(4)
    _, second, third, fourth = (
        real.events[start:end] for start, end in pairwise((*real.starts, len(real.until("evaluation"))))
    )
    taken = sum(event > 0 for event in second)
    for again, before in ((third, second), (fourth, third)):
        assert again == tuple(event if event > 0 else event - taken for event in before)
    assert [kind for _, kind in real.marks] == [
        "weights", "batch", "states", *["optimizer", "batch"] * 3, "optimizer", "evaluation",
    ]  # fmt: skip
    assert real.events[-2:] == (40 * MIB, -sum(event > 0 for event in real.events))
