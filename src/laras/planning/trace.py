"""The requests for memory of one training step, recorded at a small depth and unrolled to the model's.

A step is recorded with few decoder layers, cut into segments: what lives before it, each layer's forward, the loss,
each layer's backward, and the end. A decoder repeats itself, so the segments of a stretch of layers stand for all its
copies: unrolled, the trace is request for request what the whole depth would have made, for a fraction of the work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from itertools import accumulate, groupby
from typing import Any

from laras.planning.allocator import block_bytes
from laras.planning.depth import Repeat
from laras.planning.work import Work

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
            peak = peaks[kind]
            for event in self.events[position:end]:
                if event > 0:
                    size = block_bytes(event)
                    sizes.append(size)
                    live += size
                    peak = max(peak, live)
                else:
                    live -= sizes[-event - 1]
            peaks[kind] = max(peak, live)
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
        repeat: The layers that stand for more; None for a step of the whole depth.
    """

    layers: int
    segments: tuple[Segment, ...]
    paged: tuple[tuple[int, int], ...] = ()
    repeat: Repeat | None = None

    def why_not_repeated(self) -> str | None:
        """Why no layers can stand for others; None when they can."""
        repeat = self.repeat
        if repeat is None:
            return f"all of its {self.layers} layers are recorded"
        sizes = {segment.key: [event for event in segment.events if event > 0] for segment in self.segments}
        for (kind, index, layer), taken in sizes.items():
            before = layer - repeat.period
            if repeat.first - 1 <= before and layer < self.layers - 1 and sizes.get((kind, index, before)) != taken:
                return f"layers {before} and {layer} differ in {kind}"
        if not all(("forward", 0, layer) in sizes for layer in range(repeat.first, repeat.end)):
            return "no layers were seen"
        stretches = [segments[0].key[:2] for is_copied, segments in self.stretches() if is_copied]
        if len(stretches) != len(set(stretches)):
            return "something comes between the layers"
        owners = self._owners()
        for segment in self.segments:
            if repeat.holds(segment.layer):
                for event in segment.events:
                    owner = owners[-event - 1][0][2] if event < 0 else -1
                    if owner != -1 and abs(owner - segment.layer) > 1:
                        return f"layer {segment.layer} frees what layer {owner} allocated"
        return None

    def unroll(self, layers: int) -> Unrolled:
        """The step at full depth.

        Raises:
            ValueError: When the trace is neither of that depth nor one whose layers can stand for others.
        """
        if layers == self.layers:
            return self._joined()
        reason = self.why_not_repeated()
        if self.repeat is None or reason or layers < self.layers:
            raise ValueError(f"a trace of {self.layers} layers cannot be unrolled to {layers}: {reason}")
        return _Unroller(self, self.repeat, layers).run()

    def work(self, layers: int) -> dict[str, Work]:
        """The work of each kind of segment at full depth, in the order of time.

        Of a second micro-batch the kinds are `forward again` and so on: it adds to gradients that are there.
        """
        found: dict[str, Work] = defaultdict(Work)
        for part in self.segments:
            kind = f"{part.kind} again" if part.index > 0 and part.kind != "evaluation" else part.kind
            found[kind] = found[kind].plus(part.work, self._copies(part.layer, layers))
        return dict(found)

    def paged_bytes(self, layers: int) -> int:
        """Of all paged optimizer states, at full depth."""
        return sum(size * self._copies(layer, layers) for layer, size in self.paged)

    def stretches(self) -> Iterator[tuple[bool, list[Segment]]]:
        """Segments one after the other that are of one pass; whether they stand for more, and which they are."""

        def place(segment: Segment) -> tuple[str, int, bool]:
            return segment.kind, segment.index, self.repeat is not None and self.repeat.holds(segment.layer)

        return ((key[2], list(segments)) for key, segments in groupby(self.segments, place))

    def _copies(self, layer: int, layers: int) -> int:
        """How often a recorded layer stands in the whole depth."""
        return self.repeat.copies(layers) if self.repeat and self.repeat.holds(layer) else 1

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the cache."""
        rows = [[part.kind, part.index, part.layer, list(part.events), part.work.to_json()] for part in self.segments]
        repeat = astuple(self.repeat) if self.repeat else None
        return {"layers": self.layers, "segments": rows, "paged": [list(one) for one in self.paged], "repeat": repeat}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StepTrace:
        """The trace that `to_json` wrote."""
        segments = tuple(
            Segment(kind, index, layer, tuple(events), Work.from_json(work))
            for kind, index, layer, events, work in values["segments"]
        )
        paged = tuple((layer, size) for layer, size in values["paged"])
        return cls(values["layers"], segments, paged, Repeat(*values["repeat"]) if values["repeat"] else None)

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
    """Copies the segments of the stretch that repeats and points their frees at the copies of what they free."""

    def __init__(self, trace: StepTrace, repeat: Repeat, layers: int) -> None:
        self._trace, self._repeat = trace, repeat
        self._copies = range(repeat.copies(layers))
        self._owners = trace._owners()
        self._new_numbers: dict[Key, list[int]] = defaultdict(list)  # of the allocations of a segment, in order

    def run(self) -> Unrolled:
        events: list[int] = []
        marks: list[tuple[int, str]] = []
        allocations, owners, new_numbers = 0, self._owners, self._new_numbers
        for segment, layer in self._sequence():
            if not marks or marks[-1][1] != segment.kind:
                marks.append((len(events), segment.kind))
            taken = new_numbers[segment.kind, segment.index, layer]
            for event in segment.events:
                if event > 0:
                    allocations += 1
                    taken.append(allocations)
                    events.append(event)
                    continue
                (kind, index, owner_layer), number = owners[-event - 1]
                targets = (layer,) if owner_layer == segment.layer else self._holders(owner_layer, segment, layer)
                events.extend([-new_numbers[kind, index, target][number] for target in targets])
        return Unrolled(tuple(events), tuple(marks))

    def _sequence(self) -> Iterator[tuple[Segment, int]]:
        """Segments with their layer at full depth, the stretch repeated in the direction of the pass."""
        for is_copied, segments in self._trace.stretches():
            if not is_copied:
                yield from ((segment, self._moved(segment.layer)) for segment in segments)
                continue
            for copy in reversed(self._copies) if segments[0].kind == "backward" else self._copies:
                yield from ((segment, self._copied(segment.layer, copy)) for segment in segments)

    def _copied(self, layer: int, copy: int) -> int:
        """Layer at full depth of a copy of a recorded layer."""
        return layer + copy * self._repeat.period

    def _moved(self, layer: int) -> int:
        """Layer at full depth of a recorded layer that is not copied, or of the last copy of one that is."""
        return layer if layer < self._repeat.first else self._copied(layer, self._copies[-1])

    def _holders(self, owner_layer: int, segment: Segment, layer: int) -> Sequence[int]:
        """Layers at full depth whose copies of what a recorded layer allocated a segment of another one frees."""
        recorded_layer, is_copied = segment.layer, self._repeat.holds(segment.layer)
        if owner_layer == -1 and is_copied:  # what the layers share goes with the last copy that has used it
            last = recorded_layer if segment.kind == "backward" else self._moved(recorded_layer)
            return [-1] if layer == last else []
        if is_copied:
            return [layer + owner_layer - recorded_layer]
        if not self._repeat.holds(owner_layer):
            return [self._moved(owner_layer)]
        if recorded_layer == -1 or abs(recorded_layer - owner_layer) > 1:  # the end of the step, or of the pass
            return [self._copied(owner_layer, copy) for copy in self._copies]
        # a neighbour of the stretch frees what is in the copy next to it
        return [owner_layer if recorded_layer < owner_layer else self._moved(owner_layer)]


class _TrainingOrder:
    """Repeats the step of a trace, and takes the optimizer's states only when the first one gets there."""

    def __init__(self, whole: Unrolled) -> None:
        self._whole = whole
        self._numbers = list(accumulate(int(event > 0) for event in whole.events))
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
            if number > 1:  # as the second, which frees nothing that was there before
                self._repeat(starts[-2])
                continue
            self._copy(first, update)
            if number == 0:
                self._copy(states, first)
                before |= set(self._copies) & set(self._numbers[states:first])
            self._copy(update, evaluation)
            self._give_back_all_but(before)
        self._evaluate(evaluation, before)
        return Unrolled(tuple(self._events), tuple(self._marks), tuple(starts))

    def _evaluate(self, start: int, kept: set[int]) -> None:
        """An evaluation batch, with nothing of a step left."""
        self._give_back_all_but(kept)
        if start < len(self._whole.events):
            self._marks.append((len(self._events), "evaluation"))
        self._copy(start, len(self._whole.events))
        self._give_back_all_but(kept)

    def _give_back_all_but(self, kept: set[int]) -> None:
        for one in [one for one in self._copies if one not in kept]:
            self._events.append(-self._copies.pop(one))

    def _repeat(self, start: int) -> None:
        """The events from there on once more, of which each frees what one of them allocated."""
        events, end = self._events[start:], len(self._events)
        taken = sum(event > 0 for event in events)
        self._marks += [(position + end - start, kind) for position, kind in self._marks if position >= start]
        self._events += [event if event > 0 else event - taken for event in events]
        self._allocations += taken

    def _start(self, kind: str) -> int:
        return next((start for start, name in self._whole.marks if name == kind), len(self._whole.events))

    def _copy(self, start: int, end: int) -> None:
        marks, length = self._whole.marks, len(self._whole.events)
        for (begins, kind), (ends, _) in zip(marks, (*marks[1:], (length, "")), strict=True):
            if max(start, begins) < min(end, ends):
                if not self._marks or self._marks[-1][1] != kind:
                    self._marks.append((len(self._events), kind))
                self._copy_stretch(max(start, begins), min(end, ends))

    def _copy_stretch(self, start: int, end: int) -> None:
        events, copies, allocations = self._events, self._copies, self._allocations
        number = self._numbers[start - 1] if start else 0
        for event in self._whole.events[start:end]:
            if event > 0:
                number += 1
                allocations += 1
                copies[number] = allocations
                events.append(event)
            elif -event in copies:  # else: given back at the end of its step
                events.append(-copies.pop(-event))
        self._allocations = allocations
