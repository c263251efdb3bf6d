"""Folders that are complete, with a digest of every file, or not there at all: checkpoints, `best/` and `final/`.

One is written into a hidden folder beside its place, every file synced and listed with its SHA-256 in `manifest.json`,
and the folder is then renamed. Whoever loads from it looks first whether it still matches its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from laras.errors import CheckpointError
from laras.record_base import write_atomically

MANIFEST_NAME = "manifest.json"
WRITE_ERRORS = (OSError, SafetensorError)  # the second is how safetensors tells of a full disk


def write_whole(folder: Path, write_files: Callable[[Path], None]) -> Path:
    """Writes a sealed folder aside and renames it to its place, where an older one gives way.

    Raises:
        OSError, SafetensorError: As writing does; the older folder is then still there.
    """
    aside, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_files(aside)
        seal_folder(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def seal_folder(folder: Path) -> None:
    """Syncs every file of a folder and writes their digests to its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    for path in files:
        _sync(path)
    digests = {path.relative_to(folder).as_posix(): _file_digest(path) for path in files}
    write_atomically(folder / MANIFEST_NAME, json.dumps(digests, indent=2) + "\n")
    _sync(folder)


def require_whole(folder: Path, hint: str) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: Naming each file that is missing, altered or not of the folder.
    """
    if problems := folder_problems(folder):
        raise CheckpointError(f"{folder} is damaged", problems=problems, hint=hint)


def folder_problems(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, a file a line; nothing of it is loaded to find out."""
    try:
        if not _is_plain_file(folder / MANIFEST_NAME):
            return [f"{MANIFEST_NAME}: missing"]
        digests = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        unknown = sorted(present - set(digests) - {MANIFEST_NAME})
        # File managers leave hidden files of their own, which nothing loads.
        problems = [f"{_shown(name)}: not of this folder" for name in unknown if not Path(name).name.startswith(".")]
        for name, digest in digests.items():
            if name not in present:  # so is a name that leads out of the folder
                problems.append(f"{_shown(name)}: missing")
            elif not _is_plain_file(folder / name) or _file_digest(folder / name) != digest:
                problems.append(f"{_shown(name)}: altered")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        problems = [f"{MANIFEST_NAME}: {type(error).__name__}"]
    return problems


def _is_plain_file(path: Path) -> bool:
    """A file of its own: no link, and no pipe that would be waited for."""
    return path.is_file() and not path.is_symlink()


def _shown(name: str) -> str:
    """A name as one line of printable text, whatever is in it."""
    return repr(name[:200])[1:-1]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
