"""Token lengths of a set of examples, and the length that training needs for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from laras.records import LengthStats

if TYPE_CHECKING:
    import numpy as np

LENGTH_MULTIPLE = 128
_HISTOGRAM_BINS = 20


def length_stats(lengths: Sequence[int] | np.ndarray, target_counts: Sequence[int] | np.ndarray) -> LengthStats:
    """Statistics of token lengths; all zero for an empty set.

    Percentiles interpolate linearly between the two nearest lengths. The histogram has at most 20 bins of one whole
    number of tokens each, the last of which may reach beyond the longest example.

    Args:
        lengths: Tokens of each example, after truncation or dropping.
        target_counts: Tokens of each example that carry loss, in the same order.
    """
    import numpy as np

    sizes, targets = np.asarray(lengths, dtype=np.int64), np.asarray(target_counts, dtype=np.int64)
    if not len(sizes):
        zero = dict.fromkeys(set(LengthStats.model_fields) - {"histogram_edges", "histogram_counts"}, 0)
        return LengthStats(**zero)
    median, p90, p95, p99 = (float(value) for value in np.percentile(sizes, [50, 90, 95, 99]))
    shortest, longest = int(sizes.min()), int(sizes.max())
    width = -(-(longest + 1 - shortest) // _HISTOGRAM_BINS)
    edges = range(shortest, longest + 1 + width, width)
    # Bins are half-open and whole: each length belongs to bin (length - shortest) // width.
    counts = np.bincount((sizes - shortest) // width, minlength=len(edges) - 1)
    return LengthStats(
        rows=len(sizes),
        min=shortest,
        max=longest,
        mean=float(sizes.mean()),
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        total=int(sizes.sum()),
        target_total=int(targets.sum()),
        target_max=int(targets.max()),
        target_share_max=float((targets / np.maximum(1, sizes)).max()),
        histogram_edges=tuple(edges),
        histogram_counts=tuple(int(count) for count in counts),
    )


def planned_max_length(longest: int, cap: int, context: int) -> int:
    """Tokens to plan for: the smallest multiple of 128 that holds the longest kept example.

    Never above the cap of the configuration or the context of the model, so it is no multiple of 128 where one of
    them is smaller.

    Args:
        longest: Tokens of the longest example that is kept; 0 for none.
        cap: `max_length` of the configuration.
        context: Positions that the model was made for.
    """
    rounded = max(1, -(-longest // LENGTH_MULTIPLE)) * LENGTH_MULTIPLE
    return min(rounded, cap, context)
