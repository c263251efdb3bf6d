"""A short real run ends with the same validation loss on every path."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import laras
from laras.models.builtin import PACKAGE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the weights of the built-in model"),
]

STEPS = 60
PATHS: dict[str, dict[str, Any]] = {
    "plain, padded, whole logits": {"packing": False, "loss_kind": "full"},
    "fused, padded": {"packing": False},
    "fused, packed": {"packing": True},
    "fused, packed, computed again": {"packing": True, "gradient_checkpointing": True},
}


def test_the_final_validation_loss_of_a_real_run_is_the_same_within_a_hundredth_on_every_path(tmp_path: Path) -> None:
    losses = {}
    for name, options in PATHS.items():
        run = laras.train(
            output_dir=str(tmp_path), run_name=name.replace(", ", "-").replace(" ", "-"),
            max_steps=STEPS, eval_steps=STEPS, effective_batch_size=8, early_stopping_patience=None, **options,
        )  # fmt: skip
        assert run.plan.choices.packing == options["packing"]
        assert run.result.best is not None
        losses[name] = run.result.best.eval_loss
    plain = losses["plain, padded, whole logits"]
    assert all(loss == pytest.approx(plain, rel=1e-2) for loss in losses.values()), losses
