"""A checkpoint is whole or absent, and a damaged one is not used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from laras.errors import CheckpointError, TrainingAborted
from laras.training.checkpoints import (
    list_checkpoints,
    remove_old_checkpoints,
    save_checkpoint,
    unwritable,
)
from laras.whole_folder import require_whole


def write_two_files(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(b"\0" * 1000)
    (folder / "state").write_text("step")


def test_a_saved_checkpoint_verifies_and_is_listed_by_step(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        require_whole(save_checkpoint(tmp_path, step, write_two_files), "")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 100]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_two_files(folder)
        raise OSError("disk full")

    with pytest.raises(TrainingAborted, match="disk full"):
        save_checkpoint(tmp_path, 1, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_copy_says_of_many_files_becomes_one_line() -> None:
    files = [(f"from/{n}", f"to/{n}", f"[Errno 28] No space left on device: 'from/{n}' -> 'to/{n}'") for n in range(9)]
    error = unwritable("best/", Path(), shutil.Error(files))
    assert error.message.startswith("best/ cannot be written: [Errno 28] No space left on device; ")
    assert "laras resume" in str(error.hint)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write_two_files)
    again = save_checkpoint(tmp_path, 1, lambda folder: (folder / "only").write_text("new") and None)
    assert sorted(path.name for path in again.iterdir()) == ["manifest.json", "only"]


@pytest.mark.parametrize("name", ["adapter/weights", "state", "manifest.json"])
@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_damage_to_any_file_is_detected(tmp_path: Path, name: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, 1, write_two_files) / name
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "truncate" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match="damaged") as caught:
        require_whole(tmp_path / "step-1", "")
    assert caught.value.problems[0].startswith(name)


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, write_two_files)
    remove_old_checkpoints(tmp_path, keep=2, best_step=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 4, 5]
