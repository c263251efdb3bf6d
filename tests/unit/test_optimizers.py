"""Whatever optimizer moves the adapters, the fused layers compute with what it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from torch.optim import SGD, AdamW

import tiny_training as tiny
from laras.config import RunConfig
from laras.data.collate import PadCollator
from laras.models.build import build_model
from laras.models.step import eager_step, path_of, summed_loss, target_losses
from laras.progress import Observer
from laras.training.optimizers import create_states, queue_steps
from laras.training.resume import choose_checkpoint
from laras.training.run import run_training
from laras.training.state import load_optimizer, save_optimizer
from tiny_models import base_model, tokenizer
from tiny_training import outcome

CHOICES = {
    "loss_kind": "chunked", "target_modules": ("all-linear",), "lora_r": 64, "precision": "fp32", "max_length": 32,
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda weights: AdamW(weights, lr=1e-2, fused=True),
    "foreach": lambda weights: AdamW(weights, lr=1e-2, foreach=True),
    "one by one": lambda weights: AdamW(weights, lr=1e-2, foreach=False),
    "8 bits": lambda weights: AdamW8bit(weights, lr=1e-2),
    "8 bits, paged": lambda weights: PagedAdamW8bit(weights, lr=1e-2),
    "without states": lambda weights: SGD(weights, lr=1e-2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model("llama", tmp_path_factory.mktemp("base") / "model")


def fused_model(base: Path, **changed: Any) -> Any:
    plan = tiny.plan(4, 1, source=str(base), **{**CHOICES, **changed})
    model = build_model(RunConfig(model_name_or_path=str(base)), plan.choices, "cpu", Observer())
    assert path_of(model).fused is not None
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_layers_compute_with_the_weights_that_the_optimizer_left(base: Path, name: str) -> None:
    model = fused_model(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, step = OPTIMIZERS[name](trained), eager_step(model)
    rows = tiny.rows(4, 1)
    batch = PadCollator(0)([{key: torch.tensor(row[key]).numpy() for key in ("input_ids", "labels")} for row in rows])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(float(step(batch, torch.tensor(1.0))))
        assert all(bool(parameter.grad.any()) for parameter in trained) or len(losses) == 1  # B begins with zeros
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(summed_loss(model, batch), target_losses(model, batch).nll_N.sum())
    assert losses[2] < losses[1] < losses[0]


def test_a_step_that_is_captured_takes_over_adapters_that_nobody_reported(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay cannot ask whether they have changed."""
    model = fused_model(base)
    ids = tiny.rows(1, 1)[0]["input_ids"]
    batch = PadCollator(0)([{"input_ids": torch.tensor(ids).numpy(), "labels": torch.tensor(ids).numpy()}])
    with torch.no_grad():
        before = summed_loss(model, batch)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()  # as a graph or a foreign kernel would
        assert summed_loss(model, batch) == before
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = summed_loss(model, batch)
        torch.testing.assert_close(captured, target_losses(model, batch).nll_N.sum())
    assert captured != before


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "paged_adamw_8bit"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_resume_with_fused_layers_ends_with_the_same_bytes(
    base: Path, tmp_path: Path, optim: str, packing: bool
) -> None:
    config = RunConfig.model_validate(
        {
            "model_name_or_path": str(base), "max_steps": 4, "num_train_epochs": 9, "report_to": [],
            "early_stopping_patience": None,
        }
    )  # fmt: skip
    changed = {"optim": optim, "packing": packing, "save_steps": 2, "eval_steps": 2}
    plan = tiny.plan(2, 2, source=str(base), **{**CHOICES, **changed})

    def train(run_dir: Path, resume: int | None) -> None:
        run_training(
            config, plan, fused_model(base, **changed), tokenizer(), train_rows=tiny.rows(24, 1),
            validation_rows=tiny.rows(6, 2), run_dir=run_dir, observer=Observer(),
            resume_from=choose_checkpoint(run_dir, resume, Observer()) if resume else None,
        )  # fmt: skip

    train(tmp_path / "run", None)
    expected = outcome(tmp_path / "run")
    train(tmp_path / "run", 2)
    assert outcome(tmp_path / "run") == expected


def trained_weights(steps: int, optimizer_of: Callable[[Any], torch.optim.Optimizer]) -> tuple[Any, Any]:
    """Two weights, large and small for an optimizer in 8 bits, after steps on fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, 64, generator=generator)) for size in (2048, 8)]
    optimizer = optimizer_of(weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weights, optimizer


def test_an_8_bit_step_takes_the_same_way_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained_weights(3, lambda weights: PagedAdamW8bit(weights, lr=1e-2))
    waits: list[int] = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda tensor: waits.append(1))
    steps: list[int] = []

    def queued(weights: Any) -> torch.optim.Optimizer:
        optimizer = queue_steps(PagedAdamW8bit(weights, lr=1e-2))
        optimizer.register_step_post_hook(lambda *given: steps.append(1))  # fused layers live on these
        return optimizer

    found, _ = trained_weights(3, queued)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (waits, steps) == ([], [1, 1, 1])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "without states"])
def test_states_made_before_the_first_step_are_those_that_it_would_make(name: str) -> None:
    def ahead(weights: Any) -> torch.optim.Optimizer:
        optimizer = queue_steps(OPTIMIZERS[name](weights))
        create_states(optimizer)
        assert len(optimizer.state) == len(weights) and all(weight.grad is None for weight in weights)
        values = (value for state in optimizer.state.values() for value in state.values())
        created.extend(value for value in values if isinstance(value, torch.Tensor))
        return optimizer

    created: list[torch.Tensor] = []
    expected, lazy = trained_weights(3, lambda weights: queue_steps(OPTIMIZERS[name](weights)))
    found, eager = trained_weights(3, ahead)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for one, other in zip(found, expected, strict=True):
        assert eager.state[one].keys() == lazy.state[other].keys()
        for key, value in lazy.state[other].items():
            kept = eager.state[one][key]
            assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value
            assert not isinstance(value, torch.Tensor) or any(kept is tensor for tensor in created)


def test_loaded_states_lie_where_the_optimizer_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, optimizer = trained_weights(2, lambda weights: queue_steps(PagedAdamW8bit(weights, lr=1e-2)))
    rest = save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    fresh = queue_steps(PagedAdamW8bit(weights, lr=1e-2))
    made: list[torch.Tensor] = []
    inner = PagedAdamW8bit.get_state_buffer

    def recording(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        made.append(inner(self, *given, **named))
        return made[-1]

    monkeypatch.setattr(PagedAdamW8bit, "get_state_buffer", recording)
    load_optimizer(fresh, tmp_path / "optimizer.safetensors", rest)
    for weight in weights:
        for name, value in optimizer.state[weight].items():
            loaded = fresh.state[weight][name]
            assert torch.equal(loaded, value) if isinstance(value, torch.Tensor) else loaded == value
            if name in ("state1", "state2"):
                assert any(loaded is buffer for buffer in made)
