"""A run whose layers keep their inputs in main memory ends with the bytes of one that keeps them with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laras.models.build import build_model
from laras.models.fused.offload import HostInputs
from laras.models.step import TrainStep, eager_step
from laras.progress import Observer
from tiny_training import Scenario, StepOf, outcome, save_base, train


class Room:
    """A step that runs out of memory amid its backward pass, on batches of more slots."""

    def __init__(self, slots: int) -> None:
        self.slots, self.failures = slots, 0

    def __call__(self, model: nn.Module) -> TrainStep:
        inner = eager_step(model)
        last = next(one for name, one in model.named_parameters() if "layers.1" in name and "lora_A" in name)

        def out_of_memory(_: torch.Tensor) -> None:
            self.failures += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        def step(batch: Any, scale: torch.Tensor) -> torch.Tensor:
            if batch["input_ids"].numel() <= self.slots:
                return inner(batch, scale)
            handle = last.register_hook(out_of_memory)
            try:
                return inner(batch, scale)
            finally:
                handle.remove()

        return StepOf(step)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


def run(base: Path, folder: Path, kind: str, *, packing: bool, **options: Any) -> dict[str, Any]:
    choices = {
        "gradient_checkpointing": True, "checkpoint_kind": kind, "packing": packing, "loss_kind": "chunked",
        "target_modules": ("all-linear",), "mlp_chunk_tokens": 16, "loss_chunk_tokens": 8,
    }  # fmt: skip
    scenario = Scenario(4, 2, choices=choices)
    config = Scenario(config={"model_name_or_path": str(base)}).run_config()
    model = build_model(config, scenario.train_plan(str(base)).choices, "cpu", Observer())
    assert model.laras_path.fused.offloads == (kind == "offload")
    train(folder, scenario, model=model, **options)
    return outcome(folder)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_whole_run_a_split_one_and_a_resumed_one_end_with_the_same_bytes(
    base: Path, tmp_path: Path, packing: bool
) -> None:
    expected = run(base, tmp_path / "kept", "full", packing=packing)
    assert run(base, tmp_path / "sent", "offload", packing=packing) == expected
    assert run(base, tmp_path / "sent", "offload", packing=packing, resume=3) == expected
    rooms = Room(32), Room(32)
    kept = run(base, tmp_path / "kept, split", "full", packing=packing, make_step=rooms[0])
    assert run(base, tmp_path / "sent, split", "offload", packing=packing, make_step=rooms[1]) == kept
    assert rooms[0].failures == rooms[1].failures > 0


def test_main_memory_that_cannot_be_pinned_is_said_once_and_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    observer = Observer()
    monkeypatch.setattr(observer, "warning", told.append)
    original = torch.empty

    def empty(*sizes: Any, pin_memory: bool = False, **keys: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return original(*sizes, **keys)

    monkeypatch.setattr(torch, "empty", empty)
    inputs = HostInputs(3, observer)
    for _ in range(2):
        assert inputs._pinned(8, torch.zeros(1, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert told == ["main memory is not pinned, and steps that copy to it run slower: CUDA error: out of memory"]
