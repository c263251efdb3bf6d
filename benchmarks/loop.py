"""Where the host's time of a small model's step goes: what users with short rows on a fast GPU wait for.

    python benchmarks/loop.py                      # on a GPU: half a minute; the package has to be installed
    python benchmarks/loop.py --device cpu --tiny  # the same logic without one

A model of 30 layers takes steps of 4 rows, once with rows of many lengths, as data has them, and once with rows of one
length: what a new shape costs (kernels chosen and loaded anew) is the difference. One JSON object a line:

queue     until everything of forward and backward is queued
wait      until the device is done, at the one place where the loop waits
norm, optimizer, refresh   as named; `refresh` copies the adapters and lies within `queue`
loop      what is left of a step
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from datasets import Dataset

import tiny_training as tiny
from laras.config import RunConfig
from laras.models.build import build_model
from laras.models.fused.model import FusedModel
from laras.models.step import path_of
from laras.progress import Observer
from laras.training.gradients import StepGradients
from laras.training.run import run_training
from laras.training.trainer import LarasTrainer
from tiny_models import base_model, tokenizer

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}  # fmt: skip
TINY = {**SHAPE, "hidden_size": 144, "intermediate_size": 96}
LAYERS, ROWS, LONGEST, WARM = 30, 4, 256, 8
SECTIONS: dict[str, tuple[type, str]] = {
    "queue": (StepGradients, "compute"),
    "norm": (LarasTrainer, "_gradient_norm"),
    "optimizer": (LarasTrainer, "_optimizer_step"),
    "refresh": (FusedModel, "refresh"),
}


class Clock(Observer):
    """Seconds of every section, step by step, as the host sees them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()
        for name, (owner, method) in SECTIONS.items():
            setattr(owner, method, self._timed(name, getattr(owner, method)))
        torch.Tensor.tolist = self._timed("wait", torch.Tensor.tolist)  # type: ignore[method-assign]

    def _timed(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*given, **named)
            finally:
                self._now[name] += time.perf_counter() - started

        return timed

    def step_finished(self, report: Any) -> None:
        now = time.perf_counter()
        outside = sum(value for name, value in self._now.items() if name != "refresh")
        self.steps.append({**self._now, "loop": now - self._last - outside, "step": now - self._last})
        self._now.clear()
        self._last = now

    def summary(self) -> dict[str, float]:
        """Medians in milliseconds, of the steps after the first."""
        chosen = self.steps[WARM:]
        return {
            name: round(1000 * statistics.median(step.get(name, 0.0) for step in chosen), 2)
            for name in (*SECTIONS, "wait", "loop", "step")
        }


def rows(count: int, shortest: int) -> Dataset:
    draw = random.Random(0)
    ids = [[draw.randrange(3, 320) for _ in range(draw.randint(shortest, LONGEST))] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def measure(folder: Path, arguments: argparse.Namespace, shortest: int, optim: str) -> dict[str, Any]:
    config = RunConfig.model_validate(
        {"model_name_or_path": str(folder / "base"), "max_steps": arguments.steps, "num_train_epochs": 100,
         "report_to": [], "early_stopping_patience": None}
    )  # fmt: skip
    on_gpu = arguments.device == "cuda"
    plan = tiny.plan(
        ROWS, 1, source=str(folder / "base"), max_length=LONGEST, target_modules=("all-linear",), lora_r=8,
        learning_rate=1e-4, save_steps=10**6, eval_steps=10**6, logging_steps=10, loss_kind="chunked", optim=optim,
        precision="bf16" if on_gpu else "fp32",
    )  # fmt: skip
    plan = plan.model_copy(update={"hardware": plan.hardware.model_copy(update={"kind": arguments.device})})
    model = build_model(config, plan.choices, "cuda:0" if on_gpu else "cpu", Observer())
    assert path_of(model).fused is not None
    clock = Clock()
    with tempfile.TemporaryDirectory() as run_dir:
        run_training(
            config, plan, model, tokenizer(), train_rows=rows(ROWS * arguments.steps, shortest),
            validation_rows=rows(2, LONGEST), run_dir=Path(run_dir), observer=clock, rehearse=False,
        )  # fmt: skip
    return clock.summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tiny", action="store_true", help="narrow layers: the host's time alone, on a CPU")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    originals = {key: getattr(*place) for key, place in SECTIONS.items()}
    tolist = torch.Tensor.tolist
    with tempfile.TemporaryDirectory(prefix="laras-loop-") as folder:
        base_model("llama", Path(folder) / "base", num_hidden_layers=LAYERS, **(TINY if arguments.tiny else SHAPE))
        for lengths, shortest in (("many", 20), ("one", LONGEST)):
            for optim in ("adamw_torch_fused", "paged_adamw_8bit"):
                found = measure(Path(folder), arguments, shortest, optim)
                print(json.dumps({"lengths": lengths, "optim": optim, "device": name, **found}), flush=True)
                for key, (owner, method) in SECTIONS.items():
                    setattr(owner, method, originals[key])
                torch.Tensor.tolist = tolist  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
