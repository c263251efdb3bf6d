"""A real CUDA out-of-memory, at training and at validation: the run ends where one with room does."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import tiny_training as tiny
from laras.evaluation.evaluator import evaluate_split
from laras.models.step import TrainStep, eager_step
from laras.records import PlanRevision, RunResult
from laras.training.run import run_training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS, LENGTH = 32, 512
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product of the process


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    whole = LlamaForCausalLM(config).cuda()
    torch.manual_seed(1)
    return get_peft_model(whole, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def rows(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 32_000, (count, LENGTH), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a run in deterministic mode and `allow` leave in the process.

    CUBLAS_WORKSPACE_CONFIG stays as transformers sets it for such a run: torch reads it at every matrix product but
    keeps the workspace that it has, and a larger size than that workspace's lets cuBLAS write over other tensors.
    """
    names = ("CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC")
    before = {name: os.environ.get(name) for name in names}
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def train(run_dir: Path, make_step: Any = None, **options: Any) -> tuple[RunResult, dict[str, torch.Tensor]]:
    plan = tiny.plan(8, 2, max_length=LENGTH, per_device_eval_batch_size=8, learning_rate=1e-3)
    plan = plan.model_copy(update={"hardware": plan.hardware.model_copy(update={"kind": "cuda"})})
    trained = model()
    result = run_training(
        tiny.Scenario(config={"num_train_epochs": 3, "full_determinism": True}).run_config(), plan, trained,
        tiny.tokenizer(), train_rows=rows(ROWS, 1), validation_rows=rows(8, 2), run_dir=run_dir,
        observer=tiny.Recorder(), make_step=make_step, **options,
    )  # fmt: skip
    return result, {name: value.cpu() for name, value in tiny.parameters(trained).items()}


def allow(extra_bytes: int) -> None:
    """Lets this process allocate so much more than it holds."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra_bytes) / total)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all weights together, relative: Adam turns the sign of a gradient near zero into a whole step."""
    assert found.keys() == expected.keys()
    one, other = (torch.cat([values[name].flatten() for name in expected]) for values in (found, expected))
    return float((one - other).norm() / other.norm())


class Tightening:
    """Takes the memory away in the second step."""

    def __init__(self, extra_bytes: int) -> None:
        self.extra_bytes, self.calls = extra_bytes, 0

    def __call__(self, model: nn.Module) -> TrainStep:
        inner = eager_step(model)

        def step(batch: Any, scale: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:  # the second micro-batch of the second step
                allow(self.extra_bytes)
            return inner(batch, scale)

        return tiny.StepOf(step)


def test_a_run_that_really_runs_out_of_memory_ends_where_one_with_room_does(tmp_path: Path) -> None:
    roomy, expected = train(tmp_path / "roomy", rehearse=False)
    assert roomy.events == ()
    # Logits of 8 x 512 tokens take 524 MB in float32, several times over: room for two rows, not for eight.
    tight, found = train(tmp_path / "tight", Tightening(700 * 2**20), rehearse=False)
    kinds = [event.detail for event in tight.events if event.kind == "out_of_memory"]
    assert any("micro-batch 8 rows -> 4 rows" in detail for detail in kinds), tight.events
    assert distance(found, expected) < 1e-2
    for one, other in zip(tiny.metrics(tmp_path / "roomy"), tiny.metrics(tmp_path / "tight"), strict=True):
        assert one == pytest.approx(other, rel=1e-2)


def test_the_new_size_is_recorded_and_a_resume_begins_with_it(tmp_path: Path) -> None:
    tight, _ = train(tmp_path / "run", Tightening(700 * 2**20), rehearse=False)
    revision = PlanRevision.load(tmp_path / "run")
    assert revision.train_split_level >= 1 and tight.parent_digest == revision.digest()
    torch.cuda.set_per_process_memory_fraction(1.0)
    sizes: list[int] = []

    def recording(model: nn.Module) -> TrainStep:
        inner = eager_step(model)

        def step(batch: Any, scale: torch.Tensor) -> torch.Tensor:
            sizes.append(len(batch["input_ids"]))
            return inner(batch, scale)

        return tiny.StepOf(step)

    train(tmp_path / "run", recording, rehearse=False)  # from the beginning: no checkpoint tells it
    assert max(sizes) <= max(1, 8 >> revision.train_split_level)


def test_an_evaluation_that_really_runs_out_of_memory_is_finished_with_smaller_batches(tmp_path: Path) -> None:
    roomy, _ = train(tmp_path / "roomy", rehearse=False)
    tight, _ = train(tmp_path / "tight", rehearse=False, callbacks=(TightEvaluation(),))
    details = [event.detail for event in tight.events if event.kind == "out_of_memory"]
    assert any("evaluation batch 8 -> 4 rows" in detail for detail in details), tight.events
    assert roomy.best is not None and tight.best is not None
    assert tight.best.eval_loss == pytest.approx(roomy.best.eval_loss, rel=2e-3)


class TightEvaluation(TrainerCallback):
    """For the evaluation after step 3, leaves half-way between what batches of one row and of eight rows take."""

    def __init__(self) -> None:
        self.filled: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        if state.global_step == 3:
            one, eight = (evaluation_bytes(model, batch_size) for batch_size in (1, 8))
            assert eight > 1.5 * one, (one, eight)
            self.filled = fill_holes()
            allow((one + eight) // 2)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.filled.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


def evaluation_bytes(model: nn.Module, batch_size: int) -> int:
    """What an evaluation allocates beyond what there is."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    evaluate_split(
        model, rows(8, 2), batch_size=batch_size, pad_token_id=0, device=torch.device("cuda"), observer=tiny.Recorder()
    )
    return torch.cuda.max_memory_allocated() - before


def fill_holes() -> list[torch.Tensor]:
    """Takes what the allocator holds without use and cannot give back, as parts of it are in use.

    The workspace of a matrix product of backward, say, may lie in what once were logits: half a gigabyte of room that
    no limit takes away.
    """
    allow(0)
    filled = []
    for size in (2**26, 2**24, 2**22, 2**21):
        try:
            while True:
                filled.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.cuda.OutOfMemoryError:
            continue
    return filled


def test_the_rehearsal_finds_it_before_the_first_step_and_leaves_no_trace(tmp_path: Path) -> None:
    _, expected = train(tmp_path / "plain", rehearse=False)
    rehearsed, found = train(tmp_path / "rehearsed", rehearse=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [event.kind for event in rehearsed.events] == ["rehearsal"]


def test_a_resume_on_a_gpu_is_exact_in_deterministic_mode(tmp_path: Path) -> None:
    _, expected = train(tmp_path / "run", rehearse=False)
    final = (tmp_path / "run" / "final" / "adapter_model.safetensors").read_bytes()
    _, found = train(tmp_path / "run", rehearse=False, resume_from=tmp_path / "run" / "checkpoints" / "step-3")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").read_bytes() == final
