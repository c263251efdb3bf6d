"""Training on CPU with a tiny model: every method learns, and how a batch is divided does not matter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import laras.training.run as run_module
import tiny_training as tiny
from laras.progress import StepReport
from laras.records import RunResult
from laras.whole_folder import require_whole
from tiny_training import SCENARIOS, Recorder, Scenario, metrics, parameters, train


@pytest.mark.parametrize("micro", [4, 3, 1])
def test_the_result_does_not_depend_on_how_the_batch_is_divided(tmp_path: Path, micro: int) -> None:
    _, whole = train(tmp_path / "whole", Scenario(12, 1, choices={"gradient_checkpointing": micro == 3}))
    _, divided = train(tmp_path / "divided", Scenario(micro, 12 // micro))
    before = parameters(whole)
    for name, value in parameters(divided).items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-5)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "divided"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("name", ["full", "lora", "rslora", "dora", "qlora", "packed"])
def test_every_method_learns(tmp_path: Path, name: str) -> None:
    scenario = SCENARIOS.get(name, Scenario())
    learning = {"num_train_epochs": 12, "warmup_ratio": 0.0}
    observer = Recorder()
    result, _ = train(
        tmp_path / "run",
        Scenario(scenario.micro, scenario.accumulation, scenario.method, choices=scenario.choices, config=learning),
        observer=observer,
    )
    assert observer.warnings == []
    assert observer.steps[-1].loss < observer.steps[0].loss - 0.1
    assert result.status == "finished" and result.train_loss is not None


def test_a_run_leaves_verified_checkpoints_a_best_and_a_final_model_and_its_result(tmp_path: Path) -> None:
    result, _ = train(tmp_path, Scenario(8, 1))
    assert RunResult.load(tmp_path) == result
    assert (result.status, result.steps, result.stopped_early) == ("finished", 6, False)
    assert result.best is not None and result.best.step in {3, 6}
    folders = [*(tmp_path / "checkpoints").iterdir(), tmp_path / "best", tmp_path / "final"]
    for folder in folders:
        require_whole(folder, "")
    names = {path.name for folder in folders for path in folder.rglob("*")}
    assert not [name for name in names if Path(name).suffix in {".pt", ".pth", ".bin", ".pkl"}]
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "final").iterdir()}


def test_the_final_model_is_the_best_one(tmp_path: Path) -> None:
    # A rate this high makes the loss rise after a while.
    result, _trained = train(tmp_path, Scenario(8, 1, choices={"learning_rate": 0.3}, config={"num_train_epochs": 8}))
    losses = {line["step"]: line["eval_loss"] for line in metrics(tmp_path) if "eval_loss" in line}
    assert result.best.step == min(losses, key=losses.get) and result.best.step < result.steps
    best = tmp_path / "checkpoints" / f"step-{result.best.step}" / "adapter_model.safetensors"
    for folder in ("best", "final"):
        assert (tmp_path / folder / best.name).read_bytes() == best.read_bytes()


@pytest.mark.parametrize("rehearse", [False, True])
def test_a_run_without_validation_rows_keeps_the_last_model_and_resumes(tmp_path: Path, rehearse: bool) -> None:
    scenario, none = Scenario(8, 1, config={"early_stopping_patience": 1}), tiny.rows(0, 2)
    result, trained = train(tmp_path, scenario, validation_rows=none, rehearse=rehearse)
    assert (result.status, result.steps, result.best, result.stopped_early) == ("finished", 6, None, False)
    assert not (tmp_path / "best").exists()
    assert not any("eval_loss" in line for line in metrics(tmp_path))
    weights = tmp_path / "final" / "adapter_model.safetensors"
    last = {name.replace(".default", ""): value for name, value in parameters(trained).items()}
    assert all(torch.equal(value, last[name]) for name, value in load_file(weights).items())
    before = weights.read_bytes()
    train(tmp_path, scenario, validation_rows=none, resume=3)
    assert weights.read_bytes() == before


def test_early_stopping_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    observer = Recorder()
    result, _ = train(tmp_path, SCENARIOS["early_stopping"], observer=observer)
    assert result.stopped_early
    assert result.steps == 9  # the first evaluation is the reference; two without improvement follow
    assert [report.evaluations_without_improvement for report in observer.validations] == [0, 1, 2]


def test_every_step_is_reported(tmp_path: Path) -> None:
    observer = Recorder()
    train(tmp_path, Scenario(8, 1), observer=observer)
    assert [report.step for report in observer.steps] == [1, 2, 3, 4, 5, 6]
    last = observer.steps[-1]
    assert last.total_steps == 6 and last.eta_s == 0 and last.epoch == 2.0
    assert last.tokens_per_s > 0 and last.memory_bytes > 10**8 and last.memory_planned_bytes == 10**9


def test_metrics_have_the_documented_names(tmp_path: Path) -> None:
    train(tmp_path, Scenario(8, 1))
    lines = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    step, evaluation = lines[0], next(line for line in lines if "eval_loss" in line)
    assert {"step", "epoch", "time_s", "loss", "grad_norm", "learning_rate", "tokens_per_s"} <= step.keys()
    assert {"memory/rss_bytes", "memory/used_fraction", "memory/planned_peak_bytes"} <= step.keys()
    assert {"eval_loss", "eval_perplexity", "eval_token_accuracy"} <= evaluation.keys()


class Walks(Recorder):
    """Counts, step by step, how often somebody went through all modules of a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self.by_step = 0, []
        for name in ("named_modules", "train", "_named_members"):
            monkeypatch.setattr(nn.Module, name, self.counting(getattr(nn.Module, name)))

    def counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            self.count += 1
            return original(*given, **named)

        return counted

    def step_finished(self, report: StepReport) -> None:
        super().step_finished(report)
        self.by_step.append(self.count)


def test_a_step_walks_through_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = Walks(monkeypatch)
    train(tmp_path, Scenario(2, 2, choices={"eval_steps": 100, "save_steps": 100}), observer=walks)
    assert len(walks.by_step) == 12 and walks.by_step[0] > 0
    assert len(set(walks.by_step)) == 1


def test_one_process_trains_on_one_gpu_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = run_module.sft_config

    def with_several(*given: Any, **named: Any) -> Any:
        arguments = original(*given, **named)
        arguments._n_gpu = 4
        return arguments

    monkeypatch.setattr(run_module, "sft_config", with_several)
    result, _ = train(tmp_path, Scenario(8, 1, config={"max_steps": 1}))
    assert result.status == "finished"
