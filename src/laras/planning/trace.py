"""The requests for memory of one training step, recorded at a small depth and unrolled to the model's.

A step is recorded with few decoder layers, cut into segments: what lives before it, each layer's forward, the loss,
each layer's backward, and the end. A decoder repeats itself, so the segments of a middle layer stand for all middle
ones: unrolled, the trace is request for request what the whole depth would have made, for a fraction of the work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from laras.planning.allocator import block_bytes
from laras.planning.work import Work

# Layers that a trace to be unrolled has: two at each end differ from the middle one, which has equal neighbours.
TRACED_LAYERS = 5
_MIDDLE = 2

Key = tuple[str, int, int]  # kind, pass (0 unless gradients accumulate), layer (-1: none)


@dataclass(frozen=True)
class Segment:
    """A stretch of the step that belongs to one layer, or to none.

    Attributes:
        kind: `weights`, `states`, `batch`, `forward`, `loss`, `backward`, `end` (of a micro-batch), `optimizer`,
            `release` (of the gradients) or `evaluation`.
        index: Number of the micro-batch within the step.
        layer: Of the traced depth; -1 outside the layers.
        events: `n > 0` allocates n bytes; `-i` frees the i-th allocation of the trace, counted from 1.
        work: What the device has to do in it.
    """

    kind: str
    index: int
    layer: int
    events: tuple[int, ...]
    work: Work = field(default_factory=Work)

    @property
    def key(self) -> Key:
        """What identifies the segment; segments of one key are one after the other."""
        return self.kind, self.index, self.layer


@dataclass(frozen=True)
class Unrolled:
    """A trace at full depth: its events, and where each kind of segment begins; `starts` are those of the steps."""

    events: tuple[int, ...]
    marks: tuple[tuple[int, str], ...]
    starts: tuple[int, ...] = ()

    def until(self, kind: str) -> tuple[int, ...]:
        """The events before the last stretch of a kind; all where there is none."""
        end = next((start for start, name in reversed(self.marks) if name == kind), len(self.events))
        return self.events[:end]

    def live_after(self, kind: str) -> int:
        """Bytes that live when the first stretch of a kind ends; 0 where there is none."""
        number = next((number for number, (_, name) in enumerate(self.marks) if name == kind), None)
        if number is None:
            return 0
        end = self.marks[number + 1][0] if number + 1 < len(self.marks) else len(self.events)
        sizes = [block_bytes(event) for event in self.events[:end] if event > 0]
        return sum(sizes) - sum(sizes[-event - 1] for event in self.events[:end] if event < 0)

    def in_training(self, steps: int = 2, *, rehearsed: bool = False) -> Unrolled:
        """The same in the order of a real run: optimizer states appear at the end of the first step.

        They then lie in the gaps that its activations left, and keep those segments from being returned: what a
        process reserves depends on it.

        Args:
            steps: So many of them.
            rehearsed: A micro-batch and an evaluation batch come before the first.
        """
        return _TrainingOrder(self).run(steps, rehearsed=rehearsed)

    def peaks(self) -> dict[str, int]:
        """Peak of allocated bytes in every kind of segment."""
        live, sizes = 0, []
        peaks: dict[str, int] = defaultdict(int)
        marks = [*self.marks[1:], (len(self.events), "")]
        position, kind = 0, self.marks[0][1] if self.marks else ""
        for end, following in marks:
            for event in self.events[position:end]:
                if event > 0:
                    size = block_bytes(event)
                    sizes.append(size)
                    live += size
                    peaks[kind] = max(peaks[kind], live)
                else:
                    live -= sizes[-event - 1]
            peaks[kind] = max(peaks[kind], live)
            position, kind = end, following
        return dict(peaks)


@dataclass(frozen=True)
class StepTrace:
    """A recorded step.

    Attributes:
        layers: Depth at which it was recorded.
        segments: In the order of time.
        paged: Bytes of each layer's paged optimizer states (-1: of none); the driver moves them between the device and
            the host, outside the allocator.
    """

    layers: int
    segments: tuple[Segment, ...]
    paged: tuple[tuple[int, int], ...] = ()

    def why_not_uniform(self) -> str | None:
        """Why the middle layer cannot stand for others; None when it can."""
        if self.layers != TRACED_LAYERS:
            return f"recorded at {self.layers} layers, not {TRACED_LAYERS}"
        sizes = {segment.key: [event for event in segment.events if event > 0] for segment in self.segments}
        for (kind, index, layer), middle in sizes.items():
            if layer != _MIDDLE:
                continue
            for other in (layer - 1, layer + 1):
                if sizes.get((kind, index, other)) != middle:
                    return f"layers {layer} and {other} differ in {kind}"
        if not any(segment.kind == "forward" and segment.layer == _MIDDLE for segment in self.segments):
            return "no layers were seen"
        owners = self._owners()
        for segment in self.segments:
            if segment.layer == _MIDDLE:
                for event in segment.events:
                    if event < 0 and owners[-event - 1][0][2] not in (-1, _MIDDLE - 1, _MIDDLE, _MIDDLE + 1):
                        return f"layer {_MIDDLE} frees what a distant layer allocated"
        return None

    def unroll(self, layers: int) -> Unrolled:
        """The step at full depth.

        Raises:
            ValueError: When the trace is neither of that depth nor one whose middle layer can stand for others.
        """
        if layers == self.layers:
            return self._joined()
        reason = self.why_not_uniform()
        if reason or layers < TRACED_LAYERS:
            raise ValueError(f"a trace of {self.layers} layers cannot be unrolled to {layers}: {reason}")
        return _Unroller(self, layers).run()

    def work(self, layers: int) -> dict[str, Work]:
        """The work of each kind of segment at full depth, in the order of time.

        Of a second micro-batch the kinds are `forward again` and so on: it adds to gradients that are there.
        """
        found: dict[str, Work] = defaultdict(Work)
        for part in self.segments:
            middle = part.layer == _MIDDLE and layers != self.layers
            times = layers - TRACED_LAYERS + 1 if middle else 1
            kind = f"{part.kind} again" if part.index > 0 and part.kind != "evaluation" else part.kind
            found[kind] = found[kind].plus(part.work, times)
        return dict(found)

    def paged_bytes(self, layers: int) -> int:
        """Of all paged optimizer states, at full depth."""
        copies = layers - TRACED_LAYERS + 1 if layers != self.layers else 1
        return sum(size * (copies if layer == _MIDDLE else 1) for layer, size in self.paged)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the cache."""
        rows = [[part.kind, part.index, part.layer, list(part.events), part.work.to_json()] for part in self.segments]
        return {"layers": self.layers, "segments": rows, "paged": [list(one) for one in self.paged]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StepTrace:
        """The trace that `to_json` wrote."""
        segments = tuple(
            Segment(kind, index, layer, tuple(events), Work.from_json(work))
            for kind, index, layer, events, work in values["segments"]
        )
        return cls(values["layers"], segments, tuple((layer, size) for layer, size in values["paged"]))

    def _joined(self) -> Unrolled:
        events: list[int] = []
        marks: list[tuple[int, str]] = []
        for segment in self.segments:
            if not marks or marks[-1][1] != segment.kind:
                marks.append((len(events), segment.kind))
            events.extend(segment.events)
        return Unrolled(tuple(events), tuple(marks))

    def _owners(self) -> list[tuple[Key, int]]:
        """Of each allocation: its segment, and its number within it."""
        owners, counts = [], dict.fromkeys((segment.key for segment in self.segments), 0)
        for segment in self.segments:
            for event in segment.events:
                if event > 0:
                    owners.append((segment.key, counts[segment.key]))
                    counts[segment.key] += 1
        return owners


class _Unroller:
    """Copies the middle layer's segments and points their frees at the copies of what they free."""

    def __init__(self, trace: StepTrace, layers: int) -> None:
        self._trace, self._layers = trace, layers
        self._owners = trace._owners()
        self._new_numbers: dict[tuple[Key, int], int] = {}
        self._counts: dict[Key, int] = defaultdict(int)
        self._events: list[int] = []
        self._allocations = 0

    def run(self) -> Unrolled:
        marks: list[tuple[int, str]] = []
        for segment, layer in self._sequence():
            if not marks or marks[-1][1] != segment.kind:
                marks.append((len(self._events), segment.kind))
            key = (segment.kind, segment.index, layer)
            for event in segment.events:
                if event > 0:
                    self._allocations += 1
                    self._new_numbers[key, self._counts[key]] = self._allocations
                    self._counts[key] += 1
                    self._events.append(event)
                else:
                    self._events.extend(-number for number in self._freed(-event - 1, segment.layer, layer))
        return Unrolled(tuple(self._events), tuple(marks))

    def _sequence(self) -> Iterator[tuple[Segment, int]]:
        """Segments with their layer at full depth, the middle ones repeated in the direction of the pass."""
        copies = range(_MIDDLE, self._layers - (TRACED_LAYERS - 1 - _MIDDLE))
        for segment in self._trace.segments:
            if segment.layer != _MIDDLE:
                yield segment, self._moved(segment.layer)
                continue
            for layer in reversed(copies) if segment.kind == "backward" else copies:
                yield segment, layer

    def _moved(self, layer: int) -> int:
        """Layer at full depth of a traced layer that is not the middle one."""
        return layer if layer < _MIDDLE else layer + self._layers - TRACED_LAYERS

    def _freed(self, allocation: int, traced_layer: int, layer: int) -> Sequence[int]:
        (kind, index, owner_layer), number = self._owners[allocation]
        if owner_layer == -1:
            targets = [-1]
        elif traced_layer == _MIDDLE:
            targets = [layer + owner_layer - _MIDDLE]
        elif owner_layer != _MIDDLE:
            targets = [self._moved(owner_layer)]
        elif traced_layer == -1 or abs(traced_layer - _MIDDLE) > 1:  # the end of the step, or of the pass, frees all
            targets = list(range(_MIDDLE, self._layers - (TRACED_LAYERS - 1 - _MIDDLE)))
        else:  # a neighbour of the middle layer frees that of the copy next to it
            targets = [_MIDDLE if traced_layer < _MIDDLE else self._layers - TRACED_LAYERS + _MIDDLE]
        return [self._new_numbers[(kind, index, target), number] for target in targets]


class _TrainingOrder:
    """Repeats the step of a trace, and takes the optimizer's states only when the first one gets there."""

    def __init__(self, whole: Unrolled) -> None:
        self._whole = whole
        self._numbers = list(accumulate(int(event > 0) for event in whole.events))
        self._sizes = [event for event in whole.events if event > 0]
        self._freed = {-event: position for position, event in enumerate(whole.events) if event < 0}
        self._copies: dict[int, int] = {}  # live allocations, by their number in the trace
        self._events: list[int] = []
        self._marks: list[tuple[int, str]] = []
        self._allocations = 0

    def run(self, steps: int, *, rehearsed: bool) -> Unrolled:
        states, first, evaluation = (self._start(kind) for kind in ("states", "batch", "evaluation"))
        states = min(states, first)
        update = min(self._start("optimizer"), self._start("release"), evaluation)
        self._copy(0, states)
        before = set(self._copies)
        starts = []
        if rehearsed:
            self._copy(first, min(self._start("end"), update))
            self._evaluate(evaluation, before)
        for number in range(steps):
            starts.append(len(self._events))
            self._copy(first, update)
            if number == 0:
                self._copy(states, first)
                before |= set(self._copies) & set(self._numbers[states:first])
            self._copy(update, evaluation)
            left = self._give_back_all_but(before)
        self._evaluate(evaluation, before, left)
        return Unrolled(tuple(self._events), tuple(self._marks), tuple(starts))

    def _evaluate(self, start: int, kept: set[int], left: Sequence[int] = ()) -> None:
        """An evaluation batch; what autocast had kept from the step before, `left`, it casts again."""
        left = left or self._give_back_all_but(kept)
        if start < len(self._whole.events):
            self._marks.append((len(self._events), "evaluation"))
        for number in left:
            if self._freed.get(number, start) >= start:
                self._take(number, self._sizes[number - 1])
        self._copy(start, len(self._whole.events))
        self._give_back_all_but(kept)

    def _give_back_all_but(self, kept: set[int]) -> list[int]:
        left = [one for one in self._copies if one not in kept]
        for one in left:
            self._events.append(-self._copies.pop(one))
        return left

    def _take(self, number: int, size: int) -> None:
        self._allocations += 1
        self._copies[number] = self._allocations
        self._events.append(size)

    def _start(self, kind: str) -> int:
        return next((start for start, name in self._whole.marks if name == kind), len(self._whole.events))

    def _copy(self, start: int, end: int) -> None:
        kinds = dict(self._whole.marks)
        within = [name for position, name in self._whole.marks if position <= start]
        if start < end and within and not (self._marks and self._marks[-1][1] == within[-1]):
            self._marks.append((len(self._events), within[-1]))
        for position in range(start, end):
            if position in kinds and position > start:
                self._marks.append((len(self._events), kinds[position]))
            event = self._whole.events[position]
            if event > 0:
                self._take(self._numbers[position], event)
            elif -event in self._copies:  # else: given back at the end of its step
                self._events.append(-self._copies.pop(-event))
