"""The sealed test set: written once, opened only for a finished run, every opening noted.

Its digest is in the run's split manifest; the ledger is a JSONL file beside it. The seal guards against honest
mistakes, not against somebody who edits the records: training code cannot name this module (an import contract),
and a look at the test set before the end of training cannot happen by accident.

On disk the rows are no table: their bytes are masked with a stream that is drawn from their digest. So whoever takes
all Parquet files of a folder for data does not get them, and a set whose digest is not the recorded one does not open.
The cache of prepared data seals its test part in the same way.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from laras import __version__
from laras.data.store import parquet_table, tokens_digest
from laras.errors import RunStateError, SealedTestError
from laras.record_base import replacing
from laras.records import Opening, RunResult, SplitManifest
from laras.sweep_record import SweepRecord, sweep_of, trial_dir

if TYPE_CHECKING:
    import pyarrow as pa


_MAGIC = b"laras sealed 1\n"
_BLOCK_BYTES = 2**24  # masked at once


def seal_test(table: pa.Table, folder: Path) -> str:
    """Writes the test rows, sealed, into a run (or an entry of the cache), whole or not at all.

    Returns:
        Their digest, for `SplitManifest.test.sha256`; without it they cannot be opened.

    Raises:
        SealedTestError: When there is a sealed test set already.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _test_path(folder)
    if path.exists():
        raise SealedTestError(f"{folder} has a sealed test set already", hint="start a new run for other data")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = tokens_digest(table)
    plain = pa.BufferOutputStream()
    pq.write_table(table, plain, compression="zstd")
    with replacing(path) as file:
        file.write(_MAGIC + hashlib.sha256(plain.getvalue()).digest())
        for block in _masked(plain.getvalue(), digest):
            file.write(block)
    return digest


def unseal(folder: Path, digest: str) -> pa.Table:
    """The rows that `seal_test` sealed, for the data stage alone, which seals them again; notes nothing.

    Raises:
        SealedTestError: They are missing or damaged, or are not those of the digest.
    """
    path = _test_path(folder)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise SealedTestError(f"{path} {reason}", hint="restore the file, or start a new run") from None
    if not content.startswith(_MAGIC):
        raise SealedTestError(f"{path} is no sealed test set", hint="restore the file, or start a new run")
    start = len(_MAGIC) + hashlib.sha256().digest_size
    plain = b"".join(_masked(memoryview(content)[start:], digest))
    # The first comparison is about every byte, the columns beside the tokens included; the second about the record.
    whole = hashlib.sha256(plain).digest() == content[len(_MAGIC) : start]
    table = parquet_table(plain) if whole else None
    if table is None or tokens_digest(table) != digest:
        raise SealedTestError(
            f"the sealed test set was altered or damaged: its digest is not {digest[:12]}…, which was recorded",
            hint="restore the file, or start a new run; a score on altered data would not be the run's",
        )
    return table


def _masked(content: Any, digest: str) -> Iterator[bytes]:
    """The bytes under a stream of the digest; done twice, they are as before."""
    import numpy as np

    whole = np.frombuffer(content, np.uint8)
    for number, start in enumerate(range(0, len(whole), _BLOCK_BYTES)):
        block = whole[start : start + _BLOCK_BYTES]
        stream = hashlib.shake_256(f"{digest}/{number}".encode()).digest(len(block))
        yield (block ^ np.frombuffer(stream, np.uint8)).tobytes()


def open_sealed(run_dir: Path, purpose: str, max_samples: int | None = None) -> pa.Table:
    """Opens the test set of a finished run and writes one line to its ledger.

    Args:
        run_dir: The run.
        purpose: Why, in a few words; shown in the report.
        max_samples: Score so many rows only, drawn by the run's seed: the same ones at every opening.

    Returns:
        Tokenised rows in the order of the source (columns as in `laras.data.store`).

    Raises:
        SealedTestError: When the run is not finished, or the test set or its ledger is missing or altered. Nothing
            is noted then, as nothing was seen.
    """
    if max_samples is not None and max_samples < 1:
        raise SealedTestError(
            f"max_samples is {max_samples}; at least 1 row must be opened", hint="leave it out for all"
        )
    require_openable(run_dir)
    manifest = SplitManifest.load(run_dir)
    table = unseal(run_dir, manifest.test.sha256)
    read_openings(run_dir)  # a damaged ledger is no place to write to
    _note(
        run_dir,
        Opening(
            opened_at=datetime.now(UTC).isoformat(timespec="seconds"),
            purpose=purpose,
            max_samples=max_samples,
            laras_version=__version__,
            validation_trials=_validation_trials(run_dir),
        ),
    )
    return _sample(table, max_samples, manifest.seed)


def require_openable(run_dir: Path) -> None:
    """Refuses a run whose training has not ended, and what `require_scorable` refuses; opens nothing.

    Raises:
        SealedTestError: The run is not finished, it has no test rows, or it is a trial that was not chosen.
    """
    _require_final(run_dir)
    try:
        status = RunResult.load(run_dir).status
    except RunStateError as error:
        raise SealedTestError(f"the test set stays sealed: {error.message}", hint=error.hint) from None
    if status != "finished":
        raise SealedTestError(
            f"the test set stays sealed: the run's status is {status!r}, not 'finished'",
            hint=f"finish it with `laras resume {run_dir}`",
        )
    _require_rows(run_dir)


def require_scorable(run_dir: Path) -> None:
    """Refuses a run without test rows and every trial of a sweep but its final one, trained or not; opens nothing.

    Raises:
        SealedTestError: It has no test rows, or it is a trial that was not chosen.
    """
    _require_final(run_dir)
    _require_rows(run_dir)


def _require_rows(run_dir: Path) -> None:
    if SplitManifest.load(run_dir).test.rows == 0:
        raise SealedTestError(
            f"{run_dir} has no test set: its split gave the test 0 rows",
            hint="train anew with a share in `split: {test: …}` or a file in `dataset: {test: …}` that training "
            "never sees",
        )


def _require_final(run_dir: Path) -> None:
    """A test set that scores several trials chooses among them, whatever the intention."""
    sweep_dir = sweep_of(run_dir)
    if sweep_dir is None:
        return
    try:
        final = SweepRecord.load(sweep_dir).final
    except RunStateError as error:
        raise SealedTestError(f"the test set stays sealed: {error.message}", hint=error.hint) from None
    shown = run_dir.parent.parent if run_dir.parent.name else sweep_dir
    if final is None:
        raise SealedTestError(
            f"the test set stays sealed: {run_dir} is a trial of a sweep that has not ended",
            hint=f"`laras sweep {shown}` goes on with it and names the final model",
        )
    if trial_dir(sweep_dir, final) != run_dir.resolve():
        raise SealedTestError(
            f"the test set stays sealed: {run_dir} is a trial of a sweep, and not its final model",
            hint=f"the validation set chose another: `laras test {trial_dir(shown, final)}`",
        )


def _validation_trials(run_dir: Path) -> int:
    """How many models the validation set chose this one among."""
    sweep_dir = sweep_of(run_dir)
    return len(SweepRecord.load(sweep_dir).trials) if sweep_dir is not None else 1


def read_openings(run_dir: Path) -> tuple[Opening, ...]:
    """Every opening so far, oldest first.

    Raises:
        SealedTestError: When the ledger is damaged.
    """
    path = _ledger_path(run_dir)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise SealedTestError(f"the ledger {path} cannot be read: {error}", hint="restore the file") from None
    openings = []
    for number, line in enumerate(lines, start=1):
        try:
            openings.append(Opening.model_validate_json(line))
        except ValidationError:
            raise SealedTestError(f"{path}:{number} is no line of the ledger", hint="restore the file") from None
    return tuple(openings)


def _test_path(folder: Path) -> Path:
    return folder / "splits" / "sealed" / "test.sealed"


def _ledger_path(run_dir: Path) -> Path:
    return run_dir / "splits" / "sealed" / "openings.jsonl"


def _note(run_dir: Path, opening: Opening) -> None:
    """Appends one whole line and waits until it is on disk: noted before the rows are seen."""
    path, line = _ledger_path(run_dir), opening.model_dump_json().encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as ledger:
            before = ledger.tell()
            try:
                if ledger.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(ledger.fileno())
            except OSError:
                ledger.truncate(before)
                raise
    except OSError as error:
        raise SealedTestError(
            f"the opening cannot be noted in {path}: {error.strerror or error}; nothing was opened",
            hint="make room, and see that the file can be written",
        ) from None


def _sample(table: pa.Table, max_samples: int | None, seed: int) -> pa.Table:
    import numpy as np

    if max_samples is None or max_samples >= table.num_rows:
        return table
    chosen = np.random.default_rng(seed).choice(table.num_rows, max_samples, replace=False)
    return table.take(np.sort(chosen))
