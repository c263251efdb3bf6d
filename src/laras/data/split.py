"""Which row belongs to which split: decided by hashes of groups, so that a growing dataset keeps its splits."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from laras.config import SplitConfig
from laras.errors import DataError
from laras.records import SplitDrift, SplitName

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
Ratios = tuple[float, float, float]

_SMALL_ROWS, _LARGE_ROWS = 10_000, 100_000
_LONGEST_PERIOD = 20  # the period of the quota sequence of 70/15/15 and of 85/10/5
_KS_TERMS = 100


def split_ratios(rows: int, config: SplitConfig) -> Ratios:
    """Fractions of train, validation and test; they add up to 1.

    All `auto`: 70/15/15 below 10,000 rows, 85/10/5 above 100,000, else 80/10/10. Given values are respected and the
    remainder is shared by the others in these proportions. A dataset that grows past one of the two sizes takes the
    new ratios, which moves rows between train and the others; write the ratios out to avoid that.
    """
    if rows < _SMALL_ROWS:
        usual = (0.70, 0.15, 0.15)
    elif rows > _LARGE_ROWS:
        usual = (0.85, 0.10, 0.05)
    else:
        usual = (0.80, 0.10, 0.10)
    wanted = (config.train, config.validation, config.test)
    remainder = 1.0 - sum(value for value in wanted if value != "auto")
    weight = sum(default for value, default in zip(wanted, usual, strict=True) if value == "auto")
    train, validation, test = (
        remainder * default / weight if value == "auto" else value for value, default in zip(wanted, usual, strict=True)
    )
    return train, validation, test


def assign_splits(
    group_keys: Sequence[str], ratios: Ratios, seed: int, strata: Sequence[str] | None = None
) -> list[SplitName]:
    """Split of every row; rows with the same group key share one.

    Without strata, a group's hash is a point in [0, 1): the test set is the interval that starts at 0, validation the
    one that ends at 1. So appended rows never move old ones, and other ratios move groups into or out of train only.
    With strata, rows are taken in order and a new group goes to the split furthest behind its quota in the stratum;
    every prefix of the data is within two rows of its quota when groups are single rows.

    Only when a wanted split would stay empty (tiny sets) is the group nearest to its interval moved there.

    Args:
        group_keys: Identity of each row's group; must depend on content only.
        ratios: Of train, validation, test. A split of ratio 0 stays empty.
        seed: Other seeds give other splits.
        strata: Value of the field whose proportions every split keeps, for each row.

    Raises:
        DataError: Fewer groups than splits that must not be empty.
    """
    wanted = [split for split, ratio in zip(SPLITS, ratios, strict=True) if ratio > 0]
    points = {key: _unit_hash(seed, key) for key in dict.fromkeys(group_keys)}
    if len(points) < len(wanted):
        raise DataError(
            f"{len(group_keys)} usable rows, {len(points)} of them distinct, are too few to split: "
            f"at least {len(wanted)} distinct rows are needed, one for each of {', '.join(wanted)}",
            hint="add examples, or turn a split off with `split: {validation: 0}` or `split: {test: 0}`",
        )
    if strata is None:
        chosen = {key: _interval_of(point, ratios) for key, point in points.items()}
    else:
        chosen = _by_quota(group_keys, strata, ratios, seed, points)
    _fill_empty(chosen, wanted, ratios, points)
    return [chosen[key] for key in group_keys]


def length_drift(lengths: Mapping[SplitName, ArrayLike]) -> tuple[SplitDrift, ...]:
    """Two-sample Kolmogorov-Smirnov distance between the lengths of train and those of each other split.

    Splits without rows are left out. Lengths are whole numbers, so ties make the p-value conservative (too large).

    Source: Stephens, "Use of the Kolmogorov-Smirnov, Cramér-von Mises and related statistics without extensive
        tables", J. R. Stat. Soc. B 32 (1970): p = Q((sqrt(n) + 0.12 + 0.11 / sqrt(n)) D), n the harmonic sample
        size, Q(x) = 2 * sum over k of (-1)^(k-1) exp(-2 k² x²).
    """
    import numpy as np

    train = np.sort(np.asarray(lengths["train"]))
    drifts = []
    for split in ("validation", "test"):
        other = np.sort(np.asarray(lengths.get(split, ())))
        if len(train) and len(other):
            statistic = _ks_statistic(train, other)
            size = math.sqrt(len(train) * len(other) / (len(train) + len(other)))
            p_value = _kolmogorov_survival((size + 0.12 + 0.11 / size) * statistic)
            drifts.append(SplitDrift(split=split, ks_statistic=statistic, p_value=p_value))
    return tuple(drifts)


def _unit_hash(seed: int, key: str) -> float:
    """A point in [0, 1), the same on every machine and in every version of Python."""
    # surrogatepass: text read from JSON may hold lone surrogates, which plain UTF-8 refuses.
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _interval_of(point: float, ratios: Ratios) -> SplitName:
    _, validation, test = ratios
    if point < test:
        return "test"
    # 1 - point is exact for these 53-bit fractions, and a ratio of 0 takes no point.
    return "validation" if 1.0 - point <= validation else "train"


def _distance(point: float, split: SplitName, ratios: Ratios) -> float:
    """How far a point lies outside the interval of a split; 0 inside."""
    _, validation, test = ratios
    low, high = {"test": (0.0, test), "validation": (1.0 - validation, 1.0), "train": (test, 1.0 - validation)}[split]
    return max(low - point, point - high, 0.0)


class _Quota:
    """The append-stable sequence of splits of one stratum: always the one furthest behind its quota."""

    def __init__(self, ratios: Ratios, start: float) -> None:
        self._ratios = ratios
        self._counts = [0, 0, 0]
        # Every stratum starts at a place of its own, drawn by its hash; else strata of a few rows would all give to
        # train alone.
        skipped, tie = divmod(start * _LONGEST_PERIOD, 1)
        for _ in range(int(skipped)):
            self.count(self.next_split(tie))

    def next_split(self, point: float) -> SplitName:
        """The split furthest behind if it had to take the next row; `point` in [0, 1) decides ties."""
        seen = sum(self._counts) + 1
        behind = [ratio * seen - count for ratio, count in zip(self._ratios, self._counts, strict=True)]
        wanted = [index for index in range(3) if self._ratios[index] > 0]
        most = max(behind[index] for index in wanted)
        tied = [index for index in wanted if behind[index] > most - 1e-9]
        return SPLITS[tied[int(point * len(tied))]]

    def count(self, split: SplitName) -> None:
        """Notes that a row went to a split."""
        self._counts[SPLITS.index(split)] += 1


def _by_quota(
    group_keys: Sequence[str], strata: Sequence[str], ratios: Ratios, seed: int, points: Mapping[str, float]
) -> dict[str, SplitName]:
    quotas: dict[str, _Quota] = {}
    chosen: dict[str, SplitName] = {}
    for key, stratum in zip(group_keys, strata, strict=True):
        if stratum not in quotas:
            quotas[stratum] = _Quota(ratios, _unit_hash(seed, f"stratum\0{stratum}"))
        quota = quotas[stratum]
        if key not in chosen:
            chosen[key] = quota.next_split(points[key])
        quota.count(chosen[key])
    return chosen


def _fill_empty(
    chosen: dict[str, SplitName], wanted: Sequence[SplitName], ratios: Ratios, points: Mapping[str, float]
) -> None:
    """Gives every empty wanted split the group nearest to its interval, from a split that keeps another group."""
    for split in wanted:
        groups = Counter(chosen.values())
        if not groups[split]:
            spare = [key for key, owner in chosen.items() if groups[owner] > 1]
            nearest = min(spare, key=lambda key: (_distance(points[key], split, ratios), points[key], key))
            chosen[nearest] = split


def strata_counts(strata: Sequence[str], splits: Sequence[SplitName]) -> dict[str, dict[str, int]]:
    """Rows of each stratum in each split, as the manifest records them; strata in sorted order."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SPLITS, 0))
    for stratum, split in zip(strata, splits, strict=True):
        counts[stratum][split] += 1
    return dict(sorted(counts.items()))


def _ks_statistic(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance between two empirical distributions; both samples sorted."""
    import numpy as np

    values = np.concatenate([first, second])
    below_first = np.searchsorted(first, values, side="right") / len(first)
    below_second = np.searchsorted(second, values, side="right") / len(second)
    return float(np.abs(below_first - below_second).max())


def _kolmogorov_survival(x: float) -> float:
    if x < 0.2:  # the alternating series does not converge there; Q(0.2) differs from 1 by less than 1e-12
        return 1.0
    series = sum((-1.0) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, _KS_TERMS + 1))
    return min(1.0, max(0.0, 2 * series))
