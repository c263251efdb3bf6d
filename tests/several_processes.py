"""Trains every kind of run as one of several processes: `python several_processes.py FOLDER cuda|cpu`.

The launcher's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) say which. With several, each run is
then taken up again from its middle, and has to end with the bytes that it ended with before.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `laras train` does

import torch
from datasets import Dataset

import tiny_training as tiny
from laras.config import RunConfig
from laras.models.build import build_model
from laras.models.loader import load_tokenizer
from laras.progress import Observer
from laras.ranks import from_rank_zero, own_rank
from laras.training.resume import choose_checkpoint
from laras.training.run import run_training
from tiny_models import base_model

KINDS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "fused_layers": False},
    "packed": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "packing": True, "precision": "bf16",
        "loss_kind": "chunked", "gradient_checkpointing": True, "checkpoint_kind": "selective",
        "optim": "adamw_torch_fused",
    },
    "captured": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "packing": True, "precision": "bf16",
        "loss_kind": "chunked", "optim": "adamw_torch_fused", "cuda_graph": True,
    },
    "qlora_8bit": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "load_in_4bit": True, "precision": "bf16",
        "loss_kind": "chunked", "optim": "paged_adamw_8bit",
    },
}  # fmt: skip
STEPS, MIDDLE, MAX_LENGTH = 6, 3, 128
FINAL = Path("final") / "adapter_model.safetensors"


def rows(count: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    ids = [[draw.randrange(3, 320) for _ in range(draw.randint(20, MAX_LENGTH - 6))] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 5 + row[5:] for row in ids]})


def train(run_dir: Path, base: Path, kind: str, device: str, resume: bool = False) -> None:
    config = RunConfig.model_validate(
        {
            "model_name_or_path": str(base), "num_train_epochs": 100, "max_steps": STEPS, "report_to": [],
            "full_determinism": True, "early_stopping_patience": None,
        }
    )  # fmt: skip
    settings = {"target_modules": ("all-linear",), "learning_rate": 1e-3, "save_steps": MIDDLE, "eval_steps": MIDDLE}
    plan = tiny.plan(1, 1, source=str(base), max_length=MAX_LENGTH, **settings, **KINDS[kind])
    plan = plan.model_copy(update={"hardware": plan.hardware.model_copy(update={"kind": device})})
    place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else "cpu"
    checkpoint = from_rank_zero(lambda: choose_checkpoint(run_dir, MIDDLE, Observer())) if resume else None
    model = build_model(config, plan.choices, place, Observer())
    run_training(
        config, plan, model, load_tokenizer(str(base)), train_rows=rows(48, 1), validation_rows=rows(7, 2),
        run_dir=run_dir, observer=tiny.Recorder(), resume_from=checkpoint,
    )  # fmt: skip
    assert {parameter.device for parameter in model.parameters()} == {torch.device(place)}


def main(folder: Path, device: str) -> None:
    base = Path(from_rank_zero(lambda: str(base_model("llama", folder / "base"))))
    for kind in KINDS:
        train(folder / kind, base, kind, device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            before = from_rank_zero((folder / kind / FINAL).read_bytes)
            train(folder / kind, base, kind, device, resume=True)
            if own_rank() == 0:
                same = (folder / kind / FINAL).read_bytes() == before
                (folder / f"{kind}.resumed").write_text("the same" if same else "another")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
