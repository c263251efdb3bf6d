"""What the data asks of a step: lengths, padding, and how far attention reaches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil

from laras.config import RunConfig
from laras.data.analyze import planned_max_length
from laras.data.collate import padded_length
from laras.data.pack import pack_documents
from laras.records import DatasetProfile, LengthStats, ModelSpec, SplitManifest

_SAMPLED_BINS, _SAMPLED_ROWS = 30, 500  # whose filling is taken for that of all


@dataclass(frozen=True)
class LargestBatch:
    """The largest micro-batch and the largest evaluation batch that the data can make.

    Attributes:
        row_tokens: Of a training row, padding included; packed, of the bin.
        target_tokens: Of the micro-batch, those that carry loss; None: all.
        eval_row_tokens: Of a validation row, padding included.
    """

    row_tokens: int
    target_tokens: int | None
    eval_row_tokens: int


@dataclass(frozen=True)
class Workload:
    """Lengths of the training split.

    Attributes:
        length_tokens: The longest example, as planned.
        mean_tokens: Of an example.
        attended_tokens: Mean length of the example that a token is in.
        rows: Training examples; 0 when the data is not known.
        step_tokens: Tokens of an effective batch on average.
        validation_tokens: Of the whole validation split.
        target_share: Share of the tokens that carry loss.
        stats: Lengths; None when the data is not known.
        longest_validation_tokens: Of a validation example; None when it is not known.
    """

    length_tokens: int
    mean_tokens: float
    attended_tokens: float
    rows: int
    step_tokens: float
    validation_tokens: float
    target_share: float
    stats: LengthStats | None
    longest_validation_tokens: int | None = None

    def largest_batch(self, rows: int, bin_tokens: int | None = None) -> LargestBatch:
        """What the collators can make of the data at most, so that a plan for it is never too low.

        Args:
            rows: Of a padded micro-batch.
            bin_tokens: Slots of a packed one; None pads rows.
        """
        stats, validation = self.stats, self.longest_validation_tokens
        eval_row = self.length_tokens if validation is None else padded_length(validation)
        row = bin_tokens or (padded_length(stats.max) if stats else self.length_tokens)
        if stats is None or stats.target_max is None or stats.target_share_max is None:
            return LargestBatch(row, None, eval_row)
        if bin_tokens:
            most = min(bin_tokens, ceil(bin_tokens * stats.target_share_max))
        else:
            most = rows * min(row, stats.target_max)
        return LargestBatch(row, max(1, most), eval_row)

    def bin_fill(self, bin_tokens: int) -> float:
        """Share of the slots of bins of that size that hold tokens, as examples of these lengths are packed."""
        stats = self.stats
        if stats is None or not stats.histogram_counts:
            return 1.0
        rows = max(_SAMPLED_ROWS, ceil(_SAMPLED_BINS * bin_tokens / stats.mean))
        return _fill(stats.histogram_edges, stats.histogram_counts, stats.max, rows, bin_tokens)

    def useful_tokens(self, rows: int, bin_tokens: int | None) -> float:
        """Tokens of an average micro-batch, padding left out: of so many rows, or of a bin whatever its rows."""
        return self.mean_tokens * rows if bin_tokens is None else self.bin_fill(bin_tokens) * bin_tokens

    def expected_longest(self, rows: int) -> int:
        """Expected length of a padded batch of that many rows, a multiple of 8."""
        stats = self.stats
        if stats is None or not stats.histogram_counts:
            return self.length_tokens
        total, below, expected = sum(stats.histogram_counts), 0, 0.0
        edges = stats.histogram_edges
        for low, high, count in zip(edges, edges[1:], stats.histogram_counts, strict=False):
            chance = ((below + count) / total) ** rows - (below / total) ** rows
            expected += chance * min((low + high) / 2, stats.max)
            below += count
        return min(self.length_tokens, max(8, ceil(expected / 8) * 8))

    def documents(self, tokens: int) -> int:
        """Most documents of a packed bin, on the careful side."""
        return max(1, ceil(1.5 * tokens / self.mean_tokens) + 1) if self.stats else max(1, tokens // self.length_tokens)


def workload(
    config: RunConfig, profile: DatasetProfile | None, manifest: SplitManifest | None, spec: ModelSpec
) -> Workload:
    """The data of a run, or examples that are all `max_length` long where there is none."""
    cap = min(config.max_length, spec.max_position_embeddings)
    longest = profile.tokens.max if profile and profile.tokens.max else cap
    length = planned_max_length(longest, config.max_length, spec.max_position_embeddings)
    stats = manifest.train.tokens if manifest else profile.tokens if profile else None
    if stats is None or not stats.rows or not stats.mean:
        return Workload(length, length, length, 0, config.effective_batch_size * length, 0, 1.0, None)
    attended = _attended(stats)
    share = min(1.0, max(0.01, stats.target_total / stats.total)) if stats.total else 1.0
    return Workload(
        length_tokens=length,
        mean_tokens=stats.mean,
        attended_tokens=attended,
        rows=stats.rows,
        step_tokens=config.effective_batch_size * stats.mean,
        validation_tokens=manifest.validation.tokens.total if manifest else 0,
        target_share=share,
        stats=stats,
        longest_validation_tokens=manifest.validation.tokens.max if manifest else stats.max,
    )


@lru_cache(maxsize=256)
def _fill(edges: tuple[int, ...], counts: tuple[int, ...], longest: int, rows: int, bin_tokens: int) -> float:
    lengths, total, seen, placed = [], sum(counts), 0, 0
    for (low, high), count in zip(pairwise(edges), counts, strict=False):
        seen += count
        here = round(rows * seen / total) - placed
        placed += here
        lengths += [min(longest, bin_tokens, max(1, round(low + (high - low) * (i + 0.5) / here))) for i in range(here)]
    return sum(lengths) / (bin_tokens * len(pack_documents(lengths, bin_tokens, seed=0)))


def _attended(stats: LengthStats) -> float:
    """Mean length weighted by tokens, from the histogram."""
    edges, counts = stats.histogram_edges, stats.histogram_counts
    if not counts:
        return stats.mean
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    tokens = sum(middle * count for middle, count in zip(middles, counts, strict=False))
    squares = sum(middle * middle * count for middle, count in zip(middles, counts, strict=False))
    return squares / tokens if tokens else stats.mean
