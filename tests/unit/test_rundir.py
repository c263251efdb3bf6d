"""The run directory: one owner, a status that tells the truth, names that are safe."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from laras.config import RunConfig
from laras.config_file import config_to_yaml
from laras.errors import ExitCode, RunStateError
from laras.records import BestCheckpoint, EvalResult, Measured, RunResult, RunStatus, SplitScore
from laras.rundir import RunDir, create_run_dir, hold, list_runs, read_holder, run_status

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
    run = create_run_dir(config, datetime(2026, 11, 24, tzinfo=UTC))
    assert run.path.parent == tmp_path
    assert run.path.name[:-5] == f"2026-11-24-{name}"
    assert run.path != create_run_dir(config).path


def test_an_existing_run_is_not_written_over(tmp_path: Path) -> None:
    new_run(tmp_path)
    with pytest.raises(RunStateError, match="exists already") as caught:
        create_run_dir(RunConfig(output_dir=str(tmp_path), run_name="r"))
    assert "laras resume" in str(caught.value)


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


def test_the_status_is_that_of_the_result_or_of_what_was_left(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run_status(run) == "failed"
    (run.checkpoints / "step-3").mkdir(parents=True)
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


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunStateError, match="is not a run"):
        RunDir(tmp_path).load_config()
    run = new_run(tmp_path)
    assert run.load_config().run_name == "r"
    run.config.write_text("nonsense: 1\n", encoding="utf-8")
    with pytest.raises(RunStateError, match="does not validate"):
        run.load_config()
