"""A few layers that stand for a whole decoder: where its kinds of layers repeat, and how often."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# Layers at each end that are recorded as they are: the first or last one, and one that is like its copies but has an
# end beside it.
_EDGE = 2


@dataclass(frozen=True)
class Repeat:
    """A stretch of layers of a recorded step that is copied to reach the full depth.

    Attributes:
        first: Its first layer.
        period: Its layers; the layers before and after it continue the pattern.
        recorded: Depth of the recorded step.
    """

    first: int
    period: int
    recorded: int

    @property
    def end(self) -> int:
        """The layer after it."""
        return self.first + self.period

    def holds(self, layer: int) -> bool:
        """Whether a recorded layer is in the stretch."""
        return self.first <= layer < self.end

    def copies(self, layers: int) -> int:
        """How often the stretch stands in a decoder of that depth."""
        return 1 + (layers - self.recorded) // self.period

    def kept(self, layers: int) -> tuple[int, ...]:
        """Numbers, at full depth, of the layers that are recorded."""
        return (*range(self.end), *range(layers - self.recorded + self.end, layers))


def find_repeat(kinds: Sequence[Hashable]) -> Repeat | None:
    """The stretch that leaves the fewest layers to record; None where no shorter depth stands for the whole.

    Args:
        kinds: Of every layer, in order; layers of one kind do the same.
    """
    layers, best = len(kinds), None
    for period in range(1, layers // 2 + 1):
        if best is not None and best.recorded <= period + 2 * _EDGE:
            break  # no longer period can do with less
        alike = [one == other for one, other in zip(kinds, kinds[period:], strict=False)]
        for first in range(_EDGE, layers - period - _EDGE):
            # From the layer before the stretch to the one behind its last copy, each is as that a period before.
            until = next((i for i in range(first - 1, len(alike)) if not alike[i]), len(alike)) + period
            rest = max(_EDGE, layers - until + 1)
            rest += (layers - first - rest) % period
            found = Repeat(first, period, first + period + rest)
            if found.copies(layers) > 1 and (best is None or found.recorded < best.recorded):
                best = found
    return best
