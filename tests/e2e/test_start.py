"""`laras train --from RUN`: a new run from the weights of another; its data are kept apart, its records are linked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import laras
from laras.cli.main import app
from laras.errors import CheckpointError, ConfigError, ExitCode, RunStateError
from laras.records import DatasetProfile, EvalResult, ParentRun, RunResult, SplitManifest, TrainPlan
from laras.rundir import RunDir, hold
from laras.sweep_record import SweepRecord, trial_dir
from tiny_models import base_model

WORDS = ["sea", "sun", "tree", "salt", "rain", "road", "bird", "snow", "lamp", "door", "fish", "wind"]
ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"
STATE = ("optimizer.safetensors", "training.json", "trainer_state.json")


def chats(count: int, first: int = 0) -> str:
    lines = []
    for number in range(first, first + count):
        question = f"what is {WORDS[number % 12]} number {number} for a {WORDS[number // 12 % 12]}"
        answer = f"a {WORDS[number % 12]} is what {WORDS[number // 12 % 12]} does, {number} times over"
        turns = [("user", question), ("assistant", answer)]
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n")
    return "".join(lines)


class Place:
    """A folder with a model, data, and one finished run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent = folder / "runs" / "parent"

    def settings(self, **changed: Any) -> dict[str, Any]:
        usual = {
            "model_name_or_path": str(self.folder / "model"), "dataset": str(self.folder / "chats.jsonl"),
            "output_dir": str(self.folder / "runs"), "report_to": [], "max_steps": 4, "learning_rate": 0.01,
            "effective_batch_size": 8, "per_device_train_batch_size": 8, "eval_steps": 2, "save_steps": 2,
        }  # fmt: skip
        return usual | changed

    def child(self, name: str, *, checkpoint: int | None = None, parent: Path | None = None, **changed: Any) -> Path:
        settings = self.settings(run_name=name, **changed)
        return laras.train(settings, from_run=parent or self.parent, checkpoint=checkpoint).run_dir

    def refusal(self, **changed: Any) -> RunStateError:
        with pytest.raises(RunStateError) as caught:
            self.child("refused", **changed)
        assert caught.value.exit_code == ExitCode.RUN_STATE
        assert caught.value.hint
        assert not (self.folder / "runs" / "refused").exists()
        return caught.value


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("start")
    base_model("llama", folder / "model")
    (folder / "chats.jsonl").write_text(chats(60), encoding="utf-8")
    here = Place(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        laras.train(here.settings(run_name="parent"))
        yield here
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def child(place: Place) -> Path:
    return place.child("child", learning_rate=1e-12)


def test_the_new_run_starts_from_the_best_weights_with_a_fresh_optimizer(place: Place, child: Path) -> None:
    start = child / "start"
    assert (start / ADAPTER).read_bytes() == (place.parent / "best" / ADAPTER).read_bytes()
    assert not any((start / name).exists() for name in STATE)
    best = RunResult.load(place.parent).best
    assert best is not None
    lines = [json.loads(line) for line in (child / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[0] == pytest.approx(best.eval_loss, abs=1e-4)  # nearly no learning rate: it stays where it starts
    assert RunResult.load(child).steps == 4
    before, after = load_file(start / ADAPTER), load_file(child / "final" / ADAPTER)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    state = json.loads((child / "checkpoints" / "step-2" / "training.json").read_text(encoding="utf-8"))
    assert state["identity"]["start_weights"] == ParentRun.load(child).weights_sha256
    assert state["schedule"]["last_epoch"] == 2  # its own schedule


def test_its_records_go_back_to_the_other_run(place: Place, child: Path) -> None:
    record = ParentRun.load(child)
    best = RunResult.load(place.parent).best
    assert best is not None
    assert (record.run, record.model, record.step, record.eval_loss) == ("parent", "best", best.step, best.eval_loss)
    assert record.parent_digest == TrainPlan.load(place.parent).digest()
    profile, split, plan = DatasetProfile.load(child), SplitManifest.load(child), TrainPlan.load(child)
    assert profile.parent_digest == record.digest()
    assert split.parent_digest == profile.digest()
    assert plan.parent_digest == split.digest()
    assert RunResult.load(child).parent_digest == plan.digest()
    assert DatasetProfile.load(place.parent).parent_digest is None


def test_a_named_checkpoint_is_taken_instead(place: Place) -> None:
    run = place.child("from-step-2", checkpoint=2, max_steps=1)
    step_2 = place.parent / "checkpoints" / "step-2"
    assert (run / "start" / ADAPTER).read_bytes() == (step_2 / ADAPTER).read_bytes()
    assert (ParentRun.load(run).model, ParentRun.load(run).step) == ("step-2", 2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        place.child("refused", checkpoint=3)
    with pytest.raises(ConfigError, match="of which run"):
        laras.train(place.settings(), checkpoint=2)


def test_a_run_that_lost_all_its_checkpoints_starts_again_from_the_same_weights(place: Place, child: Path) -> None:
    again = place.folder / "runs" / "again"
    shutil.copytree(child, again)
    for name in ("checkpoints", "best", "final"):
        shutil.rmtree(again / name)
    (again / "records" / "result.json").unlink()
    laras.resume(again)
    assert (again / "final" / ADAPTER).read_bytes() == (child / "final" / ADAPTER).read_bytes()
    weights = again / "start" / ADAPTER
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    shutil.rmtree(again / "checkpoints")
    (again / "records" / "result.json").unlink()
    with pytest.raises(CheckpointError, match="start is damaged"):
        laras.resume(again)


def test_whole_weights_are_a_start_too_and_an_adapter_is_none_for_them(place: Place) -> None:
    full = {"finetuning_type": "full", "learning_rate": 1e-3, "max_steps": 2}
    parent = laras.train(place.settings(run_name="full-parent", **full)).run_dir
    run = place.child("full-child", parent=parent, **{**full, "learning_rate": 1e-12})
    before, after = load_file(parent / "best" / MODEL), load_file(run / "final" / MODEL)
    base = load_file(place.folder / "model" / MODEL)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert not all(torch.allclose(base[name], after[name], atol=1e-6) for name in before)
    assert "finetuning_type: lora there, full here" in place.refusal(**full).problems


def test_another_division_of_the_same_rows_is_refused_in_both_directions(place: Place) -> None:
    error = place.refusal(seed=7)
    assert any("of this run's train set were in the test set there" in problem for problem in error.problems)
    assert any("of this run's test set were in the train set there" in problem for problem in error.problems)
    assert "`seed` and `split`" in str(error.hint)
    without_test = place.refusal(split={"test": 0})
    assert any("train set were in the test set there" in problem for problem in without_test.problems)


def test_a_model_or_an_adapter_of_another_shape_is_refused_with_everything_at_once(place: Place) -> None:
    error = place.refusal(seed=7, lora_r=3, lora_target_modules=["q_proj"])
    text = "\n".join(error.problems)
    assert "lora_r: 8 there, 3 here" in text and "target_modules: " in text and "in the test set there" in text
    assert error.message.endswith("parent")
    other = base_model("llama", place.folder / "other", num_hidden_layers=3)
    assert "weights of the base model" in "\n".join(place.refusal(model_name_or_path=str(other)).problems)


def test_rows_may_be_added_and_other_data_may_follow(place: Place) -> None:
    grown, other = place.folder / "grown.jsonl", place.folder / "other.jsonl"
    grown.write_text(chats(70), encoding="utf-8")
    other.write_text(chats(40, first=500), encoding="utf-8")
    run = place.child("grown", dataset=str(grown), max_steps=1)
    assert SplitManifest.load(run).train.rows > SplitManifest.load(place.parent).train.rows
    between = place.child("between", dataset=str(other), max_steps=1)
    # The rows of the first run are no longer in the data of the second; the third may still not move them.
    with pytest.raises(RunStateError, match="cannot start from") as caught:
        place.child("refused", parent=between, seed=7)
    assert any("in the train set there" in problem for problem in caught.value.problems)
    assert place.child("third", parent=between, max_steps=1).is_dir()


def test_a_run_in_use_or_with_damaged_weights_or_members_is_no_start(place: Place) -> None:
    with hold(RunDir(place.parent)):
        assert "is in use by process" in place.refusal().message
    broken = place.folder / "runs" / "broken"
    shutil.copytree(place.parent, broken)
    (broken / "best" / ADAPTER).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="best is damaged"):
        place.child("refused", parent=broken)
    shutil.rmtree(broken / "best")
    shutil.rmtree(broken / "final")
    run = place.child("from-newest", parent=broken, max_steps=1)  # killed before it had a best one
    assert ParentRun.load(run).model == "step-4"
    members = broken / "splits" / "members.parquet"
    members.write_bytes((broken / "splits" / "train.parquet").read_bytes())
    with pytest.raises(RunStateError, match=r"members\.parquet was altered"):
        place.child("refused", parent=broken)
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no weights yet"):
        place.child("refused", parent=broken)
    with pytest.raises(RunStateError, match="is not a run"):
        place.child("refused", parent=place.folder)


def test_a_disk_that_is_full_at_the_beginning_leaves_no_half_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, run_dir: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SplitManifest, "save", full)
        with pytest.raises(ConfigError, match=r"cannot be written to .*: No space left on device") as caught:
            place.child("full")
    assert caught.value.hint
    assert not (place.folder / "runs" / "full").exists()
    with monkeypatch.context() as patch:
        patch.setattr(EvalResult, "save", full)
        with pytest.raises(RunStateError, match="the evaluation record cannot be written"):
            laras.test(place.parent)


def test_on_the_command_line_the_other_run_lends_its_configuration(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    done = CliRunner().invoke(app, ["train", "--from", "runs/parent", "max_steps=1", "--json"])
    assert done.exit_code == 0, done.output
    run = Path(json.loads(done.stdout)["run_dir"])
    assert run.name != "parent"  # a name of its own
    assert "learning_rate: 0.01" in (run / "config.yaml").read_text(encoding="utf-8")
    assert "starts from the weights of parent" in done.stderr
    refused = CliRunner().invoke(app, ["train", "--from", "runs/parent", "seed=7"])
    assert isinstance(refused.exception, RunStateError)
    assert "in the test set there" in str(refused.exception) and "hint:" in str(refused.exception)
    sweep = place.folder / "runs" / "sweep"
    shutil.copytree(place.parent, trial_dir(sweep, 0))
    SweepRecord(config_digest="0", space=(), seed=1, wanted_trials=1, status="finished", final=0).save(sweep)
    done = CliRunner().invoke(app, ["train", "--from", "runs/sweep", "max_steps=1", "--json"])
    assert done.exit_code == 0, done.output
    run = place.folder / json.loads(done.stdout)["run_dir"]
    assert run.parent == place.folder / "runs"  # not among the trials
    assert ParentRun.load(run).run == "000"
