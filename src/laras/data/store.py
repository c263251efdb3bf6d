"""Tokenised rows on disk, and a digest of what they say.

Columns: `input_ids` and `labels` list<int32> (of one length; labels unshifted, -100 where no loss is taken), `length`
int32 in tokens, `row` int64 (0-based index in the source).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from laras.data.masks import IGNORE_INDEX
from laras.errors import RunStateError
from laras.record_base import replacing

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def token_table(
    input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], rows: Sequence[int] | np.ndarray
) -> pa.Table:
    """Examples as a table of the columns above.

    Raises:
        ValueError: When an example's labels are not as many as its tokens.
    """
    import numpy as np
    import pyarrow as pa

    lengths = [len(ids) for ids in input_ids]
    if lengths != [len(targets) for targets in labels]:
        raise ValueError("every example needs as many labels as tokens")
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    return pa.table(
        {
            "input_ids": _lists(input_ids, offsets),
            "labels": _lists(labels, offsets),
            "length": pa.array(lengths, pa.int32()),
            "row": pa.array(rows, pa.int64()),
        }
    )


def _lists(values: Sequence[Sequence[int]], offsets: np.ndarray) -> pa.ListArray:
    """A list<int32> array, ten times faster than by pyarrow's own conversion of nested lists."""
    import numpy as np
    import pyarrow as pa

    flat = np.fromiter(chain.from_iterable(values), np.int32, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def largest_id(table: pa.Table) -> int:
    """The largest token id of all rows; -1 where there is none."""
    import pyarrow.compute as pc

    found = pc.max(pc.list_flatten(table.column("input_ids"))).as_py()
    return -1 if found is None else int(found)


def write_tokens(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file whole or not at all."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_tokens(path: Path) -> pa.Table:
    """Reads what `write_tokens` wrote.

    Raises:
        RunStateError: When the file is missing or damaged.
    """
    import pyarrow as pa

    try:
        return parquet_table(path.read_bytes())
    except FileNotFoundError:
        raise RunStateError(f"{path} is missing", hint="restore the file, or start a new run") from None
    except (pa.ArrowException, OSError) as error:
        detail = (str(error) or type(error).__name__).splitlines()[0]
        raise RunStateError(f"{path} is damaged: {detail}", hint="restore the file, or start a new run") from None


def parquet_table(content: bytes) -> pa.Table:
    """All rows of a Parquet file's bytes, read by this thread alone.

    Arrow's own threads, which read from files, may still hold what belongs to Python when the interpreter ends, and
    then abort the process in the place of its exit code.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(content)) as file:
        return file.read(use_threads=False)


def prompt_length(labels: Sequence[int]) -> int:
    """Tokens before the first that carries loss: the prompt, down to where the (first) answer begins."""
    return next((index for index, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def tokens_digest(table: pa.Table) -> str:
    """SHA-256 over lengths, token ids and labels in row order, in hexadecimal.

    The same for equal examples however the table is chunked, compressed or stored. Lengths are digested apart from
    the tokens, so that two sets of examples with the same tokens cut elsewhere differ.
    """
    parts = [hashlib.sha256() for _ in range(3)]
    # Chunk by chunk: one array of all tokens can outgrow the 32-bit offsets of Arrow lists.
    for batch in table.select(["input_ids", "labels"]).to_batches():
        ids, labels = batch.column(0), batch.column(1)
        arrays = (ids.value_lengths(), ids.flatten(), labels.flatten())
        for part, array in zip(parts, arrays, strict=True):
            part.update(array.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
