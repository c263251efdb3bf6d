import errno
import hashlib
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.data import sealed
from laras.data.analyze import length_stats
from laras.data.sealed import open_sealed, read_openings, seal_test, unseal
from laras.data.sources import find_sources
from laras.data.store import read_tokens, token_table, tokens_digest, write_tokens
from laras.errors import DataError, ExitCode, RunStateError, SealedTestError
from laras.records import Measured, RunResult, SplitInfo, SplitManifest

SEALED = "splits/sealed/test.sealed"
IDS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
examples = st.lists(st.lists(st.integers(0, 200_000), min_size=1, max_size=6), min_size=1, max_size=8)


def tokens(ids=IDS):
    return token_table(ids, [[-100, *row[1:]] for row in ids], range(len(ids)))


def run_in(folder, status="finished"):
    table = tokens()
    info = SplitInfo(
        rows=4, tokens=length_stats(table["length"].to_numpy(), [2, 1, 0, 3]), sha256=seal_test(table, folder)
    )
    SplitManifest(seed=42, ratios=(0.8, 0.1, 0.1), stratify_by=None, train=info, validation=info, test=info).save(
        folder
    )
    finish(folder, status)
    return folder


def finish(folder, status):
    measured = Measured(peak_allocated_bytes=0, peak_reserved_bytes=0, tokens_per_s=1, elapsed_s=1)
    RunResult(
        status=status, steps=1, epochs=1, train_loss=None, best=None, stopped_early=False, measured=measured
    ).save(folder)


def test_a_finished_run_opens_and_every_opening_is_noted(tmp_path):
    run = run_in(tmp_path)
    assert read_openings(run) == ()
    assert open_sealed(run, "laras test").equals(tokens())
    open_sealed(run, "again", max_samples=2)
    first, second = read_openings(run)
    assert (first.purpose, first.max_samples) == ("laras test", None)
    assert (second.purpose, second.max_samples) == ("again", 2)
    assert first.opened_at.endswith("+00:00")


READS = """
import sys
from pathlib import Path
import pyarrow.parquet
from laras.data.sealed import unseal
from laras.data.store import read_tokens

def threads():
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return sum(name != "jemalloc_bg_thd" for name in names)

folder, digest = Path(sys.argv[1]), sys.argv[2]
before = threads()
assert unseal(folder, digest).equals(read_tokens(folder / "plain.parquet"))
assert threads() == before, "threads of Arrow are left, which may hold the rows when the interpreter ends"
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux tells them")
def test_rows_are_read_by_one_thread_since_others_could_abort_the_process_at_its_end(tmp_path):
    write_tokens(tokens(), tmp_path / "plain.parquet")
    command = [sys.executable, "-c", READS, str(tmp_path), seal_test(tokens(), tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_without_test_rows_says_so_and_notes_no_opening(tmp_path):
    run = run_in(tmp_path)
    manifest = SplitManifest.load(run)
    none = manifest.test.model_copy(update={"rows": 0})
    manifest.model_copy(update={"test": none}).save(run)
    with pytest.raises(SealedTestError, match="has no test set: its split gave the test 0 rows"):
        open_sealed(run, "laras test")
    assert read_openings(run) == ()


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_stays_sealed(tmp_path, status):
    run = run_in(tmp_path, status)
    with pytest.raises(SealedTestError, match=status) as caught:
        open_sealed(run, "a look")
    assert caught.value.exit_code == ExitCode.RUN_STATE
    assert "laras resume" in caught.value.hint
    assert read_openings(run) == ()
    finish(run, "finished")
    assert open_sealed(run, "now").num_rows == 4


def test_a_run_without_a_result_stays_sealed(tmp_path):
    seal_test(tokens(), tmp_path)
    with pytest.raises(SealedTestError, match="no result record"):
        open_sealed(tmp_path, "a look")


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_an_altered_test_set_is_refused_and_not_noted(tmp_path, column):
    run = run_in(tmp_path)
    altered = tokens()
    values = altered[column].to_pylist()
    values[0][1] += 1
    index = altered.column_names.index(column)
    (run / SEALED).unlink()
    seal_test(altered.set_column(index, column, pa.array(values, pa.list_(pa.int32()))), run)
    with pytest.raises(SealedTestError, match="altered"):
        open_sealed(run, "a look")
    assert read_openings(run) == ()


def test_other_rows_written_under_the_recorded_digest_are_refused(tmp_path):
    run = run_in(tmp_path)
    other = pa.BufferOutputStream()
    pq.write_table(tokens([[9, 9, 9], *IDS[1:]]), other)
    plain, digest = other.getvalue().to_pybytes(), SplitManifest.load(run).test.sha256
    forged = sealed._MAGIC + hashlib.sha256(plain).digest() + b"".join(sealed._masked(plain, digest))
    sealed._test_path(run).write_bytes(forged)
    with pytest.raises(SealedTestError, match="altered or damaged"):
        open_sealed(run, "laras test")
    assert read_openings(run) == ()


def test_a_missing_or_broken_test_set_is_refused(tmp_path):
    run = run_in(tmp_path)
    path = run / SEALED
    whole = path.read_bytes()
    for broken in (whole[:-20], whole[:20], whole[:5], b"", whole[:-1] + bytes([whole[-1] ^ 1]), b"PAR1" + whole):
        path.write_bytes(broken)
        with pytest.raises(SealedTestError, match=r"damaged|no sealed test set"):
            open_sealed(run, "a look")
        assert read_openings(run) == ()
    for place in range(15, len(whole), 7):  # any byte, those of the columns beside the tokens included
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(SealedTestError, match="altered or damaged"):
            open_sealed(run, "a look")
    path.unlink()
    with pytest.raises(SealedTestError, match="missing"):
        open_sealed(run, "a look")


def test_a_damaged_ledger_is_refused(tmp_path):
    run = run_in(tmp_path)
    open_sealed(run, "first")
    ledger = run / "splits/sealed/openings.jsonl"
    assert json.loads(ledger.read_text())["purpose"] == "first"
    ledger.write_text(ledger.read_text() + "nonsense\n")
    with pytest.raises(SealedTestError, match=r"openings.jsonl:2"):
        open_sealed(run, "second")
    ledger.write_bytes(b"\xff")
    with pytest.raises(SealedTestError, match="cannot be read"):
        read_openings(run)


def test_what_is_on_disk_is_no_table_and_shows_no_token(tmp_path):
    ids = [[number] * 400 for number in range(1000, 1040)]
    table = token_table(ids, ids, range(len(ids)))
    digest = seal_test(table, tmp_path)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert path == tmp_path / SEALED
    content = path.read_bytes()
    plain = pa.BufferOutputStream()
    pq.write_table(table, plain, compression="zstd")
    assert b"PAR1" not in content and len(content) == len(plain.getvalue()) + len(b"laras sealed 1\n") + 32
    with pytest.raises(pa.ArrowException):
        pq.read_table(path)
    with pytest.raises(DataError, match=r"neither|no data file"):  # a folder that is taken for data does not give it
        find_sources(str(tmp_path / "splits"))
    assert unseal(tmp_path, digest).equals(table)
    with pytest.raises(SealedTestError, match="altered or damaged"):
        unseal(tmp_path, "0" * 64)


def test_a_large_set_is_masked_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("laras.data.sealed._BLOCK_BYTES", 100)
    digest = seal_test(tokens([[number] for number in range(500)]), tmp_path)
    assert unseal(tmp_path, digest).num_rows == 500


def test_an_opening_that_cannot_be_noted_is_none_and_leaves_the_ledger_whole(tmp_path, monkeypatch):
    run = run_in(tmp_path)
    open_sealed(run, "first")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("laras.data.sealed.os.fsync", full)
        with pytest.raises(SealedTestError, match=r"cannot be noted .* No space left on device; nothing was opened"):
            open_sealed(run, "second")
    assert [opening.purpose for opening in read_openings(run)] == ["first"]
    open_sealed(run, "third")
    assert [opening.purpose for opening in read_openings(run)] == ["first", "third"]


def test_a_test_set_is_sealed_once(tmp_path):
    run = run_in(tmp_path)
    with pytest.raises(SealedTestError, match="already"):
        seal_test(tokens(), run)


def test_samples_are_the_same_at_every_opening(tmp_path):
    run = run_in(tmp_path)
    sample = open_sealed(run, "a", 2)
    assert sample.equals(open_sealed(run, "b", 2))
    assert sample.num_rows == 2
    assert sample["row"].to_pylist() == sorted(sample["row"].to_pylist())
    assert open_sealed(run, "c", 100).num_rows == 4
    with pytest.raises(SealedTestError, match="max_samples is 0"):
        open_sealed(run, "d", 0)


@given(examples, st.integers(1, 4))
def test_the_digest_is_of_the_content_not_of_the_storage(ids, chunk):
    table = tokens(ids)
    pieces = pa.concat_tables([table.slice(start, chunk) for start in range(0, table.num_rows, chunk)])
    assert tokens_digest(pieces) == tokens_digest(table)


@given(examples, examples)
def test_other_examples_have_another_digest(first, second):
    assert (tokens_digest(tokens(first)) == tokens_digest(tokens(second))) == (first == second)


def test_tokens_survive_the_disk(tmp_path):
    path = tmp_path / "deep" / "train.parquet"
    write_tokens(tokens(), path)
    back = read_tokens(path)
    assert back.equals(tokens())
    assert tokens_digest(back) == tokens_digest(tokens())
    assert [entry.name for entry in path.parent.iterdir()] == ["train.parquet"]
    pq.write_table(back, path, row_group_size=1, compression="none")
    assert tokens_digest(read_tokens(path)) == tokens_digest(tokens())


def test_missing_and_damaged_files_and_unequal_labels_are_refused(tmp_path):
    with pytest.raises(RunStateError, match="missing"):
        read_tokens(tmp_path / "train.parquet")
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(RunStateError, match="damaged"):
        read_tokens(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="as many labels"):
        token_table([[1, 2]], [[1]], [0])
