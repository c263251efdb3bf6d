"""From tokenised rows to the three splits and the record of how they were made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from laras.config import RunConfig
from laras.data.analyze import length_stats
from laras.data.duplicates import Groups
from laras.data.examples import Collected, Part
from laras.data.split import SPLITS, Ratios, assign_splits, length_drift, split_ratios, strata_counts
from laras.data.store import tokens_digest
from laras.errors import DataError
from laras.records import SplitInfo, SplitManifest, SplitName

if TYPE_CHECKING:
    import pyarrow as pa

FEW_TRAIN_ROWS, FEW_SCORED_ROWS = 50, 30
_LARGE_GROUP = 0.2  # of all rows
_DRIFT_P_VALUE, _DRIFT_DISTANCE = 0.01, 0.1

Choice = SplitName | None  # None: the row is left out


def divide_rows(
    config: RunConfig, table: pa.Table, collected: Collected, groups: Groups
) -> tuple[dict[SplitName, pa.Table], SplitManifest]:
    """Tables of the splits, in the order of the rows, and the manifest (without its parent's digest).

    Raises:
        DataError: Too few distinct rows for the splits that are wanted.
    """
    import numpy as np

    parts, strata = collected.parts, collected.strata
    ratios = _ratios(config, parts)
    choices, warnings = _choose(config, parts, strata, groups.keys, ratios)
    lengths = table.column("length").to_numpy()
    target_counts = np.asarray(collected.targets, dtype=np.int64)
    of_row = np.array([choice or "" for choice in choices])
    tables, infos = {}, {}
    for split in SPLITS:
        mask = of_row == split
        tables[split] = table.filter(mask)
        stats = length_stats(lengths[mask], target_counts[mask])
        infos[split] = SplitInfo(rows=stats.rows, tokens=stats, sha256=tokens_digest(tables[split]))
    if not infos["train"].rows:
        raise DataError(
            "no row is left for training: all resemble rows of the validation or test files",
            hint="give files that do not repeat each other",
        )
    by_split = {split: lengths[of_row == split] for split in SPLITS}
    drift = length_drift(by_split)
    warnings += _size_warnings({split: infos[split].rows for split in SPLITS}, groups, len(parts))
    warnings += [
        f"token lengths of {found.split} differ from those of train (Kolmogorov-Smirnov {found.ks_statistic:.2f})"
        for found in drift
        if found.p_value < _DRIFT_P_VALUE and found.ks_statistic > _DRIFT_DISTANCE
    ]
    manifest = SplitManifest(
        seed=config.seed,
        ratios=ratios,
        stratify_by=config.split.stratify_by,
        strata=_strata(strata, choices),
        train=infos["train"],
        validation=infos["validation"],
        test=infos["test"],
        drift=drift,
        excluded_rows=sum(choice is None for choice in choices),
        warnings=tuple(warnings),
    )
    return tables, manifest


def _ratios(config: RunConfig, parts: Sequence[Part]) -> Ratios:
    """Fractions of the rows that Laras divides; a split that has a file of its own takes none of them."""
    given = set(parts)
    divided = sum(part in (None, "train") for part in parts)
    train, validation, test = split_ratios(divided, config.split)
    if "validation" in given:
        train, validation = train + validation, 0.0
    if "test" in given:
        train, test = train + test, 0.0
    return train, validation, test


def _choose(
    config: RunConfig, parts: Sequence[Part], strata: Sequence[str], keys: Sequence[str], ratios: Ratios
) -> tuple[list[Choice], list[str]]:
    """The split of every row: given files stay as they are, and rows of train that resemble theirs leave it."""
    choices: list[Choice] = [part if part in ("validation", "test") else None for part in parts]
    held_out = {key: part for key, part in zip(keys, parts, strict=True) if part in ("validation", "test")}
    divided = [index for index, part in enumerate(parts) if part in (None, "train") and keys[index] not in held_out]
    if divided:
        assigned = assign_splits(
            [keys[index] for index in divided],
            ratios,
            config.seed,
            [strata[index] for index in divided] if strata else None,
        )
        for index, split in zip(divided, assigned, strict=True):
            choices[index] = split
    warnings = []
    if excluded := sum(choice is None for choice in choices):
        warnings.append(
            f"{excluded:,} rows of train are left out, as they equal or resemble rows of the validation or test files"
        )
    in_test = {key for key, part in zip(keys, parts, strict=True) if part == "test"}
    in_validation = Counter(key for key, part in zip(keys, parts, strict=True) if part == "validation")
    if shared := sum(count for key, count in in_validation.items() if key in in_test):
        warnings.append(
            f"{shared:,} rows of the validation file equal or resemble rows of the test file; both stay as given"
        )
    return choices, warnings


def _size_warnings(rows: dict[SplitName, int], groups: Groups, all_rows: int) -> list[str]:
    warnings = []
    few = [split for split in SPLITS if 0 < rows[split] < (FEW_TRAIN_ROWS if split == "train" else FEW_SCORED_ROWS)]
    if few:
        counts = ", ".join(f"{rows[split]:,} {split}" for split in few)
        warnings.append(
            f"few rows: {counts}; learn from at least {FEW_TRAIN_ROWS} and score on at least {FEW_SCORED_ROWS}, or the "
            "result says little"
        )
    if not rows["validation"]:
        warnings.append("no row validates: nothing stops training early, and the last model is kept")
    if groups.largest > max(10, _LARGE_GROUP * all_rows):
        warnings.append(
            f"one group of near duplicates holds {groups.largest:,} of {all_rows:,} rows, which all share a split; "
            "if they only share boilerplate, raise `split.near_duplicate_threshold`"
        )
    return warnings


def _strata(strata: Sequence[str], choices: Sequence[Choice]) -> dict[str, dict[str, int]]:
    if not strata:
        return {}
    pairs = [(stratum, choice) for stratum, choice in zip(strata, choices, strict=True) if choice is not None]
    return strata_counts([stratum for stratum, _ in pairs], [choice for _, choice in pairs])
