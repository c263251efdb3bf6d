"""A sweep goes its way once: killed anywhere it goes on as if nothing had been, and the test set waits for its end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import laras
from laras import pipeline
from laras.cli.main import app, main
from laras.config_file import load_config
from laras.data.sealed import read_openings
from laras.errors import (
    ConfigError,
    ExitCode,
    MissingExtraError,
    RunStateError,
    SealedTestError,
    TrainingAborted,
    TrainingInterrupted,
)
from laras.progress import Observer, StepReport
from laras.records import BestCheckpoint, RunResult, SplitManifest
from laras.reporting.sweep_data import load_sweep_data
from laras.rundir import RunDir, list_runs, run_status
from laras.sweep_record import SweepRecord, trial_dir
from laras.sweeping.outcome import SweepOutcome, trial_record
from laras.sweeping.study import Study, pruned_step_of, reason_of
from tiny_models import base_model

WORDS = ["sea", "sun", "tree", "salt", "rain", "road", "bird", "snow", "lamp", "door", "fish", "wind"]
SEARCH = {"learning_rate": "1e-5..3e-2:log", "lora_r": [2, 4]}
TRIALS = 4  # of which the last is pruned

# Three processes sweep one after the other and die by SIGKILL: in the middle of the second trial; between the decision
# to prune the last one and its execution; and between that and its entry in the record. Forked, as to import torch
# takes longer than to train here.
DYING = f"""
import os, signal
from pathlib import Path
import laras, laras.data.prepare, laras.models.build, laras.planning.planner, laras.sweeping.sweep, laras.training.run
import alembic.command, optuna.storages, sqlalchemy.dialects.sqlite
from laras import pipeline
from laras.sweep_record import SweepRecord
from laras.sweeping.study import StudyTrial

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Watcher(laras.Observer):
    trials = 0
    def training_started(self, plan, first_step):
        self.trials += 1
    def step_finished(self, report):
        if moment == "step" and (self.trials, report.step) == (2, 5):
            die()

pipeline._write_report = lambda *_: None

def dying(method):
    keep = getattr(StudyTrial, method)
    setattr(StudyTrial, method, lambda *words: (keep(*words), die()))

for moment in ("step", "note_pruned", "prune"):
    child = os.fork()
    if not child:
        if moment != "step":
            dying(moment)
        laras.sweep("laras.yaml", {SEARCH!r}, trials={TRIALS}, run_name="killed", observer=Watcher())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    record = SweepRecord.load(Path("runs/killed"))
    print(os.WTERMSIG(status), record.status, *(trial.status for trial in record.trials))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a dataset and a configuration, where everything runs."""
    folder = tmp_path_factory.mktemp("sweep")
    base_model("llama", folder / "model")
    rows = []
    for number in range(60):
        first, second = WORDS[number % 12], WORDS[number // 12]
        question = {"role": "user", "content": f"what is {first} number {number} for a {second}"}
        answer = {"role": "assistant", "content": f"a {first} is what {second} does, {number} times over"}
        rows.append(json.dumps({"messages": [question, answer]}) + "\n")
    (folder / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "laras.yaml").write_text(
        "model_name_or_path: model\ndataset: chats.jsonl\nmax_steps: 6\neffective_batch_size: 8\n"
        "per_device_train_batch_size: 8\nmax_length: 256\neval_steps: 2\nlora_r: 4\nreport_to: []\n",
        encoding="utf-8",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(folder)
        patch.setattr(pipeline, "_write_report", lambda *_: None)  # a second for each trial; the sweep's own is written
        yield folder
    torch.set_num_threads(threads)


def sweep(name: str, trials: int = TRIALS, observer: Observer | None = None, **changed: Any) -> SweepOutcome:
    search = changed.pop("search", SEARCH)
    limit_s = changed.pop("time_limit_s", None)
    return laras.sweep(
        "laras.yaml", search, trials=trials, run_name=name, observer=observer, time_limit_s=limit_s, **changed
    )


@pytest.fixture(scope="module")
def whole(place: Path) -> SweepOutcome:
    """A sweep that nothing disturbed."""
    return sweep("whole")


def facts(outcome: SweepOutcome, first: int = TRIALS) -> dict[str, Any]:
    """Everything that two sweeps must share in their first trials to be the same; a clock is in no part of it."""
    trials = [trial.model_dump(exclude={"result_digest"}) for trial in outcome.record.trials[:first]]
    study = Study(outcome.sweep_dir / "study.sqlite3", outcome.record.space, outcome.record.seed)
    stored = [(t.number, t.state.name, t.params, t.value, t.intermediate_values) for t in study.trials()[:first]]
    study.close()
    finished = [trial["number"] for trial in trials if trial["status"] == "finished"]
    weights = {
        number: (trial_dir(outcome.sweep_dir, number) / "final" / "adapter_model.safetensors").read_bytes()
        for number in finished
    }
    found: dict[str, Any] = {"trials": trials, "stored": stored, "weights": weights}
    if first == TRIALS:
        record = outcome.record
        found |= {"best": record.best, "final": record.final, "status": record.status}
    return found


def test_a_sweep_leaves_runs_a_record_a_ready_configuration_and_a_report(whole: SweepOutcome) -> None:
    record = SweepRecord.load(whole.sweep_dir)
    assert record == whole.record
    assert [trial.number for trial in record.trials] == list(range(TRIALS))
    assert {trial.status for trial in record.trials} == {"finished", "pruned"}
    assert record.trials[0].values == {"learning_rate": 2e-4, "lora_r": 8} or record.trials[0].values["lora_r"] in (
        2,
        4,
    )
    losses = {trial.number: trial.eval_loss for trial in record.trials if trial.status == "finished"}
    assert record.best == record.final == min(losses, key=lambda number: (losses[number], number))
    split = SplitManifest.load(whole.sweep_dir)
    assert record.parent_digest == split.digest()
    for trial in record.trials:
        run = trial_dir(whole.sweep_dir, trial.number)
        assert SplitManifest.load(run).digest() == split.digest()
        assert RunResult.load(run).digest() == trial.result_digest
        assert (run_status(RunDir(run)) == "finished") == (trial.status == "finished")
    assert len(list_runs(whole.sweep_dir / "trials")) == TRIALS
    assert "<svg" in (whole.sweep_dir / "report.html").read_text(encoding="utf-8")


def test_the_ready_configuration_is_that_of_the_best_trial(whole: SweepOutcome) -> None:
    assert whole.final is not None
    ready, best = load_config(whole.sweep_dir / "laras.yaml"), load_config(whole.final / "config.yaml")
    of_the_sweep = {"output_dir", "run_name"}
    assert ready.model_dump(exclude=of_the_sweep) == best.model_dump(exclude=of_the_sweep)
    assert (ready.output_dir, ready.run_name) == ("runs", None)
    text = (whole.sweep_dir / "laras.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=") and "optimistic" in text


def test_a_trial_that_is_behind_the_others_is_pruned_and_stays_a_run_of_its_own(whole: SweepOutcome) -> None:
    pruned = [trial for trial in whole.record.trials if trial.status == "pruned"]
    assert pruned
    for trial in pruned:
        run = trial_dir(whole.sweep_dir, trial.number)
        result = RunResult.load(run)
        assert result.status == "interrupted"
        assert result.steps == trial.steps
        assert "above the median" in str(trial.reason)
        assert not (run / "checkpoints").exists()
        longest = max(other.steps or 0 for other in whole.record.trials)
        assert result.steps < longest


def test_a_killed_sweep_goes_on_with_the_same_trials_and_ends_as_if_nothing_had_been(
    whole: SweepOutcome,
) -> None:
    done = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, check=False, timeout=240)
    died = f"{int(signal.SIGKILL)} running"
    late = f"{died} finished finished finished running"
    assert done.stdout.splitlines() == [f"{died} finished running", late, late], done.stderr
    folder = whole.sweep_dir.parent / "killed"
    left = load_sweep_data(folder)
    assert (left.record.status, left.record.trials[-1].status, left.record.final) == (
        "interrupted",
        "interrupted",
        None,
    )
    assert facts(sweep("killed")) == facts(whole)
    resumes = [event.kind for event in RunResult.load(trial_dir(folder, 1)).events].count("resume")
    assert resumes == 1


def test_what_a_pruned_trial_reached_is_taken_from_the_study(whole: SweepOutcome, tmp_path: Path) -> None:
    """The result record of its run may be of a process that was killed before the last validations."""
    pruned = next(trial for trial in whole.record.trials if trial.status == "pruned")
    study = Study(whole.sweep_dir / "study.sqlite3", whole.record.space, whole.record.seed)
    frozen = study.trials()[pruned.number]
    study.close()
    stale = RunResult.load(trial_dir(whole.sweep_dir, pruned.number)).model_copy(
        update={"status": "running", "steps": 1, "best": BestCheckpoint(step=1, eval_loss=99.0)}
    )
    stale.save(trial_dir(tmp_path, pruned.number))
    found = trial_record(tmp_path, frozen, pruned_step_of(frozen), reason_of(frozen))
    assert found.model_copy(update={"result_digest": pruned.result_digest}) == pruned


class Signaller(Observer):
    """Sends a signal to this process at a step of a trial."""

    def __init__(self, number: int, trial: int, step: int) -> None:
        self.number, self.trial, self.step = number, trial, step
        self.started = 0

    def training_started(self, plan: Any, first_step: int) -> None:
        self.started += 1

    def step_finished(self, report: StepReport) -> None:
        if (self.started, report.step) == (self.trial + 1, self.step):
            os.kill(os.getpid(), self.number)


class SignalAfterTrial(Observer):
    """Sends a signal to this process when the first trial has ended."""

    def message(self, text: str) -> None:
        if text.startswith("trial 000 finished"):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_saves_and_the_folder_alone_says_how_it_goes_on(whole: SweepOutcome, place: Path) -> None:
    with pytest.raises(TrainingInterrupted, match="SIGINT between two trials"):
        sweep("stopped", observer=SignalAfterTrial())
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 3") as caught:
        sweep("stopped", observer=Signaller(signal.SIGTERM, trial=0, step=3))
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    folder = Path("runs/stopped")
    assert str(folder) in str(caught.value.hint)
    left = SweepRecord.load(folder)
    assert (left.status, [trial.status for trial in left.trials]) == ("interrupted", ["finished", "interrupted"])
    with pytest.raises(SealedTestError, match="has not ended"):
        pipeline.test(trial_dir(folder, 0))
    done = CliRunner().invoke(app, ["sweep", str(folder), "--trials", "2", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert [trial["status"] for trial in answer["trials"]] == ["finished", "finished"]
    assert answer["final_run_dir"] == answer["best"]["run_dir"] == str(trial_dir(folder, answer["best"]["number"]))
    assert facts(SweepOutcome(folder, SweepRecord.load(folder)), first=2) == facts(whole, first=2)


def test_a_time_limit_saves_the_trial_that_runs_and_the_next_call_goes_on_with_it(
    whole: SweepOutcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingInterrupted, match="before any trial had finished"):
        sweep("limited", time_limit_s=1e-9)

    class Clock(Observer):
        trials, now_s = 0, 0.0

        def training_started(self, plan: Any, first_step: int) -> None:
            self.trials += 1

        def step_finished(self, report: StepReport) -> None:
            if (self.trials, report.step) == (2, 3):
                self.now_s = math.inf

    clock = Clock()
    with monkeypatch.context() as patch:
        patch.setattr("laras.sweeping.trial.time", SimpleNamespace(monotonic=lambda: clock.now_s))
        short = sweep("limited", observer=clock, time_limit_s=3600)
    assert [trial.status for trial in short.record.trials] == ["finished", "interrupted"]
    assert (short.record.status, short.record.final) == ("finished", 0)
    assert facts(sweep("limited", trials=2), first=2) == facts(whole, first=2)


def test_a_finite_space_is_tried_once_and_values_that_do_not_go_together_end_nothing(place: Path) -> None:
    quick = {"max_steps": 1, "eval_steps": 1}
    both = sweep("finite", trials=5, search={"lora_r": "2,4"}, **quick)
    assert sorted(trial.values["lora_r"] for trial in both.record.trials) == [2, 4]
    assert sweep("finite", trials=9, search={"lora_r": "2,4"}, **quick).record == both.record
    some = sweep("odd", trials=2, search=["effective_batch_size=8..16"], **quick)
    assert some.record.best == 0
    failed = [trial for trial in some.record.trials if trial.status == "failed"]
    assert failed and all("is not a multiple of" in str(trial.reason) for trial in failed)
    with pytest.raises(TrainingAborted, match="of 1 trials, none could be finished") as none:
        sweep("nothing", trials=1, memory_budget_fraction=1e-9, **quick)
    assert len(none.value.problems) == 1 and "does not fit" in none.value.problems[0]
    assert none.value.exit_code == ExitCode.ABORTED


def test_another_process_that_sweeps_in_the_folder_is_refused_with_exit_code_7(
    whole: SweepOutcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom laras.rundir import RunDir, hold\n"
    code += "with hold(RunDir(Path(sys.argv[1]))):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    command = [sys.executable, "-c", code, str(whole.sweep_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        monkeypatch.setattr("sys.argv", ["laras", "sweep", str(whole.sweep_dir)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == ExitCode.RUN_STATE
        assert f"is in use by process {other.pid}" in capsys.readouterr().err
        other.communicate()


def test_other_settings_or_other_rows_under_the_same_name_are_refused(whole: SweepOutcome, place: Path) -> None:
    with pytest.raises(RunStateError, match="a sweep of other settings") as caught:
        sweep("whole", search={"learning_rate": "1e-5..1e-3"}, weight_decay=0.5)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["weight_decay", "search"]
    data = place / "chats.jsonl"
    kept = data.read_text(encoding="utf-8")
    try:
        data.write_text(kept.replace("a sea is", "the sea is"), encoding="utf-8")
        with pytest.raises(RunStateError, match="the data have changed") as drift:
            sweep("whole", trials=TRIALS + 1)
    finally:
        data.write_text(kept, encoding="utf-8")
    assert drift.value.problems
    assert SweepRecord.load(whole.sweep_dir) == whole.record


def test_a_split_that_an_older_version_recorded_is_the_same_as_long_as_its_rows_are(whole: SweepOutcome) -> None:
    path = whole.sweep_dir / "records" / "split.json"
    kept = path.read_text(encoding="utf-8")
    content = {**json.loads(kept), "parent_digest": "0" * 64}  # its profile had fewer fields
    del content["warnings"]
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
        assert sweep("whole").record == whole.record
    finally:
        path.write_text(kept, encoding="utf-8")


def test_what_cannot_start_is_refused_before_anything_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught, monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        sweep("refused", trials=0, time_limit_s=-1)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="1 problem in the search"):
        sweep("refused", search=["lerning_rate=1e-5..1e-3"])
    monkeypatch.setattr("laras.sweeping.study.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as absent:
        sweep("refused")
    assert absent.value.hint == "pip install 'laras[sweep]'"
    assert not Path("runs/refused").exists()


def test_the_table_fits_80_columns_and_needs_no_colour(whole: SweepOutcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["sweep", str(whole.sweep_dir)], catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert sum("best" in line and f"{whole.record.best:03d}" in line for line in lines) >= 2
    assert "optimistic" in done.stdout and "\x1b" not in done.stdout


def test_the_ready_configuration_trains_the_same_bytes_again(whole: SweepOutcome) -> None:
    assert whole.final is not None
    again = laras.train(whole.sweep_dir / "laras.yaml", run_name="again").run_dir
    name = "final/adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole.final / name).read_bytes()


def test_the_test_set_opens_for_the_final_model_alone_and_closes_the_sweep(whole: SweepOutcome) -> None:
    final = whole.record.final
    assert final is not None
    for trial in whole.record.trials:
        if trial.number != final:
            with pytest.raises(SealedTestError, match="not its final model") as caught:
                pipeline.test(trial_dir(whole.sweep_dir, trial.number))
            assert caught.value.exit_code == ExitCode.RUN_STATE
            assert str(trial_dir(whole.sweep_dir, final)) in str(caught.value.hint)
    assert pipeline.test(trial_dir(whole.sweep_dir, final), answers=0).openings == 1
    (opening,) = read_openings(trial_dir(whole.sweep_dir, final))
    assert opening.validation_trials == TRIALS
    assert sweep("whole").record == whole.record
    with pytest.raises(RunStateError, match="has been opened"):
        sweep("whole", trials=TRIALS + 1)


def test_the_verb_costs_nothing_until_it_is_used() -> None:
    code = "import sys, laras.cli.main; print([m for m in ('optuna', 'sqlalchemy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
