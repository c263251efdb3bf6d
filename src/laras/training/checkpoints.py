"""Checkpoints: `checkpoints/step-N/`, complete with a digest of every file, or not there at all.

One that no longer matches its manifest is set aside as `step-N.damaged`, with the reason in it, and the one before it
is used.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from laras.errors import CheckpointError, TrainingAborted
from laras.progress import Observer
from laras.whole_folder import WRITE_ERRORS, folder_problems, require_whole, write_whole

REASON_NAME = "damaged.txt"
_STEP_FOLDER = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, write_files: Callable[[Path], None]) -> Path:
    """Saves what `write_files` writes as `folder/step-N`, whole or not at all.

    Args:
        folder: The run's `checkpoints` folder.
        step: The optimizer steps done.
        write_files: Writes the checkpoint's files into the folder that it is given.

    Raises:
        TrainingAborted: When it cannot be written; those before it are untouched.
    """
    try:
        return write_whole(folder / f"step-{step}", write_files)
    except WRITE_ERRORS as error:
        raise unwritable(f"the checkpoint of step {step}", folder, error) from error


def unwritable(what: str, folder: Path, error: Exception) -> TrainingAborted:
    """The error of something that cannot be written below `folder`."""
    if isinstance(error, shutil.Error):  # of a copy: one line a file, of which the first says enough
        reason = str(error.args[0][0][-1]).partition(": ")[0]
    else:
        reason = getattr(error, "strerror", None) or str(error)
    try:
        free = f"; {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free"
    except OSError:
        free = ""
    return TrainingAborted(
        f"{what} cannot be written: {reason}{free}",
        hint="make room, then go on with `laras resume`; every checkpoint that is there is whole",
    )


def choose_checkpoint(folder: Path, step: int | None, observer: Observer) -> Path | None:
    """The newest good checkpoint, or the one of a step; damaged ones are set aside, loudly.

    Args:
        folder: The run's `checkpoints` folder.
        step: The step to go on from; None for the newest.
        observer: Is told of damage.

    Returns:
        None when there is no good one, so that the run starts again.

    Raises:
        CheckpointError: There is no checkpoint of this step, or it is damaged.
    """
    found = list_checkpoints(folder)
    if step is not None:
        chosen = dict(found).get(step)
        if chosen is None:
            known = ", ".join(str(known_step) for known_step, _ in found) or "none"
            raise CheckpointError(f"the run has no checkpoint of step {step}", hint=f"it has: {known}")
        require_whole(chosen, "resume from an earlier checkpoint")
        return chosen
    for _, path in reversed(found):
        problems = folder_problems(path)
        if not problems:
            return path
        aside = set_aside(path, problems)
        observer.warning(f"{path.name} is damaged ({'; '.join(problems)}); it is kept as {aside.name} and not used")
    return None


def set_aside(path: Path, problems: list[str]) -> Path:
    """Renames a damaged checkpoint to `step-N.damaged` and writes the reason into it."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}.damaged-{number}")
        number += 1
    path.rename(aside)
    (aside / REASON_NAME).write_text("\n".join(problems) + "\n", encoding="utf-8")
    return aside


def set_later_aside(folder: Path, step: int) -> list[Path]:
    """Renames checkpoints beyond `step` to `step-N.left`: the run goes back and takes another way from there.

    They would else count as the newest ones, and outlive those that the run saves now.
    """
    moved = []
    for found, path in list_checkpoints(folder):
        if found > step:
            aside = path.with_name(f"{path.name}.left")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            moved.append(aside)
    return moved


def damaged_checkpoints(folder: Path) -> list[tuple[int, str]]:
    """Step and reason of every checkpoint that was set aside, oldest step first."""
    found = []
    for path in folder.glob("step-*.damaged*"):
        match = _STEP_FOLDER.match(path.name)
        reason = path / REASON_NAME
        if match and reason.is_file():
            found.append((int(match[1]), f"{path.name}: {'; '.join(reason.read_text('utf-8').splitlines())}"))
    return sorted(found)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    # A link may lead anywhere, and quarantine or retention would follow it.
    return sorted((int(match[1]), path) for match, path in found if path.is_dir() and not path.is_symlink())


def remove_old_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Keeps the newest `keep` checkpoints, at least one, and the best one; removes what a crash left half-removed."""
    for step, path in list_checkpoints(folder)[: -max(1, keep)]:
        if step != best_step:
            gone = path.with_name(f".{path.name}.removed")  # a crash in between must not leave a damaged one
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    for leftover in (*folder.glob(".step-*.removed"), *folder.glob(".step-*.partial"), *folder.glob(".step-*.old")):
        shutil.rmtree(leftover, ignore_errors=True)
