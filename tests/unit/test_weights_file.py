"""What weights were read from is let go before the first step."""

import gc
import sys
from pathlib import Path

import pytest

import tiny_training as tiny
from laras.config import RunConfig
from laras.models.build import build_model
from laras.models.step import path_of
from laras.progress import Observer
from tiny_models import base_model


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the maps of a process are read from /proc")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])  # of which one has biases, and one ties its head
def test_no_part_of_the_weights_file_stays_in_memory_beside_the_copies_of_the_fused_layers(
    kind: str, tmp_path: Path
) -> None:
    base = base_model(kind, tmp_path / "model")
    choices = {"loss_kind": "chunked", "target_modules": ("all-linear",), "precision": "fp32", "max_length": 32}
    plan = tiny.plan(4, 1, source=str(base), **choices)
    model = build_model(RunConfig(model_name_or_path=str(base)), plan.choices, "cpu", Observer())
    assert path_of(model).fused is not None
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in maps
