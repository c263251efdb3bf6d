"""Between two steps, the host waits for the device once: to learn whether the numbers are good."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import tiny_training as tiny
from laras.config import RunConfig
from laras.models.build import build_model
from laras.models.step import path_of
from laras.progress import Observer
from laras.training.run import run_training
from several_processes import MAX_LENGTH, rows
from tiny_models import base_model, tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PLANS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 2},
    "packed": {"per_device_train_batch_size": 1, "packing": True},
    "4-bit, optimizer in 8 bits": {
        "per_device_train_batch_size": 2, "load_in_4bit": True, "optim": "paged_adamw_8bit",
    },
}  # fmt: skip


class Waits(TrainerCallback):
    """Counts what waits for the device, from the beginning of a step to its end."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []
        self._caught: Any = None

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        self._caught = warnings.catch_warnings(record=True)
        self.found.append(self._caught.__enter__())
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, *given: Any, **named: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        self.found[-1] = [str(one.message) for one in self.found[-1] if "synchronizing" in str(one.message)]


@pytest.mark.parametrize("name", PLANS)
def test_a_step_waits_for_the_device_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, waits_in_8_bits = PLANS[name], []
    if find_spec("bitsandbytes") is None and "load_in_4bit" in changed:
        pytest.skip("needs bitsandbytes")
    if find_spec("bitsandbytes") is not None:
        monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", waits_in_8_bits.append)
    base = base_model("llama", tmp_path / "base")
    config = RunConfig.model_validate(
        {"model_name_or_path": str(base), "max_steps": 8, "num_train_epochs": 9, "report_to": []}
    )
    plan = tiny.plan(1, 2, source=str(base), max_length=MAX_LENGTH, **{
        "target_modules": ("all-linear",), "precision": "bf16", "loss_kind": "chunked", "optim": "adamw_torch_fused",
        "save_steps": 100, "eval_steps": 100, **changed,
    })  # fmt: skip
    plan = plan.model_copy(update={"hardware": plan.hardware.model_copy(update={"kind": "cuda"})})
    model, waits = build_model(config, plan.choices, "cuda:0", Observer()), Waits()
    assert path_of(model).fused is not None
    run_training(
        config, plan, model, tokenizer(), train_rows=rows(48, 1), validation_rows=rows(4, 2), run_dir=tmp_path / "run",
        observer=Observer(), callbacks=(waits,),
    )  # fmt: skip
    assert len(waits.found) == 8
    assert [len(found) for found in waits.found[3:]] == [1] * 5, waits.found  # the first ones compile and load
    assert waits_in_8_bits == []
