"""Data written by an attacker ends in a named row or a DataError: no hang, no crash, nothing executed."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import resource
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laras.data import read
from laras.data.limits import memory_limit
from laras.data.read import MAX_LINE_BYTES, SourceRow
from laras.data.sources import find_sources
from laras.errors import DataError, ExitCode

GOOD = b'{"text": "a"}\n'


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def rows(path: Path | str) -> list[SourceRow]:
    return [row for source in find_sources(str(path)) for row in source.rows()]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n", "nested too deeply"),
        (b"\0" * 1000 + b"\n", "malformed JSON"),
        (b'{"text": "\\ud800"}\n', "lone surrogate"),
        (b'{"\\ud800": 1}\n', "lone surrogate"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", "digits"),
    ],
)
def test_a_hostile_line_costs_its_row_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    read = rows(written(tmp_path / "a.jsonl", GOOD + line + GOOD))
    assert [row.line for row in read if row.reason is None] == [1, 3]
    bad = [row for row in read if row.reason]
    assert [row.line for row in bad] == [2]
    assert reason in bad[0].reason


def test_a_line_of_100_mb_is_named_and_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"a" * 2**20)
        file.write(b'"}\n' + GOOD)
    tracemalloc.start()
    try:
        read = rows(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row.line for row in read] == [1, 2, 3]
    assert "104,857,6" in read[1].reason and f"{MAX_LINE_BYTES:,}" in read[1].reason
    assert peak_bytes < 2.5 * MAX_LINE_BYTES


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b"[" + b"9" * 5000 + b"]",
        b'[{"text": "\\ud800"}]',
        b'[{"text": "a"},',
        b'[{"text": "\xff"}]',
        b"\0",
        b"5",
        b'{"a": [{}], "b": [{}]}',
    ],
)
def test_a_hostile_json_document_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.json") as caught:
        rows(written(tmp_path / "a.json", content))
    assert caught.value.exit_code == ExitCode.DATA
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'text\n"' + b"a" * (MAX_LINE_BYTES + 9) + b'"\n', "limit"),
        (b'text\n"' + b"a\n" * 100_000, "never closed"),
        (b"text\n\xff\n", "not UTF-8"),
        (b",".join(b"c%d" % number for number in range(100_000)) + b"\n1\n", "1 fields"),
    ],
)
def test_a_hostile_csv_row_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (row,) = rows(written(tmp_path / "a.csv", content))
    assert row.line == 2
    assert reason in row.reason


def test_a_csv_header_of_a_million_equal_names_is_refused_quickly(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice") as caught:
        rows(written(tmp_path / "a.csv", b"a," * 1_000_000 + b"a\n"))
    assert len(str(caught.value)) < 1000


def parquet(column: pa.Array) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": column}), file)
    return file.getvalue()


def test_what_is_no_parquet_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    whole = parquet(pa.array(["a", "b"] * 100))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("data.pkl", pickle.dumps(Touch(tmp_path / "ran")))
    hostile = {
        "truncated": whole[:-20],
        "half": whole[: len(whole) // 2],
        "zip": archive.getvalue(),
        "pickle": pickle.dumps(Touch(tmp_path / "ran")),
        "lying footer": whole[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1",
        "short footer": whole[:-8] + (10).to_bytes(4, "little") + b"PAR1",
        "zeros": b"PAR1" + bytes(100) + b"PAR1",
        "far future": parquet(pa.array([2**62], pa.timestamp("ms"))),
        "far day": parquet(pa.array([2**31 - 1], pa.date32())),
        "unknown zone": parquet(pa.array([1], pa.timestamp("us", "Mars/Olympus"))),
    }
    for name, content in hostile.items():
        with pytest.raises(DataError, match=r"a\.parquet") as caught:
            rows(written(tmp_path / "a.parquet", content))
        assert caught.value.hint, name
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.parquet"]


def write_parquet(path: Path, column: pa.Array) -> Path:
    pq.write_table(pa.table({"text": column}), path, compression="zstd")
    return path


def repeated(value: str, count: int) -> pa.Array:
    """One value in the file, however often it stands in the table."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the bound on memory is the kernel's of Linux")
def test_a_parquet_file_of_600_bytes_that_stands_for_60_gb_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_MOST_DECODED_BYTES", 2**28)
    path = write_parquet(tmp_path / "a.parquet", repeated("a" * 3_000_000, 20_000))
    assert path.stat().st_size < 2_000
    before = resident_peak_bytes()
    with pytest.raises(DataError, match=r"expands too much: decoding what follows row 0 takes more than 268,435,456"):
        rows(path)
    assert resident_peak_bytes() - before < 2**29


def resident_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_parquet_file_of_rows_without_number_or_of_rows_without_content_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_MOST_ROWS", 100_000)
    monkeypatch.setattr(read, "_FREE_BYTES", 2**20)
    path = write_parquet(tmp_path / "a.parquet", pa.array([None] * 200_000, pa.int8()))
    with pytest.raises(DataError, match="expands too much: 200,000 rows in a file of") as caught:
        rows(path)
    assert caught.value.exit_code == ExitCode.DATA and caught.value.hint
    path = write_parquet(tmp_path / "b.parquet", repeated("a" * 1_000, 90_000))
    with pytest.raises(DataError, match="bytes of rows in a file of"):
        rows(path)


def test_a_parquet_row_that_is_too_large_is_named_and_costs_its_row_alone(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(["a", "b" * (MAX_LINE_BYTES + 1), "c"]))
    read_rows = rows(path)
    assert [(row.line, row.value) for row in read_rows if row.reason is None] == [
        (1, {"text": "a"}),
        (3, {"text": "c"}),
    ]
    assert read_rows[1].line == 2 and f"the limit is {MAX_LINE_BYTES:,}" in str(read_rows[1].reason)


def test_dictionaries_in_a_parquet_file_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    table = pa.table(
        {
            "text": words.slice(0, 2),
            "list": pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), words),
            "struct": pa.StructArray.from_arrays([words.slice(1, 2)], ["deep"]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row.value for row in rows(tmp_path / "a.parquet")] == [
        {"text": "a", "list": ["a"], "struct": {"deep": "b"}},
        {"text": "b", "list": ["b", "a"], "struct": {"deep": "a"}},
    ]


def test_the_bound_on_memory_ends_with_its_block(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), memory_limit(2**26):
        bytearray(2**28)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with pytest.raises(KeyError), memory_limit(2**26):
        raise KeyError
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    bytearray(2**28)


def test_blocks_of_several_threads_leave_no_bound_behind() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    first, second = memory_limit(2**30), memory_limit(2**31)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # in the order of threads, not of blocks
    assert resource.getrlimit(resource.RLIMIT_AS) != before
    second.__exit__(None, None, None)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_links_in_circles_and_pipes_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "up").symlink_to("..")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("/nonexistent/file")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert len(rows(tmp_path)) == 1
    for name in ("pipe.jsonl", "self.jsonl", "zero.jsonl", "gone.jsonl", "loop"):
        with pytest.raises(DataError, match="neither a regular file nor a folder"):
            rows(tmp_path / name)


def test_a_file_name_with_a_line_end_stays_one_line_of_the_error(tmp_path: Path) -> None:
    written(tmp_path / "b\n\x1b[31mc.xml", b"x")
    with pytest.raises(DataError) as caught:
        rows(tmp_path / "b\n\x1b[31mc.xml")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_name_that_no_record_can_hold_is_refused(tmp_path: Path) -> None:
    try:
        written(tmp_path / os.fsdecode(b"\xff.jsonl"), GOOD)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(DataError, match="not UTF-8"):
        rows(tmp_path)


@pytest.mark.parametrize(
    "name", ["a\0b", "\ud800", "a" * 300, "**x", "***", "**/" * 300 + "*.jsonl", "", " ", "[", "~"]
)
def test_an_impossible_path_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        rows(name)
    assert caught.value.hint


def packed(ending: str, content: bytes) -> bytes:
    if ending == ".gz":
        return gzip.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_compressed_file_that_is_cut_or_of_another_kind_is_refused(tmp_path: Path, name: str, ending: str) -> None:
    whole = packed(ending, os.urandom(9_000).hex().encode() * 10)
    for content in (whole[: len(whole) // 2], whole[:6], GOOD, whole + b"behind its end"):
        with pytest.raises(DataError, match=f"no {ending} file, or a damaged one, after [0-9,]+ bytes of text"):
            rows(written(tmp_path / f"{name}{ending}", content))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_bomb_is_refused_in_bounded_memory(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_FREE_BYTES", 2**20)
    line = b'{"text": "a"}' + b" " * 2**20 + b"\n"
    path = written(tmp_path / f"a.jsonl{ending}", packed(ending, line * 64))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="expands too much: more than"):
            list(read.file_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_compressed_line_or_document_that_is_too_long_is_named_and_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MAX_LINE_BYTES", 2**16)
    long = b'{"text": "' + b"a" * 2**17 + b'"}\n'
    found = rows(written(tmp_path / "a.jsonl.gz", gzip.compress(GOOD + long + GOOD)))
    assert [row.line for row in found if row.reason is None] == [1, 3] and "the limit is 65,536" in str(found[1].reason)
    assert len(rows(written(tmp_path / "lines.json.gz", gzip.compress(GOOD * 9_000)))) == 9_000
    with pytest.raises(DataError, match="one JSON document of more than 65,536 bytes"):
        rows(written(tmp_path / "a.json.gz", gzip.compress(b"[" + b"{}," * 2**16 + b"{}]")))
