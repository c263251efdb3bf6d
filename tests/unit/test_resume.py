"""A run that is stopped and resumed ends with the bytes of one that never was; a changed run is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import laras.whole_folder as whole_folder
import tiny_training as tiny
from laras.errors import CheckpointError, RunStateError, TrainingInterrupted
from laras.models.step import TrainStep, eager_step
from laras.progress import Observer
from laras.records import RunResult
from laras.training.checkpoints import list_checkpoints
from laras.training.resume import choose_checkpoint
from tiny_training import SCENARIOS, Recorder, Scenario, StepOf, outcome, train


class Killed(Exception):
    """Stands for the end of the process: nothing of the run may react to it."""


def dying_step(model: nn.Module, calls: int) -> TrainStep:
    inner, left = eager_step(model), iter(range(calls))

    def step(batch: Any, scale: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise Killed
        return inner(batch, scale)

    return StepOf(step)


@pytest.mark.parametrize("name", ["padded", "packed", "early_stopping", "accumulation", "full", "qlora"])
def test_a_run_that_dies_and_resumes_ends_with_the_same_bytes(tmp_path: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, scenario)
    deaths = 0
    # Sessions end within a step, between steps, before the first save, and after an evaluation without improvement.
    for calls in (*(steps * scenario.accumulation + 1 for steps in (1, 3, 3)), 1000):
        try:
            train(broken, scenario, resume=deaths > 0, make_step=lambda model, n=calls: dying_step(model, n))
            break
        except Killed:
            deaths += 1
    assert deaths >= 2
    expected, found = outcome(whole), outcome(broken)
    assert found == expected
    assert [event.kind for event in RunResult.load(broken).events].count("resume") >= 1


def eight_bit(name: str) -> Scenario:
    return Scenario(choices={"optim": name, "learning_rate": 1e-3, "save_steps": 2}, dropout=0.1)


def wide_model() -> Any:
    """Adapters of 4,096 parameters, from which on bitsandbytes keeps a state in 8 bits; and smaller ones."""
    torch.manual_seed(0)
    base = tiny.LlamaForCausalLM(tiny.base_config())
    torch.manual_seed(1)
    adapter = LoraConfig(
        r=128, rank_pattern={"v_proj": 4}, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(base, adapter)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_states_in_8_bits_survive_a_resume_bit_for_bit(tmp_path: Path, name: str) -> None:
    scenario = eight_bit(name)
    train(tmp_path / "whole", scenario, model=wide_model())
    state = load_file(tmp_path / "whole" / "checkpoints" / "step-6" / "optimizer.safetensors")
    assert {tensor.dtype for key, tensor in state.items() if key.endswith("/state1")} == {torch.uint8, torch.float32}
    with pytest.raises(Killed):
        train(tmp_path / "run", scenario, model=wide_model(), make_step=lambda model: dying_step(model, 7))
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2, 3]
    train(tmp_path / "run", scenario, model=wide_model(), resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_resume_from_a_named_step_takes_the_same_way(tmp_path: Path) -> None:
    train(tmp_path / "whole", SCENARIOS["padded"])
    expected = outcome(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    observer = Recorder()
    train(tmp_path / "again", SCENARIOS["padded"], resume=3, observer=observer)
    assert outcome(tmp_path / "again") == expected
    assert observer.warnings == ["later checkpoints are kept as step-6.left"]
    assert [step for step, _ in list_checkpoints(tmp_path / "again" / "checkpoints")] == [3, 6]
    with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
        train(tmp_path / "again", SCENARIOS["padded"], resume=4)


@pytest.mark.parametrize("evaluation_due", [False, True])
def test_a_run_that_died_after_its_last_step_takes_no_further_one(tmp_path: Path, evaluation_due: bool) -> None:
    """Its last step lies within an epoch, and the process died before it had left a result."""
    scenario = Scenario(config={"max_steps": 4}, choices={"eval_steps": 2, "save_steps": 2})
    if evaluation_due:
        with pytest.raises(TrainingInterrupted):
            train(tmp_path / "run", scenario, observer=Signaller(signal.SIGTERM, in_evaluation=2))
    else:
        train(tmp_path / "run", scenario)
        RunResult.load(tmp_path / "run").model_copy(update={"status": "running"}).save(tmp_path / "run")
    train(tmp_path / "run", scenario, resume=True)
    train(tmp_path / "whole", scenario)
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    assert found == expected
    assert found["steps"] == 4


def test_a_finished_run_has_nothing_to_resume(tmp_path: Path) -> None:
    train(tmp_path, SCENARIOS["padded"])
    with pytest.raises(RunStateError, match="has finished"):
        choose_checkpoint(tmp_path, None, Observer())


class Signaller(Observer):
    """Sends a signal to this process at a moment of the run."""

    def __init__(self, number: int, at_step: int | None = None, in_evaluation: int | None = None) -> None:
        self.number, self.at_step, self.in_evaluation = number, at_step, in_evaluation
        self.evaluations = 0

    def step_finished(self, report: Any) -> None:
        if report.step == self.at_step:
            os.kill(os.getpid(), self.number)

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        self.evaluations += done == 4  # the first batch
        if self.evaluations == self.in_evaluation:
            self.in_evaluation = None
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, {"at_step": 1}),
        (signal.SIGINT, {"at_step": 4}),
        (signal.SIGUSR1, {"in_evaluation": 1}),
        (signal.SIGTERM, {"in_evaluation": 2}),  # the last
    ],
)
def test_a_signal_finishes_the_step_saves_and_loses_nothing(tmp_path: Path, number: int, moment: Any) -> None:
    scenario, before = SCENARIOS["padded"], signal.getsignal(number)
    train(tmp_path / "whole", scenario)
    with pytest.raises(TrainingInterrupted) as caught:
        train(tmp_path / "run", scenario, observer=Signaller(number, **moment))
    assert int(caught.value.exit_code) == 5 and signal.Signals(number).name in caught.value.message
    assert signal.getsignal(number) is before
    result = RunResult.load(tmp_path / "run")
    assert result.status == "interrupted"
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0] == result.steps
    train(tmp_path / "run", scenario, resume=True)
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    assert found == expected


def test_a_second_signal_in_the_middle_of_a_save_loses_nothing(tmp_path: Path) -> None:
    scenario = SCENARIOS["padded"]
    train(tmp_path / "whole", scenario)
    run, child = tmp_path / "run", os.fork()
    if child == 0:
        original = whole_folder.seal_folder

        def interrupted(folder: Path) -> None:
            if folder.name == ".step-4.partial":
                os.kill(os.getpid(), signal.SIGTERM)
            original(folder)

        try:
            whole_folder.seal_folder = interrupted
            train(run, scenario, observer=Signaller(signal.SIGTERM, at_step=4))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert (run / "checkpoints" / ".step-4.partial").exists()
    train(run, scenario, resume=True)
    assert outcome(run) == outcome(tmp_path / "whole")
    assert not list((run / "checkpoints").glob(".*"))


CHANGES: dict[str, dict[str, Any]] = {
    "train_data": {"train_rows": tiny.rows(24, 7)},
    "validation_data": {"validation_rows": tiny.rows(6, 7)},
    "seed": {"config": {"seed": 43}},
    "lr_scheduler_type": {"config": {"lr_scheduler_type": "linear"}},
    "num_train_epochs": {"config": {"num_train_epochs": 3}},
    "weight_decay": {"config": {"weight_decay": 0.5}},
    "warmup_ratio": {"config": {"warmup_ratio": 0.5}},
    "early_stopping_patience": {"config": {"early_stopping_patience": 3}},
    "learning_rate": {"choices": {"learning_rate": 2e-2}},
    "optim": {"choices": {"optim": "adamw_torch_fused"}},
    "packing": {"choices": {"packing": True}},
    "effective_batch": {"choices": {"gradient_accumulation_steps": 4}},
    "precision": {"choices": {"precision": "bf16"}},
    "lora_r": {"choices": {"lora_r": 8}},
    "eval_steps": {"choices": {"eval_steps": 2}},
    "max_steps": {"config": {"max_steps": 5}},
    "max_grad_norm": {"config": {"max_grad_norm": 0.5}},
    "early_stopping_min_delta": {"config": {"early_stopping_min_delta": 0.5}},
    "finetuning_type": {"choices": {"finetuning_type": "full"}},
    "load_in_4bit": {"choices": {"load_in_4bit": True}},
    "load_in_8bit": {"choices": {"load_in_8bit": True}},
    "lora_alpha": {"choices": {"lora_alpha": 16}},
    "lora_dropout": {"choices": {"lora_dropout": 0.1}},
    "use_rslora": {"choices": {"use_rslora": True}},
    "use_dora": {"choices": {"use_dora": True}},
    "target_modules": {"choices": {"target_modules": ("k_proj",)}},
}
OF_THE_MODEL = {"tokenizer", "chat_template", "model_weights", "model_config"}  # in a test of their own


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    source = str(tiny.save_base(folder / "source"))
    with pytest.raises(TrainingInterrupted):
        train(
            folder / "run", Scenario(), observer=Signaller(signal.SIGTERM, at_step=3),
            plan=Scenario().train_plan(source), config=Scenario().run_config(source),
        )  # fmt: skip
    return folder


def resume_changed(folder: Path, run: Path, change: dict[str, Any]) -> RunResult:
    shutil.copytree(folder / "run", run)
    scenario = Scenario(choices=change.get("choices", {}), config=change.get("config", {}))
    options = {key: value for key, value in change.items() if key not in ("choices", "config", "source")}
    source = str(change.get("source", folder / "source"))
    return train(
        run, scenario, resume=True, plan=scenario.train_plan(source), config=scenario.run_config(source), **options
    )[0]


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_run_is_refused_with_the_field_and_both_values(stopped_run: Path, tmp_path: Path, field: str) -> None:
    with pytest.raises(RunStateError) as caught:
        resume_changed(stopped_run, tmp_path / "run", CHANGES[field])
    assert int(caught.value.exit_code) == 7
    (problem,) = [text for text in caught.value.problems if text.startswith(f"{field}: ")]
    assert "was " in problem and ", is " in problem
    hint = caught.value.hint or ""
    assert "undo the change" in hint and f"`laras train CONFIG --from {tmp_path / 'run'}`" in hint


def test_every_part_of_the_identity_is_tried(stopped_run: Path) -> None:
    (newest,) = (stopped_run / "run" / "checkpoints").glob("step-3")
    identity = json.loads((newest / "training.json").read_text())["identity"]
    assert set(identity) == set(CHANGES) | OF_THE_MODEL | {"config"}


ASKED = {
    "learning_rate": 1e-5, "lora_r": 2, "effective_batch_size": 16, "packing": True, "optim": "adamw_8bit",
    "max_length": 512, "dataset": "other.jsonl", "completion_only_loss": False, "split": {"test": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("key", ASKED)
def test_an_edited_configuration_that_the_plan_does_not_follow_is_refused(
    stopped_run: Path, tmp_path: Path, key: str
) -> None:
    with pytest.raises(RunStateError, match="has changed since step-3") as caught:
        resume_changed(stopped_run, tmp_path / "run", {"config": {key: ASKED[key]}})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key}: was ")


def test_a_checkpoint_of_a_version_that_kept_no_configuration_is_gone_on_with(
    stopped_run: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(stopped_run, older)
    checkpoint = older / "run" / "checkpoints" / "step-3"
    state = json.loads((checkpoint / "training.json").read_text())
    del state["identity"]["config"]
    (checkpoint / "training.json").write_text(json.dumps(state))
    whole_folder.seal_folder(checkpoint)
    assert resume_changed(older, tmp_path / "run", {"source": stopped_run / "source"}).status == "finished"


def test_with_packing_the_size_of_the_bins_has_to_stay(tmp_path: Path) -> None:
    packed = {"packing": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, Scenario(choices=packed), observer=Signaller(signal.SIGTERM, at_step=1))
    smaller = {**packed, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with pytest.raises(RunStateError, match="packed_bin_tokens: was 64, is 32"):
        train(tmp_path, Scenario(choices=smaller), resume=True)


def test_another_tokenizer_template_or_base_is_refused(stopped_run: Path, tmp_path: Path) -> None:
    changed = tiny.tokenizer()
    changed.chat_template = "{{ messages }}"
    with pytest.raises(RunStateError, match="chat_template"):
        resume_changed(stopped_run, tmp_path / "template", {"tokenizer": changed})
    changed = tiny.tokenizer()
    changed.add_tokens(["w999"])
    with pytest.raises(RunStateError, match="tokenizer"):
        resume_changed(stopped_run, tmp_path / "tokenizer", {"tokenizer": changed})
    other = tiny.save_base(tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunStateError, match="model_weights"):
        resume_changed(stopped_run, tmp_path / "base", {"source": other})
    rotated = tiny.save_base(tmp_path / "rotated")
    config = json.loads((rotated / "config.json").read_text())
    (rotated / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(RunStateError, match="model_config") as caught:
        resume_changed(stopped_run, tmp_path / "config", {"source": rotated})
    assert len(caught.value.problems) == 1
    (rotated / "config.json").write_text(json.dumps(config | {"transformers_version": "5.99.0"}))  # says nothing
    assert resume_changed(stopped_run, tmp_path / "run", {"source": rotated}).steps == 6


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"report_to": ["tensorboard"], "save_total_limit": 1, "max_skipped_steps": 9}},
        {"config": {"output_dir": "elsewhere", "run_name": "other"}},
        {"choices": {"logging_steps": 2, "save_steps": 2, "per_device_eval_batch_size": 2}},
        {"choices": {"gradient_checkpointing": True}},
        {"choices": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}},
    ],
)
def test_what_the_result_does_not_depend_on_may_change(stopped_run: Path, tmp_path: Path, change: Any) -> None:
    assert resume_changed(stopped_run, tmp_path / "run", change).status == "finished"


def test_nothing_is_written_by_a_refused_resume(stopped_run: Path, tmp_path: Path) -> None:
    before = {path.relative_to(stopped_run / "run"): path.stat().st_size for path in (stopped_run / "run").rglob("*")}
    with pytest.raises(RunStateError):
        resume_changed(stopped_run, tmp_path / "run", CHANGES["seed"])
    after = {path.relative_to(tmp_path / "run"): path.stat().st_size for path in (tmp_path / "run").rglob("*")}
    assert after == before


DAMAGES = ("delete", "truncate", "flip")


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("half")
    train(folder / "whole", SCENARIOS["padded"])
    with pytest.raises(TrainingInterrupted):
        train(folder / "run", SCENARIOS["padded"], observer=Signaller(signal.SIGTERM, at_step=4))
    return folder, outcome(folder / "whole")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_leads_to_the_same_end(
    half_run: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    folder, expected = half_run
    names = sorted(path.name for path in (folder / "run" / "checkpoints" / "step-4").iterdir())
    assert "optimizer.safetensors" in names and "manifest.json" in names
    for name in names:  # every file is tried; one of them all the way to the end
        run = tmp_path / name
        shutil.copytree(folder / "run", run)
        hurt(run / "checkpoints" / "step-4" / name, damage)
        observer = Recorder()
        assert choose_checkpoint(run, None, observer) == run / "checkpoints" / "step-3"
        (warning,) = observer.warnings
        assert "step-4 is damaged" in warning
        assert name in warning or name == "manifest.json"  # whose flipped digest accuses the file that it is of
        assert (run / "checkpoints" / "step-4.damaged" / "damaged.txt").read_text()
    result, _ = train(run, SCENARIOS["padded"], resume=True)
    assert outcome(run) == expected
    assert any(event.kind == "damaged_checkpoint" and "step-4.damaged" in event.detail for event in result.events)


def test_with_no_good_checkpoint_left_the_run_starts_again_and_ends_the_same(
    half_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, expected = half_run
    shutil.copytree(folder / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        hurt(path / "training.json", "truncate")
    assert choose_checkpoint(tmp_path / "run", None, Observer()) is None
    train(tmp_path / "run", SCENARIOS["padded"])
    assert outcome(tmp_path / "run") == expected


def test_a_file_that_is_not_of_the_checkpoint_is_not_loaded(
    half_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(half_run[0] / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-4" / "optimizer.pt").write_bytes(b"a pickle")
    observer = Recorder()
    assert choose_checkpoint(tmp_path / "run", None, observer) == tmp_path / "run" / "checkpoints" / "step-3"
    assert "optimizer.pt: not of this folder" in observer.warnings[0]


def test_a_state_of_another_version_is_refused(half_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from laras.whole_folder import seal_folder

    shutil.copytree(half_run[0] / "run", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-4"
    values = json.loads((folder / "training.json").read_text())
    values["counters"]["unheard_of"] = 1
    (folder / "training.json").write_text(json.dumps(values))
    seal_folder(folder)
    with pytest.raises(CheckpointError, match="not a state that this Laras knows"):
        train(tmp_path / "run", SCENARIOS["padded"], resume=True)


def hurt(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
