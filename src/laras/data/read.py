"""Rows of one data file, each with its line, or with the reason why it cannot be read.

JSONL and CSV are read line by line here, since the readers of `datasets` and `pyarrow` stop at the first malformed
line without naming it. A damaged line costs that row alone; a file that cannot be read at all is a `DataError`.
Text may be compressed (`rows.jsonl.gz`): it is read as it is unpacked, under the same limits.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from laras.data.limits import memory_limit
from laras.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from _typeshed import WriteableBuffer

MAX_LINE_BYTES = 64 * 2**20  # a longer line is no example but a file without line ends
_BATCH_ROWS = 1_000
# Parquet files are compressed: a few bytes can stand for any number of rows, and for rows of any size.
_MOST_DECODED_BYTES = 4 * 2**30  # that decoding a batch may take
_SLICE_BYTES = 16 * 2**20  # of a batch that become Python's objects at once
_MOST_ROWS, _MOST_ROWS_PER_BYTE = 10_000_000, 100
_FREE_BYTES, _MOST_EXPANSION = 2**30, 1_000
_MOST_TEXT_EXPANSION = 200  # of gzip and zstd; text takes a third to a hundredth, zeros a thousandth
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSIONS = (".gz", ".zst")


class SourceRow(NamedTuple):
    """One row of a file.

    Attributes:
        line: 1-based line of JSONL and CSV, row number elsewhere.
        value: What the row holds; None where `reason` says why it holds nothing.
        reason: Why the row cannot be read.
    """

    line: int
    value: Any
    reason: str | None


def file_rows(path: Path) -> Iterator[SourceRow]:
    """Rows in the order of the file; blank lines are no rows.

    Raises:
        DataError: When the file as a whole cannot be read.
    """
    try:
        reader = reader_of(path)
        assert reader is not None  # `find_sources` has refused other kinds
        yield from reader(path)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", hint="check the file and its permissions"
        ) from None


def is_compressed(path: Path) -> bool:
    """Whether its name says that it is unpacked on the way."""
    return path.suffix.lower() in COMPRESSIONS


def reader_of(path: Path) -> Callable[[Path], Iterator[SourceRow]] | None:
    """What reads files of this name, by its ending, or the one before that of a compression; None: nothing does."""
    if not is_compressed(path):
        return READERS.get(path.suffix.lower())
    reader = READERS.get(Path(path.stem).suffix.lower())
    return None if reader is _parquet_rows else reader  # which is read in no order, and compresses by itself


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """The file, unpacked on the way where its name says that it is compressed."""
    with path.open("rb") as file:
        if not is_compressed(path):
            yield file
            return
        unpacked: Any
        if path.suffix.lower() == ".gz":
            unpacked = gzip.GzipFile(fileobj=file)
        else:
            import pyarrow as pa

            unpacked = pa.CompressedInputStream(file, "zstd")
        with io.BufferedReader(_Unpacked(path, unpacked)) as text:
            yield text


class _Unpacked(io.RawIOBase):
    """What a compressed file stands for, as far as it can be read and is no bomb."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._stream, self._size, self._done = path, stream, path.stat().st_size, 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """See `io.RawIOBase`.

        Raises:
            DataError: The file is damaged, of another kind, or stands for far more than it holds.
        """
        try:
            count = int(self._stream.readinto(buffer))
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(
                f"{self._path}: no {self._path.suffix} file, or a damaged one, after {self._done:,} bytes of text: "
                f"{(str(error) or type(error).__name__).splitlines()[0]}",
                hint="download or compress it anew; a file that is not compressed needs another name",
            ) from None
        self._done += count
        if self._done > max(_FREE_BYTES, self._size * _MOST_TEXT_EXPANSION):
            raise _bomb(self._path, f"more than {self._done:,} bytes of text in a file of {self._size:,}")
        return count


def _jsonl_rows(path: Path) -> Iterator[SourceRow]:
    loads = orjson.loads
    for number, line, ended in _lines(path):
        if isinstance(line, str):
            yield SourceRow(number, None, line)
            continue
        try:
            yield SourceRow(number, loads(line), None)
        except orjson.JSONDecodeError:
            if line.strip():
                yield _second_opinion(number, line, ended)


def _lines(path: Path) -> Iterator[tuple[int, bytes | str, bool]]:
    """Number, content (or what is wrong with it) and whether a line end follows, without ever holding a huge line."""
    with _opened(path) as file:
        start = file.peek(3)[:3]  # of all that fills a buffer: neither a file nor what unpacks one stops before
        if _is_utf16(start):
            raise DataError(f"{path}:1: the file is UTF-16, not UTF-8", hint="save it as UTF-8")
        if start == _BYTE_ORDER_MARK:
            file.read(len(start))
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
                yield number, line, line.endswith(b"\n")
                continue
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                size += len(line)
            yield number, f"a line of {size:,} bytes; the limit is {MAX_LINE_BYTES:,}", True


def _is_utf16(start: bytes) -> bool:
    """By its mark, or by the zero that every other byte of plain characters is."""
    return start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start


def _second_opinion(number: int, line: bytes, ended: bool) -> SourceRow:
    """Why a line is no JSON; or its value, where the standard library is more lenient (NaN, big numbers)."""
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return SourceRow(number, None, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}")
    except UnicodeEncodeError:
        return SourceRow(number, None, "a \\u escape that is half of a character (a lone surrogate)")
    except RecursionError:
        return SourceRow(number, None, "malformed JSON: nested too deeply")
    except ValueError as error:
        if not ended:
            return SourceRow(number, None, "truncated last line: the file ends inside a JSON value")
        return SourceRow(number, None, f"malformed JSON: {_json_detail(error)}")
    return SourceRow(number, value, None)


def _json_detail(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _json_rows(path: Path) -> Iterator[SourceRow]:
    """A list of rows, an object with one list, or lines of objects under a name that ends in .json."""
    has_limit = is_compressed(path)
    with _opened(path) as file:
        content = file.read(MAX_LINE_BYTES + 1 if has_limit else -1)
    if _is_utf16(content[:3]):
        raise DataError(f"{path}:1: the file is UTF-16, not UTF-8", hint="save it as UTF-8")
    content = content.removeprefix(_BYTE_ORDER_MARK)
    if has_limit and len(content) > MAX_LINE_BYTES and not _is_jsonl(content):
        raise DataError(
            f"{path}: one JSON document of more than {MAX_LINE_BYTES:,} bytes, the limit of a compressed one",
            hint="unpack it, or write JSONL, which is read line by line",
        )
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        if _is_jsonl(content):
            yield from _jsonl_rows(path)
            return
        document = _lenient_document(path, content)
    yield from (SourceRow(number, row, None) for number, row in enumerate(_listed(path, document), start=1))


def _listed(path: Path, document: Any) -> list[Any]:
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        lists = {
            key: value
            for key, value in document.items()
            if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
        }
        # `messages` and `conversations` are lists of objects too: such a document is one example.
        if len(lists) == 1 and not lists.keys() & {"messages", "conversations"}:
            return next(iter(lists.values()))
        if len(lists) < 2:
            return [document]
        raise DataError(
            f"{path}: the object has {len(lists)} lists of rows: {', '.join(lists)}", hint="keep one, or write JSONL"
        )
    raise DataError(f"{path}: the file holds neither a list nor an object", hint="write a list of objects, or JSONL")


def _is_jsonl(content: bytes) -> bool:
    first, separator, _ = content.lstrip().partition(b"\n")
    try:
        return bool(separator) and isinstance(orjson.loads(first), dict)
    except orjson.JSONDecodeError:
        return False


def _lenient_document(path: Path, content: bytes) -> Any:
    try:
        text = content.decode("utf-8")
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = f"{path}:{line}: not UTF-8: byte 0x{content[error.start]:02x}"
        raise DataError(problem, hint="save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise DataError(f"{path}: a \\u escape that is half of a character", hint="write the file anew") from None
    except RecursionError:
        raise DataError(f"{path}: malformed JSON: nested too deeply", hint="write a list of flat objects") from None
    except json.JSONDecodeError as error:
        kind = "truncated JSON" if error.pos >= len(text.rstrip()) else "malformed JSON"
        raise DataError(
            f"{path}:{error.lineno}: {kind}: {_json_detail(error)}",
            hint="write the file anew; in JSONL, one object a line, a damaged line costs one row only",
        ) from None
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{path}: malformed JSON: {error}", hint="write so long a number as a text") from None
    return document


def _csv_rows(path: Path) -> Iterator[SourceRow]:
    damaged: dict[int, str] = {}
    lines = _decoded_lines(path, damaged)
    try:
        first = next(lines, "")
        # Spreadsheets of many countries write semicolons.
        delimiter = max(",;\t", key=first.count)
        csv.field_size_limit(MAX_LINE_BYTES)
        reader = csv.reader(_chained(first, lines), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}:1: malformed header: {error}", hint="the first line names the columns") from None
    if doubled := sorted(name for name, count in Counter(header).items() if count > 1):
        shown = ", ".join(name[:80] or "''" for name in doubled[:10])
        raise DataError(f"{path}:1: the header names {shown} twice", hint="give each column its own name")
    if 1 in damaged:
        raise DataError(f"{path}:1: the header is {damaged[1]}", hint="save the file as UTF-8")
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            ended = "unexpected end" in str(error)
            reason = "truncated last row: a quote is never closed" if ended else f"malformed CSV: {error}"
            yield SourceRow(start, None, reason)
            continue
        wrong = next((damaged[line] for line in range(start, reader.line_num + 1) if line in damaged), None)
        if wrong:
            yield SourceRow(start, None, wrong)
        elif len(cells) == len(header):
            yield SourceRow(start, dict(zip(header, cells, strict=True)), None)
        elif cells:  # a blank line is no row
            yield SourceRow(start, None, f"{len(cells)} fields where the header has {len(header)}")


def _decoded_lines(path: Path, damaged: dict[int, str]) -> Iterator[str]:
    """Lines as text; what is wrong with one is noted under its number, and its row is then left out."""
    for number, line, _ in _lines(path):
        if isinstance(line, str):
            damaged[number] = line
            yield "\n"
            continue
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            damaged[number] = f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
            yield line.decode("utf-8", "replace")


def _chained(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, decoded, size = 0, 0, path.stat().st_size
    try:
        with memory_limit(_MOST_DECODED_BYTES):
            file = pq.ParquetFile(path)
        with file:
            rows = file.metadata.num_rows
            if rows > max(_MOST_ROWS, size * _MOST_ROWS_PER_BYTE):
                raise _bomb(path, f"{rows:,} rows in a file of {size:,} bytes")
            batches = file.iter_batches(batch_size=_BATCH_ROWS)
            while True:
                with memory_limit(_MOST_DECODED_BYTES):
                    batch = next(batches, None)
                    batch = batch if batch is None else _without_dictionaries(batch)
                if batch is None:
                    return
                decoded += batch.nbytes
                if decoded > max(_FREE_BYTES, size * _MOST_EXPANSION):
                    raise _bomb(path, f"more than {decoded:,} bytes of rows in a file of {size:,}")
                for row in _table_rows(batch, number):
                    yield row
                    number = row.line
    except MemoryError:
        raise _bomb(path, f"decoding what follows row {number} takes more than {_MOST_DECODED_BYTES:,} bytes") from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # a date may be beyond those of Python
        detail = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path}: no Parquet file, or a damaged one, after row {number}: {detail}", hint="write the file anew"
        ) from None


def _without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with every value written out, so that its size is that of its rows."""
    import pyarrow as pa

    schema = pa.schema([field.with_type(_written_out(field.type)) for field in batch.schema])
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def _written_out(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _written_out(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_written_out(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_written_out(kind.value_type)))
    return kind


def _table_rows(batch: pa.RecordBatch, before: int) -> Iterator[SourceRow]:
    """Rows of a batch, so many at once as are of moderate size; one that is too large is named."""
    step = max(1, batch.num_rows * _SLICE_BYTES // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, step):
        part = batch.slice(start, step)
        if part.nbytes <= MAX_LINE_BYTES:
            yield from (SourceRow(before + start + n, row, None) for n, row in enumerate(part.to_pylist(), start=1))
            continue
        for n in range(part.num_rows):
            row, line = part.slice(n, 1), before + start + n + 1
            if row.nbytes > MAX_LINE_BYTES:
                yield SourceRow(line, None, f"a row of {row.nbytes:,} bytes; the limit is {MAX_LINE_BYTES:,}")
            else:
                yield SourceRow(line, row.to_pylist()[0], None)


def _bomb(path: Path, what: str) -> DataError:
    return DataError(f"{path} expands too much: {what}", hint="write the rows as JSONL, or in several files")


READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
