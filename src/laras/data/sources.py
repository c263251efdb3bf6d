"""What the `dataset` of a configuration names: files, a folder, a glob, a built-in set, a dataset of the Hub.

Every source is one file, or one table of the Hub, whose rows come with their line. All problems of finding them are
raised together.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from laras.config import BUILTIN_DATASET, DatasetFiles
from laras.data.read import COMPRESSIONS, READERS, SourceRow, file_rows, is_compressed, reader_of
from laras.errors import DataError
from laras.hub import is_out_of_reach
from laras.records import SourceFile, SplitName

if TYPE_CHECKING:
    from datasets import Dataset

_PART_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
_NO_WORD = re.compile(r"[^a-z0-9]+")
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(:[\w.-]+){0,2}")
_KINDS = f"data files end in {', '.join(READERS)}; behind all but .parquet may stand {' or '.join(COMPRESSIONS)}"


@dataclass(frozen=True)
class Source:
    """Rows of one origin.

    Attributes:
        record: The file as the profile records it; its path is the name that problems are shown under.
        part: The split it was given for; None where Laras divides the rows.
        rows: Reads them from the start.
    """

    record: SourceFile
    part: SplitName | None
    rows: Callable[[], Iterator[SourceRow]]


def find_sources(dataset: str | DatasetFiles) -> list[Source]:
    """Sources in a stable order: train first, then validation, then test; files sorted by path.

    Raises:
        DataError: Names everything that is missing, empty, or holds no data.
    """
    if isinstance(dataset, str):
        return _sources_of(dataset, None)
    train = (dataset.train,) if isinstance(dataset.train, str) else dataset.train
    wanted: list[tuple[str, SplitName]] = [(name, "train") for name in train]
    wanted += [(dataset.validation, "validation")] if dataset.validation else []
    wanted += [(dataset.test, "test")] if dataset.test else []
    sources: list[Source] = []
    errors: list[DataError] = []
    for name, part in wanted:
        try:
            sources += _sources_of(name, part)
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        problems = [line for error in errors for line in (error.message, *error.problems)]
        raise DataError(f"{len(errors)} parts of `dataset` cannot be used", problems=problems, hint="; ".join(hints))
    return sources


def _sources_of(name: str, part: SplitName | None) -> list[Source]:
    if name.startswith("builtin:"):
        return [_builtin(name, part)]
    if "://" in name:
        raise DataError(f"dataset {name!r:.200} is a URL", hint="download the file; a Hub dataset is named owner/name")
    try:
        if not name.strip() or "\0" in name:
            raise ValueError("no name of a file")
        path = Path(name).expanduser()
        local = _local_sources(path, part)
    except (OSError, ValueError, RuntimeError) as error:  # the last: too deep, or no home is known
        detail = getattr(error, "strerror", None) or str(error)
        raise DataError(f"dataset {name!r:.200}: {detail}", hint="write a file, a folder, a glob or a Hub id") from None
    if local is not None:
        return local
    if _HUB_NAME.fullmatch(name) and reader_of(path) is None:
        return _hub(name, part)
    raise DataError(f"no file or folder {name}", hint=_similar_path(path))


def _local_sources(path: Path, part: SplitName | None) -> list[Source] | None:
    """Sources of a path or a glob; None where there is nothing of the name."""
    if path.is_file():
        return _files([path], part)
    if path.is_dir():
        return _folder(path, part)
    if any(mark in str(path) for mark in "*?["):
        # The pattern may be absolute, which Path.glob refuses.
        found = sorted(found for found in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if found.is_file())
        if not found:
            raise DataError(f"no file matches {path}", hint="check the pattern; `**` reaches into folders")
        return _files(found, part) if part else _parts(found, Path(os.path.commonpath([file.parent for file in found])))
    if path.exists() or path.is_symlink():  # a pipe could be read once, and may never end
        raise DataError(f"{path} is neither a regular file nor a folder", hint="copy its content into a file")
    return None


def _similar_path(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist; paths are relative to the configuration file or the working folder"
    # By the stem: the ending alone makes all names alike.
    names = {entry.stem: entry.name for entry in folder.iterdir()}
    if close := difflib.get_close_matches(path.stem, names, n=1):
        return f"did you mean {folder / names[close[0]]}?"
    return "check the path; it is relative to the configuration file or the working folder"


def _folder(path: Path, part: SplitName | None) -> list[Source]:
    entries = sorted(entry for entry in path.rglob("*") if entry.is_file())
    shown = [entry for entry in entries if not any(p[0] in "._" for p in entry.relative_to(path).parts)]
    files = [entry for entry in shown if reader_of(entry)]
    if not files:
        names = ", ".join(entry.name for entry in shown[:5]) or "no file"
        raise DataError(f"the folder {path} has no data file; it holds {names}", hint=_KINDS)
    return _files(files, part) if part else _parts(files, path)


def _parts(files: list[Path], root: Path) -> list[Source]:
    """Files laid out as train, validation and test keep their parts: dividing them anew would train on test rows.

    The part is a word of the file's name, or of a folder's below `root`.

    Raises:
        DataError: Some have a part and others do not.
    """
    found: dict[SplitName | None, list[Path]] = {}
    for file in files:
        found.setdefault(_part_of(file.relative_to(root)), []).append(file)
    if "train" not in found or len(found.keys() - {None}) == 1:
        return _files(files, None)
    if others := found.get(None):
        names = ", ".join(str(file) for file in others[:5])
        raise DataError(
            f"{root} holds files of train and of {', '.join(sorted(map(str, found.keys() - {None, 'train'})))}, and "
            f"{len(others)} whose part is not in their name: {names}",
            hint="name each part: `dataset: {train: [file, file], test: file}`",
        )
    return [source for part in get_args(SplitName) for source in _files(found.get(part, []), part)]


def _part_of(file: Path) -> SplitName | None:
    words = (word for name in (file.stem, *reversed(file.parts[:-1])) for word in _NO_WORD.split(name.lower()))
    return next((_PART_NAMES[word] for word in words if word in _PART_NAMES), None)


def _files(paths: list[Path], part: SplitName | None) -> list[Source]:
    sources, problems = [], []
    by_plain_name: dict[Path, Path] = {}
    for path in paths:
        if reader_of(path) is None:
            problems.append(f"{path}: unknown kind of file {path.suffix!r}")
            continue
        plain = path.with_suffix("") if is_compressed(path) else path
        if (twin := by_plain_name.setdefault(plain, path)) != path:
            problems.append(f"{path}: by its name it holds what {twin.name} does, and its rows would count twice")
            continue
        if not _is_text(str(path)):
            problems.append(f"{str(path)!r}: the name is not UTF-8, which no record can hold")
            continue
        try:
            size = path.stat().st_size
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        if size == 0:
            problems.append(f"{path}: the file is empty")
        record = SourceFile(path=str(path), bytes=size, sha256=digest.hexdigest())
        sources.append(Source(record, part, partial(file_rows, path)))
    if len(problems) == 1 and len(paths) == 1:
        advice = "put examples into it, one a row" if sources else "name a file of examples, unpacked"
        raise DataError(problems[0], hint=f"{advice}; {_KINDS}")
    if problems:
        raise DataError(f"{len(problems)} data files cannot be used", problems=problems, hint=_KINDS)
    return sources


def _is_text(name: str) -> bool:
    """False for the half characters that stand for bytes which are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _builtin(name: str, part: SplitName | None) -> Source:
    if name != BUILTIN_DATASET:
        raise DataError(f"no built-in dataset is named {name!r}", hint=f"the built-in dataset is {BUILTIN_DATASET}")
    import orjson

    from laras.data.builtin import stdlib_rows

    rows = stdlib_rows()
    text = b"".join(orjson.dumps(row) for row in rows)
    record = SourceFile(path=name, bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    return Source(record, part, lambda: (SourceRow(number, row, None) for number, row in enumerate(rows, start=1)))


def _hub(name: str, part: SplitName | None) -> list[Source]:
    """A dataset named `owner/name`, `owner/name:configuration` or `owner/name:configuration:split`."""
    path, *chosen_parts = name.split(":")
    configuration, split = (*chosen_parts, None, None)[:2]
    tables = load_tables(path, configuration)
    if split is not None:
        if split not in tables:
            raise DataError(f"{name}: no split {split!r}", hint=f"it has {', '.join(tables)}")
        return [_table_source(name, tables[split], part)]
    if part is not None or len(tables) == 1:
        # A part is taken from the split of its name, or from the only one there is.
        chosen = part if part in tables else next(iter(tables))
        if part is not None and part not in tables and len(tables) > 1:
            raise DataError(
                f"{name} has no split {part!r}", hint=f"write {path}:default:SPLIT with {', '.join(tables)}"
            )
        return [_table_source(name, tables[chosen], part)]
    if "train" not in tables:
        raise DataError(
            f"{name} has the splits {', '.join(tables)} and none named train",
            hint=f"choose one with `dataset: {path}:default:{next(iter(tables))}`",
        )
    named = {_PART_NAMES[split]: table for split, table in tables.items() if split in _PART_NAMES}
    if len(named) == 1:
        return [_table_source(name, named["train"], None)]
    return [
        _table_source(f"{name}:{given}", named[given], given)
        for given in ("train", "validation", "test")
        if given in named
    ]


def load_tables(path: str, configuration: str | None) -> dict[str, Dataset]:
    """The splits of a Hub dataset, downloaded or from its cache.

    Raises:
        DataError: No such dataset, no network, or no such configuration.
    """
    from datasets import load_dataset

    if not Path(path).expanduser().exists():
        is_out_of_reach()
    try:
        return dict(load_dataset(path, configuration))
    # The libraries below raise some thirty classes for a missing name, a refused login or a broken connection.
    except Exception as error:
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{path!r} is no file or folder here, and no dataset could be loaded from the Hub: {detail}",
            hint="check the name and the network; write a path with its ending for a file, "
            "`owner/name:configuration` to choose a configuration, and `hf auth login` for a private dataset",
        ) from error


def _table_source(name: str, table: Dataset, part: SplitName | None) -> Source:
    # The fingerprint names content and version of a Hub dataset; hashing gigabytes of Arrow again would say no more.
    digest = hashlib.sha256(f"{name}\0{table._fingerprint}".encode()).hexdigest()
    record = SourceFile(path=name, bytes=int(table.data.nbytes), sha256=digest)
    return Source(record, part, partial(_table_rows, table))


def _table_rows(table: Dataset) -> Iterator[SourceRow]:
    for number, row in enumerate(table, start=1):
        yield SourceRow(number, row, None)
