"""Every row that cannot be read has its file, its line and a reason; a file that cannot be read says why."""

import csv
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.config import DatasetFiles
from laras.data import read, sources
from laras.data.read import file_rows
from laras.data.sources import find_sources
from laras.errors import DataError

ROW = {"text": "once"}
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def good(path: Path) -> list:
    rows = list(file_rows(path))
    assert [row for row in rows if row.reason] == []
    return [row.value for row in rows]


def bad(path: Path) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in file_rows(path) if row.reason]


@given(rows=st.lists(st.dictionaries(texts.filter(bool), texts, min_size=1, max_size=3), min_size=1, max_size=5))
def test_jsonl_gives_back_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    assert good(path) == rows


@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_csv_gives_back_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "completion"), *rows])
    found = list(file_rows(path))
    # A carriage return in a quoted field may come back as it is or as a line end of the field.
    assert [row.value for row in found if not row.reason] == [{"prompt": p, "completion": c} for p, c in rows]


def test_a_row_of_jsonl_keeps_its_line_past_blank_lines_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [(row.line, row.value) for row in file_rows(path)] == [(1, {"text": "a"}), (4, {"text": "b"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": }\n', "malformed JSON: Expecting value at column 10"),
        (b'{"text": "caf\xe9"}\n', "not UTF-8: byte 0xe9 at position 14"),
        (b'{"text": "on', "truncated last line: the file ends inside a JSON value"),
        (b'{"text": "\\ud83d"}\n', "a \\u escape that is half of a character (a lone surrogate)"),
        (b"[" * 200_000 + b"\n", "malformed JSON: nested too deeply"),
    ],
)
def test_a_line_that_is_no_json_is_named_and_the_others_are_read(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line)
    first, second = file_rows(path)
    assert first.value == {"text": "a"}
    assert (second.line, second.reason) == (2, reason)


def test_numbers_that_only_python_writes_are_read(tmp_path):
    (row,) = good(write(tmp_path / "a.jsonl", '{"text": "a", "score": NaN}\n'))
    assert row["text"] == "a"


def test_a_huge_line_is_named_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_LINE_BYTES", 50)
    path = write(tmp_path / "a.jsonl", b'{"text": "' + b"x" * 500 + b'"}\n' + b'{"text": "b"}\n' + b"y" * 200)
    assert bad(path) == [
        (1, "a line of 513 bytes; the limit is 50"),
        (3, "a line of 200 bytes; the limit is 50"),
    ]
    assert good(write(tmp_path / "b.jsonl", b'{"text": "' + b"x" * 37 + b'"}\n')) == [{"text": "x" * 37}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_utf_16_is_refused_for_the_whole_file(tmp_path, name):
    path = write(tmp_path / name, json.dumps(ROW).encode("utf-16"))
    with pytest.raises(DataError, match=f"{name}:1: the file is UTF-16") as caught:
        list(file_rows(path))
    assert "save it as UTF-8" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([ROW, ROW], indent=1),
        json.dumps({"version": 1, "data": [ROW, ROW]}),
        json.dumps(ROW) + "\n" + json.dumps(ROW),
        "\ufeff" + json.dumps([ROW, ROW]),
        '[{"text": "once"}, {"text": "once", "score": NaN}]',
    ],
)
def test_json_may_be_a_list_an_object_with_one_list_or_lines(tmp_path, content):
    assert [row["text"] for row in good(write(tmp_path / "a.json", content))] == ["once", "once"]


def test_json_object_that_is_one_example_is_one_row(tmp_path):
    conversation = {"messages": [{"role": "user", "content": "q"}]}
    assert good(write(tmp_path / "a.json", json.dumps(conversation))) == [conversation]
    assert good(write(tmp_path / "b.json", json.dumps(ROW))) == [ROW]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"},\n{"text": "b"', "a.json:2: truncated JSON"),
        (b'[{"text": "a"},\n{"text" "b"}]', "a.json:2: malformed JSON: Expecting ':' delimiter at column 9"),
        (b'[{"text": "a"},\n{"text": "\xe9"}]', "a.json:2: not UTF-8: byte 0xe9"),
        (b'[{"text": "\\ud83d"}]', "half of a character"),
        (b"[" * 200_000, "nested too deeply"),
        (b'"text"', "neither a list nor an object"),
        (b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "2 lists of rows: a, b"),
    ],
)
def test_a_json_file_that_cannot_be_read_says_where_and_why(tmp_path, content, message):
    with pytest.raises(DataError) as caught:
        list(file_rows(write(tmp_path / "a.json", content)))
    assert message in caught.value.message
    assert caught.value.hint


def test_csv_rows_keep_the_line_they_begin_on(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,completion\n"two\nlines",a\n\nq,b\n')
    assert [(row.line, row.value["completion"]) for row in file_rows(path)] == [(2, "a"), (5, "b")]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.tsv", "\t"), ("a.csv", ",")])
def test_csv_may_be_separated_by_commas_semicolons_or_tabs(tmp_path, name, mark):
    assert good(write(tmp_path / name, f"prompt{mark}completion\nq{mark}a\n")) == [{"prompt": "q", "completion": "a"}]


def test_every_bad_row_of_csv_is_named_in_one_pass(tmp_path):
    path = write(tmp_path / "a.csv", b'prompt,completion\nq,a,b\nq\n"x"y,z\nq,caf\xe9\ngood,row\n"open,a\n')
    assert bad(path) == [
        (2, "3 fields where the header has 2"),
        (3, "1 fields where the header has 2"),
        (4, "malformed CSV: ',' expected after '\"'"),
        (5, "not UTF-8: byte 0xe9 at position 6"),
        (7, "truncated last row: a quote is never closed"),
    ]


def test_a_huge_line_of_csv_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_LINE_BYTES", 50)
    path = write(tmp_path / "a.csv", "text,label\n" + "x" * 100 + ",a\ny,b\n")
    assert bad(path) == [(2, "a line of 103 bytes; the limit is 50")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"prompt,completion\n', "malformed header"),
        (b"text,text\na,b\n", "names text twice"),
        (b"t\xe9xt,label\na,b\n", "header is not UTF-8"),
    ],
)
def test_a_csv_header_that_cannot_be_used_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        list(file_rows(write(tmp_path / "a.csv", content)))
    assert "a.csv:1" in caught.value.message
    assert caught.value.hint


def test_parquet_rows_are_numbered(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    assert [tuple(row) for row in file_rows(path)] == [(1, {"text": "a"}, None), (2, {"text": "b"}, None)]


def test_a_damaged_parquet_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no Parquet file, or a damaged one"):
        list(file_rows(write(tmp_path / "a.parquet", b"PAR1 nothing")))


def test_a_file_that_vanishes_is_an_error_of_its_own(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        list(file_rows(tmp_path / "gone.jsonl"))


# ---------------------------------------------------------------- what a dataset names


def names(dataset) -> list[tuple[str, str | None]]:
    return [(Path(source.record.path).name, source.part) for source in find_sources(dataset)]


def test_folder_glob_and_file_are_found_in_order(tmp_path):
    for name in ("b.jsonl", "a.csv", "deep/c.parquet", ".hidden.jsonl", "notes.md"):
        write(tmp_path / name, "text\n")
    assert names(str(tmp_path)) == [("a.csv", None), ("b.jsonl", None), ("c.parquet", None)]
    assert names(str(tmp_path / "*.jsonl")) == [(".hidden.jsonl", None), ("b.jsonl", None)]
    assert names(str(tmp_path / "b.jsonl")) == [("b.jsonl", None)]


def test_the_home_folder_is_known_and_a_url_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", "{}")
    assert names("~/a.jsonl") == names("~/*.jsonl") == [("a.jsonl", None)]
    with pytest.raises(DataError, match="is a URL") as caught:
        find_sources("https://example.com/a.jsonl")
    assert "download" in caught.value.hint


def test_a_relative_glob_keeps_the_name_the_user_gave(tmp_path, monkeypatch):
    write(tmp_path / "data" / "a.jsonl", "{}")
    monkeypatch.chdir(tmp_path)
    (source,) = find_sources("data/*.jsonl")
    assert source.record.path == "data/a.jsonl"


def test_a_folder_of_named_parts_keeps_them(tmp_path):
    for name in ("valid.jsonl", "train.jsonl", "test.jsonl"):
        write(tmp_path / name, "{}")
    assert names(str(tmp_path)) == [("train.jsonl", "train"), ("valid.jsonl", "validation"), ("test.jsonl", "test")]


def test_parts_are_read_train_first(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.jsonl", "{}")
    parts = DatasetFiles(
        train=(str(tmp_path / "d.jsonl"), str(tmp_path / "c.jsonl")),
        validation=str(tmp_path / "b.jsonl"),
        test=str(tmp_path / "a.jsonl"),
    )
    assert names(parts) == [("d.jsonl", "train"), ("c.jsonl", "train"), ("b.jsonl", "validation"), ("a.jsonl", "test")]


def test_the_builtin_dataset_has_a_stable_digest():
    (one,), (two,) = find_sources("builtin:stdlib"), find_sources("builtin:stdlib")
    assert one.record == two.record
    assert next(iter(one.rows())).value.keys() == {"messages"}


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("chat.jsonl", "no file or folder", "did you mean"),
        ("else.jsonl", "no file or folder", "check the path"),
        ("none/chats.jsonl", "no file or folder", "does not exist"),
        ("*.csv", "no file matches", "check the pattern"),
        ("empty.jsonl", "the file is empty", "put examples into it"),
        ("notes.md", "unknown kind of file '.md'", ".parquet"),
        ("folder", "has no data file; it holds readme.txt", ".jsonl"),
        ("bare", "has no data file; it holds no file", ".jsonl"),
    ],
)
def test_a_dataset_that_is_not_there_says_what_to_do(tmp_path, name, message, hint):
    write(tmp_path / "chats.jsonl", "{}")
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "notes.md", "x")
    write(tmp_path / "folder" / "readme.txt", "x")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError) as caught:
        find_sources(str(tmp_path / name))
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3


def test_unknown_builtin_is_refused():
    with pytest.raises(DataError, match="no built-in dataset"):
        find_sources("builtin:else")


def test_all_missing_parts_are_named_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        find_sources(DatasetFiles(train=str(tmp_path / "a.jsonl"), test=str(tmp_path / "b.jsonl")))
    assert [problem.rsplit("/", 1)[1] for problem in caught.value.problems] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="no file or folder") as caught:
        find_sources(DatasetFiles(train=str(tmp_path / "a.jsonl")))
    assert caught.value.problems == ()


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (
            ["data/test-00000-of-00001.jsonl", "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            ["train", "train", "test"],
        ),
        (["dev/chats.jsonl", "train/chats.jsonl"], ["train", "validation"]),
        (["my_train_set.jsonl", "my_test_set.jsonl"], ["train", "test"]),
        (["train.jsonl", "more.jsonl"], [None, None]),
        (["unit_test_questions.jsonl", "others.jsonl"], [None, None]),
    ],
)
def test_files_whose_names_hold_their_part_keep_it_in_a_folder_and_in_a_glob(tmp_path, names, parts):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "one"}\n')
    assert [source.part for source in find_sources(str(tmp_path))] == parts
    assert [source.part for source in find_sources(f"{tmp_path}/**/*.jsonl")] == parts


def test_files_of_no_part_beside_train_and_test_are_refused_by_name(tmp_path):
    for name in ("train", "test", "more"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n')
    for dataset in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match=r"of train and of test, and 1 whose part is not .*more\.jsonl\n") as caught:
            find_sources(str(dataset))
        assert "dataset: {train:" in caught.value.hint
    assert [source.part for source in find_sources(DatasetFiles(train=str(tmp_path)))] == ["train"] * 3


def test_all_unusable_files_of_a_glob_are_named_at_once(tmp_path):
    write(tmp_path / "a.jsonl", "")
    write(tmp_path / "b.md", "x")
    with pytest.raises(DataError, match="2 data files") as caught:
        find_sources(str(tmp_path / "*"))
    assert len(caught.value.problems) == 2


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "{}")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        find_sources(str(path))


# ---------------------------------------------------------------- the Hub, by the same library from a folder here


def test_unknown_hub_dataset_or_no_network_is_a_clear_error():
    with pytest.raises(DataError, match="no file or folder here, and no dataset could be loaded") as caught:
        find_sources("laras-tune/no-such-dataset")
    assert "check the name and the network" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder that `datasets` loads as it loads a repository of the Hub."""
    root = tmp_path_factory.mktemp("hub")
    for split in ("train", "validation", "test"):
        write(root / "whole" / f"{split}.jsonl", json.dumps({"text": split}) + "\n")
    write(root / "single" / "train.jsonl", json.dumps({"text": "only"}) + "\n")
    write(root / "odd" / "test.jsonl", json.dumps({"text": "t"}) + "\n")
    write(root / "odd" / "validation.jsonl", json.dumps({"text": "v"}) + "\n")
    return root


def hub_rows(name: str, part=None):
    found = sources._hub(name, part)
    return [(source.part, [row.value["text"] for row in source.rows()]) for source in found]


def test_splits_of_a_hub_dataset_stay_what_they_are(hub):
    assert hub_rows(f"{hub}/whole") == [
        ("train", ["train"]),
        ("validation", ["validation"]),
        ("test", ["test"]),
    ]
    assert hub_rows(f"{hub}/whole:default:test") == [(None, ["test"])]
    assert hub_rows(f"{hub}/whole", "test") == [("test", ["test"])]
    assert hub_rows(f"{hub}/single") == [(None, ["only"])]
    assert hub_rows(f"{hub}/single", "validation") == [("validation", ["only"])]


def test_split_that_a_hub_dataset_lacks_is_named(hub):
    with pytest.raises(DataError, match="no split 'dev'") as caught:
        hub_rows(f"{hub}/whole:default:dev")
    assert "train, validation, test" in caught.value.hint
    with pytest.raises(DataError, match="none named train"):
        hub_rows(f"{hub}/odd")
    with pytest.raises(DataError, match="no split 'train'"):
        hub_rows(f"{hub}/odd", "train")


def zstd(content):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\n{"text": \n{"text": "b"}\n'),
        ("a.CSV", b'text,n\na,1\n"two\nlines",2\nb\n'),
        ("a.json", b'[{"text": "a"}, {"text": "b"}]'),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n'),
    ],
)
def test_compressed_text_is_read_as_what_it_stands_for(tmp_path, name, content, ending):
    (tmp_path / name).write_bytes(content)
    plain = list(file_rows(tmp_path / name))
    packed = tmp_path / "packed" / f"{name}{ending}"
    packed.parent.mkdir()
    packed.write_bytes(PACKED[ending](content))
    (source,) = find_sources(str(packed.parent))
    assert list(source.rows()) == plain
    assert source.record.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()
    packed.write_bytes(2 * PACKED[ending](b'{"text": "a"}\n'))  # two files, one behind the other
    if name == "a.jsonl":
        assert [row.line for row in file_rows(packed)] == [1, 2]


@pytest.mark.parametrize("ending", ["", *PACKED])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_of_lines_is_opened_once_and_known_by_its_first_bytes_however_they_are_packed(
    tmp_path, monkeypatch, name, ending
):
    pack, opened, original = PACKED.get(ending, bytes), [], Path.open

    def spied(path, *given, **named):
        opened.append(path)
        return original(path, *given, **named)

    def in_parts(content):
        return write(tmp_path / f"{name}{ending}", b"".join(pack(content[at : at + 1]) for at in range(len(content))))

    text = b"text\nonce\n" if name == "a.csv" else b'{"text": "once"}\n'
    monkeypatch.setattr(Path, "open", spied)
    for content in (text, b"\xef\xbb\xbf" + text):
        path = in_parts(content)
        opened.clear()
        assert good(path) == [ROW]
        assert opened == [path]
    for content in (text.decode().encode("utf-16"), text.decode().encode("utf-16-le"), b"\n\0" + text):
        with pytest.raises(DataError, match="the file is UTF-16"):
            list(file_rows(in_parts(content)))
    for content in (b"", b"\n"):
        assert good(in_parts(content)) == []


@pytest.mark.parametrize("dataset", ["", "*.jsonl*"])
@pytest.mark.parametrize("names", [("a.jsonl", "a.jsonl.gz"), ("a.jsonl.gz", "a.jsonl.zst")])
def test_a_file_and_its_compressed_twin_are_not_both_read(tmp_path, names, dataset):
    for name in names:
        (tmp_path / name).write_bytes(PACKED.get(Path(name).suffix, bytes)(b'{"text": "a"}\n'))
    with pytest.raises(DataError) as caught:
        find_sources(str(tmp_path / dataset))
    assert caught.value.problems == (
        f"{tmp_path / names[1]}: by its name it holds what {names[0]} does, and its rows would count twice",
    )
    assert len(find_sources(str(tmp_path / names[1]))) == 1


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.jsonl.xz", "a.gz"])
def test_other_compressed_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match="unknown kind of file") as caught:
        find_sources(str(tmp_path / name))
    assert "unpacked" in caught.value.hint and ".gz or .zst" in caught.value.hint
