"""Checkpoints: `checkpoints/step-N/`, complete with a digest of every file, or not there at all.

A checkpoint is written into a hidden folder beside its place, every file synced and listed with its SHA-256 in
`manifest.json`, and the folder is then renamed. One that no longer matches its manifest is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from laras.errors import CheckpointError
from laras.records import write_atomically

MANIFEST_NAME = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, write_files: Callable[[Path], None]) -> Path:
    """Saves what `write_files` writes as `folder/step-N`, whole or not at all.

    Args:
        folder: The run's `checkpoints` folder.
        step: The optimizer steps done.
        write_files: Writes the checkpoint's files into the folder that it is given.
    """
    final = folder / f"step-{step}"
    aside = folder / f".step-{step}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_files(aside)
        seal_folder(aside)
        if final.exists():  # written before a resume from an earlier step
            shutil.rmtree(final)
        aside.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def seal_folder(folder: Path) -> None:
    """Syncs every file of a folder and writes their digests to its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    for path in files:
        _sync(path)
    digests = {path.relative_to(folder).as_posix(): _file_digest(path) for path in files}
    write_atomically(folder / MANIFEST_NAME, json.dumps(digests, indent=2) + "\n")
    _sync(folder)


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: Naming each file that is missing or altered.
    """
    try:
        digests = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        problems = [
            f"{name}: {'altered' if (folder / name).is_file() else 'missing'}"
            for name, digest in digests.items()
            if not (folder / name).is_file() or _file_digest(folder / name) != digest
        ]
    except (OSError, ValueError, AttributeError) as error:
        problems = [f"{MANIFEST_NAME}: {type(error).__name__}"]
    if problems:
        raise CheckpointError(
            f"checkpoint {folder.name} is damaged", problems=problems, hint="resume from an earlier checkpoint"
        )


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def remove_old_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Keeps the newest `keep` checkpoints and the best one."""
    for step, path in list_checkpoints(folder)[:-keep]:
        if step != best_step:
            shutil.rmtree(path)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
