"""What every record is: frozen, versioned JSON with a digest, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from laras.errors import RunStateError


class Value(BaseModel):
    """A frozen part of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Value):  # noqa: PLW1641 - pydantic makes the hash of a frozen model
    """A stage's result, written as `records/<name>.json`.

    One that was read stands for its file: a file of an older version lacks the fields that have come since, and their
    defaults are no part of what others were built on.
    """

    name: ClassVar[str]
    schema_version: int = 1
    parent_digest: str | None = None
    _file: bytes | None = PrivateAttr(default=None)  # that it was read from, as long as nothing is changed

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of its file, in hexadecimal."""
        return digest_of(json.loads(self._content()))

    def save(self, run_dir: Path) -> Path:
        """Writes the record whole or not at all; returns its path."""
        folder = run_dir / "records"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        write_atomically(path, self._content().decode())
        return path

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """Reads the record of a run.

        Raises:
            RunStateError: When it is missing, damaged, or of a version that this Laras does not know.
        """
        path = run_dir / "records" / f"{cls.name}.json"
        try:
            content = path.read_bytes()
            record = cls.model_validate_json(content)
        except FileNotFoundError:
            raise RunStateError(
                f"{run_dir} has no {cls.name} record", hint="name the folder of a run, as `laras runs` lists them"
            ) from None
        except (ValidationError, OSError) as error:
            raise RunStateError(
                f"{path} is damaged or of another version: {str(error).splitlines()[0]}",
                hint="restore the file, or start a new run",
            ) from None
        record._file = content
        return record

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """See `pydantic.BaseModel`; a changed copy stands for no file."""
        copied = super().model_copy(update=update, deep=deep)
        if update:
            copied._file = None
        return copied

    def __eq__(self, other: object) -> bool:
        """By value, wherever it is from."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def _content(self) -> bytes:
        """What its file holds, or will hold."""
        return self._file if self._file is not None else (self.model_dump_json(indent=2) + "\n").encode()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-like value's canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is synced and takes the path's place at the end: a reader never sees a part of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text in UTF-8 whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())
