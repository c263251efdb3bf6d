"""The run directory: one owner, a status that tells the truth, names that are safe."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from laras.config import RunConfig
from laras.config_file import config_to_yaml
from laras.errors import ConfigError, ExitCode, RunStateError
from laras.records import BestCheckpoint, EvalResult, Measured, RunResult, RunStatus, SplitScore
from laras.rundir import RunDir, create_run_dir, hold, is_held, list_runs, read_holder, run_status

HOLD = "import sys, pathlib; from laras.rundir import RunDir, hold\nwith hold(RunDir(pathlib.Path(sys.argv[1]))):\n"


def result(status: RunStatus) -> RunResult:
    return RunResult(
        status=status,
        steps=7,
        epochs=1.0,
        train_loss=1.0,
        best=BestCheckpoint(step=5, eval_loss=0.5),
        stopped_early=False,
        measured=Measured(peak_allocated_bytes=1, peak_reserved_bytes=1, tokens_per_s=1.0, elapsed_s=1.0),
    )


def evaluation(perplexity: float) -> EvalResult:
    score = SplitScore(
        loss=1.0,
        loss_ci95=(0.9, 1.1),
        perplexity=perplexity,
        perplexity_ci95=(1.0, 2.0),
        token_accuracy=0.5,
        target_tokens=10,
        examples=2,
    )
    return EvalResult(base=score, tuned=score, loss_improvement_ci95=(0.0, 0.1), openings=1)


def new_run(folder: Path, name: str = "r") -> RunDir:
    run = create_run_dir(RunConfig(output_dir=str(folder), run_name=name))
    run.config.write_text(config_to_yaml(RunConfig(output_dir=str(folder), run_name=name)), encoding="utf-8")
    return run


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen2.5-1.5B", "qwen2.5-1.5b"),
        ("builtin:smollm2-135m", "smollm2-135m"),
        ("/models/My Model/", "my-model"),
        ("../..", "model"),
    ],
)
def test_the_name_of_a_run_holds_day_and_model_and_stays_inside_the_output_folder(
    tmp_path: Path, source: str, name: str
) -> None:
    config = RunConfig(output_dir=str(tmp_path), model_name_or_path=source)
    run = create_run_dir(config, now=datetime(2026, 11, 24, tzinfo=UTC))
    assert run.path.parent == tmp_path
    assert run.path.name[:-5] == f"2026-11-24-{name}"
    assert run.path != create_run_dir(config).path


def test_an_existing_run_is_not_written_over(tmp_path: Path) -> None:
    new_run(tmp_path)
    with pytest.raises(RunStateError, match="exists already") as caught:
        create_run_dir(RunConfig(output_dir=str(tmp_path), run_name="r"))
    assert "laras resume" in str(caught.value)


def test_a_process_that_dies_while_it_begins_a_run_leaves_no_half_of_one_and_its_name_free(tmp_path: Path) -> None:
    code = (
        "import os\nfrom laras.config import RunConfig\nfrom laras.rundir import create_run_dir\n"
        "def die(run):\n    run.config.write_text('half'); os._exit(9)\n"
        f"create_run_dir(RunConfig(output_dir={str(tmp_path)!r}, run_name='r'), die)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert list_runs(tmp_path) == [] and not (tmp_path / "r").exists()
    assert new_run(tmp_path).path == tmp_path / "r"


def test_a_run_that_cannot_be_written_is_none_and_the_quicker_of_two_keeps_its_name(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), run_name="r")

    def full(run: RunDir) -> None:
        run.config.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ConfigError, match=f"cannot be written to .*: {os.strerror(errno.ENOSPC)}"):
        create_run_dir(config, full)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunStateError, match="exists already"):
        create_run_dir(config, lambda run: (new_run(tmp_path), None)[1])
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_run_has_one_owner_and_the_second_is_told_who(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    code = HOLD + "    print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunStateError, match=f"process {other.pid}") as caught, hold(run):
            pass
        assert caught.value.exit_code == ExitCode.RUN_STATE
        assert run_status(run) == "running"
        other.kill()
    with hold(run):  # what a killed process held is free again
        holder = read_holder(run)
        assert holder is not None and holder.pid != other.pid


def contend(path: Path, start: Any, answers: Any, all_told: Any) -> None:
    start.wait()
    try:
        with hold(RunDir(path)):
            answers.put(os.getpid())
            all_told.wait(30)
    except RunStateError as error:
        answers.put(error.message)


def test_of_processes_that_start_at_once_one_owns_the_run_and_the_others_are_told_so(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    fork = multiprocessing.get_context("fork")
    for _ in range(3):
        start, answers, all_told = fork.Barrier(6), fork.Queue(), fork.Event()
        processes = [fork.Process(target=contend, args=(run.path, start, answers, all_told)) for _ in range(6)]
        for process in processes:
            process.start()
        told = [answers.get(timeout=30) for _ in processes]
        all_told.set()
        for process in processes:
            process.join(30)
        winners = [answer for answer in told if isinstance(answer, int)]
        assert len(winners) == 1 and winners[0] in [process.pid for process in processes]
        assert all("is in use" in answer for answer in told if isinstance(answer, str))
        assert run_status(run) != "running"


def test_the_note_of_a_dead_process_does_not_count_even_if_its_number_lives_again(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / ".lock").touch()
    note = {"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-01T00:00:00+00:00"}  # this process
    for content in (json.dumps(note), "", "nonsense", json.dumps({**note, "pid": 1, "host": "elsewhere"})):
        (run.path / ".holder.json").write_text(content, encoding="utf-8")
        assert not is_held(run)
        with hold(run):
            holder = read_holder(run)
            assert holder is not None and holder.pid == os.getpid() and not holder.since.startswith("2026-01-01")
        assert read_holder(run) is None  # gone with its owner


def test_a_second_hold_of_the_same_process_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with hold(run):
        who = f"in use by process {os.getpid()} on {socket.gethostname()} since"
        for _ in range(2):
            with pytest.raises(RunStateError, match=who), hold(run):
                pass
        assert is_held(run)
    assert not is_held(run)


def test_a_program_that_outlives_its_run_does_not_keep_it(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    code = "    import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD + code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        left = int(owner.stdout.readline())
        owner.kill()
    try:
        os.kill(left, 0)  # it lives
        with hold(run):
            pass
    finally:
        os.kill(left, signal.SIGKILL)


def test_a_folder_that_cannot_be_locked_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)  # as some network file systems answer
        with pytest.raises(RunStateError, match=f"cannot be locked: {os.strerror(errno.ENOSYS)}") as caught, hold(run):
            pass
    assert caught.value.exit_code == ExitCode.RUN_STATE
    assert "local disk" in str(caught.value.hint)
    assert not (run.path / ".holder.json").exists()
    with pytest.raises(RunStateError, match="cannot be locked"), hold(RunDir(run.config)):  # a file
        pass


def test_a_run_on_a_read_only_disk_is_in_nobodys_hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    with hold(run):
        pass

    def read_only(path: Any, flags: int, *given: Any, **named: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", read_only)
    assert not is_held(run)


def test_a_note_that_cannot_be_written_keeps_nobody_out(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / ".holder.json").mkdir()  # as a full disk, which root writes to all the same
    with hold(run):
        assert is_held(run)
    assert not is_held(run)


def test_the_status_is_that_of_the_result_or_of_what_was_left(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run_status(run) == "interrupted"
    result("finished").save(run.path)
    assert run_status(run) == "finished"


def test_runs_are_listed_by_score_then_newest_first(tmp_path: Path) -> None:
    for name, perplexity in (("a", 5.0), ("b", 3.0), ("c", None), ("d", None)):
        run = new_run(tmp_path, name)
        result("finished").save(run.path)
        if perplexity is not None:
            evaluation(perplexity).save(run.path)
    assert [Path(summary.path).name for summary in list_runs(tmp_path)] == ["b", "a", "d", "c"]
    assert list_runs(tmp_path / "absent") == []


def test_the_steps_of_a_run_without_an_end_are_those_that_it_has_logged(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    steps = lambda: list_runs(tmp_path)[0].steps  # noqa: E731
    assert steps() is None
    result("running").save(run.path)
    assert steps() == 7
    run.metrics.parent.mkdir()
    lines = [json.dumps({"step": step, "text": "x" * 400}) for step in range(1, 100)]
    run.metrics.write_text("\n".join(lines) + '\n{"step": 1', encoding="utf-8")  # being written
    assert steps() == 99
    result("finished").save(run.path)
    assert steps() == 7


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunStateError, match="is not a run"):
        RunDir(tmp_path).load_config()
    run = new_run(tmp_path)
    assert run.load_config().run_name == "r"
    for text, reason in (("nonsense: 1\n", "nonsense"), ("seed: 1\nseed: 2\n", "seed")):
        run.config.write_text(text, encoding="utf-8")
        with pytest.raises(RunStateError, match=f"(?s)does not validate.*{reason}"):
            run.load_config()
