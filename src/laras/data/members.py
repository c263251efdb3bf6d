"""Which content went to which split: what keeps the rows of a line of runs apart.

A run that starts from the weights of another has, through them, seen the other's training rows, and its start was
chosen by the other's validation rows. So every row must keep the split that it had. To check that, each run keeps a
hash of every row and of its group of near duplicates. A hash tells whether a row is known, never what it says, so that
it may be read while the test set is sealed.

Columns: `content` and `group` (16 bytes each), `split`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from laras.data.duplicates import Groups
from laras.data.split import SPLITS
from laras.records import SplitName

if TYPE_CHECKING:
    import pyarrow as pa

_HASH_BYTES = 16
_BITS: dict[str, int] = {split: 1 << place for place, split in enumerate(SPLITS)}

Conflict = tuple[SplitName, SplitName]  # the split of a row now, and one in which it was before


def members_of(table: pa.Table, splits: Mapping[str, pa.Table], groups: Groups) -> pa.Table:
    """Content, group and split of every row that is in a split.

    Args:
        table: All rows, in the order of the source.
        splits: The rows of each split; rows that were left out are in none.
        groups: Of the rows of `table`.
    """
    import numpy as np
    import pyarrow as pa

    rows = table.column("row").to_numpy()
    places = {split: np.searchsorted(rows, splits[split].column("row").to_numpy()) for split in SPLITS}
    order = np.concatenate([places[split] for split in SPLITS])
    names = np.repeat(SPLITS, [len(places[split]) for split in SPLITS])
    return pa.table(
        {
            "content": _hashes(b"".join(groups.contents), order),
            "group": _hashes(bytes.fromhex("".join(groups.keys)), order),
            "split": pa.array(names.tolist(), pa.string()),
        }
    )


def members_digest(members: pa.Table) -> str:
    """SHA-256 over all hashes and splits in their order, in hexadecimal."""
    parts = [hashlib.sha256() for _ in range(3)]
    for batch in members.select(["content", "group", "split"]).to_batches():
        content, group, split = (column.to_pylist() for column in batch.columns)
        for part, text in zip(parts, (b"".join(content), b"".join(group), ",".join(split).encode()), strict=True):
            part.update(text)
        parts[2].update(b",")
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()


def split_conflicts(members: pa.Table, earlier: pa.Table) -> Counter[Conflict]:
    """Rows that are now in a split in which neither they nor their group were before, by both splits.

    Rows that are new are in none of these, and neither are rows that an earlier run had in both splits, as files that
    are given as validation and test set may repeat each other.
    """
    known = _known_splits(earlier)
    found: Counter[Conflict] = Counter()
    for content, group, split in _rows(members):
        before = known.get(content, 0) | known.get(group, 0)
        if before and not before & _BITS[split]:
            found.update((split, other) for other in SPLITS if before & _BITS[other])
    return found


def joined_members(members: pa.Table, earlier: pa.Table) -> pa.Table:
    """The members of a run and of all before it, those that are known already left out."""
    import numpy as np
    import pyarrow as pa

    known = set(_rows(earlier))
    new = np.array([row not in known for row in _rows(members)], dtype=bool)
    return pa.concat_tables([earlier, members.filter(new)]).combine_chunks()


def _known_splits(members: pa.Table) -> dict[bytes, int]:
    """The splits, one bit each, in which a content or a group is."""
    known: dict[bytes, int] = {}
    for content, group, split in _rows(members):
        bit = _BITS[split]
        known[content] = known.get(content, 0) | bit
        known[group] = known.get(group, 0) | bit
    return known


def _rows(members: pa.Table) -> Iterator[tuple[bytes, bytes, SplitName]]:
    for batch in members.select(["content", "group", "split"]).to_batches():
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _hashes(joined: bytes, order: Any) -> pa.Array:
    """Rows of 16 bytes in another order."""
    import numpy as np
    import pyarrow as pa

    chosen = np.frombuffer(joined, np.uint8).reshape(-1, _HASH_BYTES)[order]
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(_HASH_BYTES), len(order), [None, pa.py_buffer(chosen.tobytes())]
    )
