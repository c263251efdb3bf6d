"""A checkpoint is whole or absent, and a damaged one is not used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from laras.errors import CheckpointError, TrainingAborted
from laras.progress import Observer
from laras.training.checkpoints import (
    choose_checkpoint,
    damaged_checkpoints,
    list_checkpoints,
    remove_old_checkpoints,
    save_checkpoint,
    set_aside,
    set_later_aside,
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


def test_a_folder_that_is_gone_does_not_hide_why_a_save_failed(tmp_path: Path) -> None:
    error = unwritable("the checkpoint", tmp_path / "gone", OSError("disk full"))
    assert error.message == "the checkpoint cannot be written: disk full"


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
    remove_old_checkpoints(tmp_path, keep=0, best_step=None)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]


@pytest.mark.parametrize("name", [".step-1.removed", ".step-9.partial", ".step-9.old"])
def test_what_a_crash_left_half_done_takes_no_room_for_ever(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, 1, write_two_files)
    (tmp_path / name).mkdir()
    write_two_files(tmp_path / name)
    remove_old_checkpoints(tmp_path, keep=1, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_the_checkpoint_that_was_asked_for_is_taken_or_none(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, write_two_files)
    assert choose_checkpoint(tmp_path, 2, Observer()) == tmp_path / "step-2"
    assert choose_checkpoint(tmp_path, None, Observer()) == tmp_path / "step-3"
    with pytest.raises(CheckpointError, match="no checkpoint of step 4") as caught:
        choose_checkpoint(tmp_path, 4, Observer())
    assert caught.value.hint == "it has: 1, 2, 3"
    (tmp_path / "step-2" / "state").write_text("other")
    with pytest.raises(CheckpointError, match="damaged"):
        choose_checkpoint(tmp_path, 2, Observer())


def test_without_checkpoints_the_one_asked_for_is_missed_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        choose_checkpoint(tmp_path, 4, Observer())
    assert caught.value.hint == "it has: none"


def test_a_step_that_is_damaged_again_and_again_keeps_every_reason(tmp_path: Path) -> None:
    reasons = [["state is missing"], ["a is missing", "b is missing"], ["state differs"]]
    for problems in reasons:
        set_aside(save_checkpoint(tmp_path, 7, write_two_files), problems)
    set_aside(save_checkpoint(tmp_path, 2, write_two_files), ["early"])
    (tmp_path / "step-3.damaged").mkdir()  # a crash before the reason was written
    assert damaged_checkpoints(tmp_path) == [
        (2, "step-2.damaged: early"),
        (7, "step-7.damaged-2: a is missing; b is missing"),
        (7, "step-7.damaged-3: state differs"),
        (7, "step-7.damaged: state is missing"),
    ]
    assert list_checkpoints(tmp_path) == []


def test_going_back_keeps_the_step_it_goes_back_to_and_no_later_one(tmp_path: Path) -> None:
    for _ in range(2):  # the second time over what the first one left
        for step in (4, 5, 6):
            save_checkpoint(tmp_path, step, write_two_files)
        assert set_later_aside(tmp_path, 5) == [tmp_path / "step-6.left"]
        assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]
        assert (tmp_path / "step-6.left" / "state").is_file()
