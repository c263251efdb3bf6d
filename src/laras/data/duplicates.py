"""Groups of rows that say the same, or nearly so; a group never straddles two splits.

Equal rows are found by a hash of their content. Nearly equal ones are found by MinHash: rows that agree in one band of
their sketches are compared by the exact Jaccard similarity of their word 5-grams. System messages count for equality
only, since a long one that all conversations share would make all of them alike.

A group is named by the content of its first row in the order of the data. So appended rows leave the names of old
groups, and with them their splits, alone. The limit: an appended row that resembles rows of two groups joins them,
and the later group's rows then follow the earlier's, because no leak goes before no move.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

WORDS_PER_SHINGLE = 5
PERMUTATIONS = 128
_SEED = 1  # of the sketches; the groups of a dataset shall not depend on the run's seed
_RECALL = 0.9995  # wanted for two rows exactly at the threshold, where it is lowest
_MARGIN = 0.15  # the estimate's standard error is at most 0.044, so a pair this far below is not compared exactly
_WINDOW = 1_024  # rows before it that a row of a bucket is compared with; more agree in boilerplate only
_MOST_KNOWN_WORDS = 1_000_000
_SEPARATOR = "\x1f"
# Odd 64-bit numbers, one for each place in a shingle: the same words in another order hash otherwise.
_MULTIPLIERS = (1, 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
# Scripts written without spaces: each character is a word.
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


class Groups(NamedTuple):
    """What belongs together.

    Attributes:
        keys: Name of each row's group.
        duplicate_rows: Rows equal to an earlier one.
        shared: Groups of two or more rows.
        largest: Rows of the largest group; 0 without rows.
        contents: Hash of each row, 16 bytes; equal rows have equal ones.
    """

    keys: list[str]
    duplicate_rows: int
    shared: int
    largest: int
    contents: tuple[bytes, ...] = ()


class _WordHashes(dict[str, int]):
    """64-bit hash of a word, the same on every machine; computed once."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


class DuplicateFinder:
    """Collects rows batch by batch, then groups them.

    Args:
        threshold: Jaccard similarity from which two rows belong together; 1 looks for equal rows only.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._digests: list[bytes] = []
        self._first_of: dict[bytes, int] = {}  # content → index among distinct contents
        self._first_row: list[int] = []  # of each distinct content
        self._sketches: list[np.ndarray] = []
        self._shingles: list[np.ndarray] = []  # of each distinct content
        self._word_hashes = _WordHashes()

    def add(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Takes the next normalised examples, in the order of the data."""
        fresh: list[str] = []
        for example in examples:
            content, words = _content(example)
            digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest not in self._first_of:
                self._first_of[digest] = len(self._first_row)
                self._first_row.append(len(self._digests))
                fresh.append(words)
            self._digests.append(digest)
        if fresh and self._threshold < 1:
            self._sketch(fresh)

    def groups(self) -> Groups:
        """Groups of all rows added so far."""
        parents = list(range(len(self._first_row)))
        if self._threshold < 1 and parents:
            self._join_alike(parents)
        distinct = [self._first_of[digest] for digest in self._digests]
        # The smaller index is always the parent, so a root is the first of its group.
        names = [self._digests[self._first_row[_root(parents, index)]].hex() for index in range(len(parents))]
        keys = [names[index] for index in distinct]
        sizes: dict[str, int] = {}
        for key in keys:
            sizes[key] = sizes.get(key, 0) + 1
        return Groups(
            keys=keys,
            duplicate_rows=len(keys) - len(parents),
            shared=sum(size > 1 for size in sizes.values()),
            largest=max(sizes.values(), default=0),
            contents=tuple(self._digests),
        )

    def _sketch(self, texts: Sequence[str]) -> None:
        import numpy as np
        from rensa import RMinHash

        if len(self._word_hashes) > _MOST_KNOWN_WORDS:
            self._word_hashes.clear()
        words = [_words(text) for text in texts]
        hashes = np.fromiter(
            map(self._word_hashes.__getitem__, chain.from_iterable(words)), np.uint64, sum(map(len, words))
        )
        shingles, offsets = _shingles(hashes, np.array([len(row) for row in words]))
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets.astype(np.uint64), PERMUTATIONS, _SEED)
        self._sketches.append(np.array(matrix.to_rows(), dtype=np.uint32))
        # Half of the hash is enough to compare two rows, and halves the memory.
        self._shingles += np.split((shingles >> np.uint64(32)).astype(np.uint32), offsets[1:-1])

    def _join_alike(self, parents: list[int]) -> None:
        import numpy as np

        sketches = np.concatenate(self._sketches)
        width = band_rows(self._threshold)
        for start in range(0, PERMUTATIONS - width + 1, width):
            band = np.ascontiguousarray(sketches[:, start : start + width])
            values = band.view(np.dtype((np.void, band.dtype.itemsize * width))).ravel()
            _, bucket, sizes = np.unique(values, return_inverse=True, return_counts=True)
            order = np.argsort(bucket, kind="stable")  # in the order of the data within a bucket
            ends = np.cumsum(sizes)
            for index in np.flatnonzero(sizes > 1):
                self._join_bucket(order[ends[index] - sizes[index] : ends[index]], sketches, parents)

    def _join_bucket(self, members: np.ndarray, sketches: np.ndarray, parents: list[int]) -> None:
        roots = {_root(parents, int(member)) for member in members}
        if len(roots) == 1:
            return
        for position in range(1, len(members)):
            row = int(members[position])
            before = members[max(0, position - _WINDOW) : position]
            likeness = (sketches[before] == sketches[row]).mean(axis=1)
            for other in before[likeness >= self._threshold - _MARGIN]:
                one, two = _root(parents, row), _root(parents, int(other))
                if one != two and jaccard(self._shingles[row], self._shingles[int(other)]) >= self._threshold:
                    parents[max(one, two)] = min(one, two)


def band_rows(threshold: float) -> int:
    """Values in a band of the sketch: as many as find two rows at the threshold with the wanted probability.

    Source: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4.2: two rows of similarity s agree in
        at least one of b bands of r values with probability 1 - (1 - s^r)^b.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= _RECALL:
            return rows
    return 1


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Common share of the distinct values of two arrays that are not empty."""
    import numpy as np

    one, two = np.unique(first), np.unique(second)
    common = len(np.intersect1d(one, two, assume_unique=True))
    return common / (len(one) + len(two) - common)


def _words(text: str) -> list[str]:
    """Words in lower case, at least five: a shorter text is filled up and has one shingle."""
    lower = text.lower()
    words = lower.split() if text.isascii() else _WORD.findall(lower)
    return words + [""] * (WORDS_PER_SHINGLE - len(words))


def _shingles(words: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of every 5 words in a row of one text, and where each text's begin, the end included.

    Args:
        words: Hashes of the words of all texts, one after the other.
        lengths: Words of each text, at least 5.
    """
    import numpy as np

    count = len(words) - WORDS_PER_SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place, multiplier in enumerate(_MULTIPLIERS):
        hashes += words[place : place + count] * np.uint64(multiplier)  # modulo 2^64
    inside = np.ones(count, dtype=bool)
    for before in range(1, WORDS_PER_SHINGLE):
        inside[np.cumsum(lengths)[:-1] - before] = False  # those reach into the next text
    hashes = hashes[inside]
    hashes ^= hashes >> np.uint64(32)
    offsets = np.concatenate([[0], np.cumsum(lengths - WORDS_PER_SHINGLE + 1)])
    return hashes * np.uint64(0x9FB21C651E98DF25), offsets


def _content(example: Mapping[str, Any]) -> tuple[str, str]:
    """What makes two examples equal, and the words that make them alike."""
    messages = example.get("messages")
    if messages is None:
        texts = [str(text) for text in example.values()]
        return _SEPARATOR.join([*example, *texts]), " ".join(texts)
    parts: list[str] = []
    words: list[str] = []
    for message in messages:
        content = message["content"]
        parts += (message["role"], content)
        if message["role"] != "system":
            words.append(content)
        if len(message) > 2:
            extra = json.dumps({k: v for k, v in message.items() if k not in ("role", "content")}, sort_keys=True)
            parts.append(extra)
            words.append(extra)
    return _SEPARATOR.join(parts), " ".join(words)


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index
