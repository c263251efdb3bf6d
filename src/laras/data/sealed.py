"""The sealed test set: written once, opened only for a finished run, every opening noted.

Its digest is in the run's split manifest; the ledger is a JSONL file beside it. The seal guards against honest
mistakes, not against somebody who edits the records: training code cannot name this module (an import contract),
and a look at the test set before the end of training cannot happen by accident.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from laras import __version__
from laras.data.store import read_tokens, tokens_digest, write_tokens
from laras.errors import RunStateError, SealedTestError
from laras.records import Opening, RunResult, SplitManifest

if TYPE_CHECKING:
    import pyarrow as pa


def seal_test(table: pa.Table, run_dir: Path) -> str:
    """Writes the test rows into the run and returns their digest, for `SplitManifest.test.sha256`.

    Raises:
        SealedTestError: When the run has a sealed test set already.
    """
    path = _test_path(run_dir)
    if path.exists():
        raise SealedTestError(f"{run_dir} has a sealed test set already", hint="start a new run for other data")
    write_tokens(table, path)
    return tokens_digest(table)


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
    try:
        table = read_tokens(_test_path(run_dir))
    except RunStateError as error:
        raise SealedTestError(f"the sealed test set cannot be read: {error.message}", hint=error.hint) from None
    found = tokens_digest(table)
    if found != manifest.test.sha256:
        raise SealedTestError(
            f"the sealed test set was altered: its digest is {found[:12]}…, the run recorded "
            f"{manifest.test.sha256[:12]}…",
            hint="restore the file, or start a new run; a score on altered data would not be the run's",
        )
    read_openings(run_dir)  # a damaged ledger is no place to write to
    _note(
        run_dir,
        Opening(
            opened_at=datetime.now(UTC).isoformat(timespec="seconds"),
            purpose=purpose,
            max_samples=max_samples,
            laras_version=__version__,
        ),
    )
    return _sample(table, max_samples, manifest.seed)


def require_openable(run_dir: Path) -> None:
    """Refuses a run whose training has not ended; opens nothing.

    Raises:
        SealedTestError: The run is not finished.
    """
    try:
        status = RunResult.load(run_dir).status
    except RunStateError as error:
        raise SealedTestError(f"the test set stays sealed: {error.message}", hint=error.hint) from None
    if status != "finished":
        raise SealedTestError(
            f"the test set stays sealed: the run's status is {status!r}, not 'finished'",
            hint=f"finish it with `laras resume {run_dir}`",
        )


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


def _test_path(run_dir: Path) -> Path:
    return run_dir / "splits" / "sealed" / "test.parquet"


def _ledger_path(run_dir: Path) -> Path:
    return run_dir / "splits" / "sealed" / "openings.jsonl"


def _note(run_dir: Path, opening: Opening) -> None:
    """Appends one whole line and waits until it is on disk: noted before the rows are seen."""
    with _ledger_path(run_dir).open("ab", buffering=0) as ledger:
        ledger.write(opening.model_dump_json().encode() + b"\n")
        os.fsync(ledger.fileno())


def _sample(table: pa.Table, max_samples: int | None, seed: int) -> pa.Table:
    import numpy as np

    if max_samples is None or max_samples >= table.num_rows:
        return table
    chosen = np.random.default_rng(seed).choice(table.num_rows, max_samples, replace=False)
    return table.take(np.sort(chosen))
