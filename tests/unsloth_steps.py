"""unsloth_steps.py BACKEND FOLDER: a few optimizer steps of every case in a fresh process.

Leaves FOLDER/BACKEND.json (losses of each case) and FOLDER/BACKEND.safetensors (gradients of the first step). The
plain path is transformers' layers on padded rows without checkpointing, whatever the case says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from laras.config import RunConfig
from laras.models.unsloth import import_first
from laras.progress import Observer
from laras.records import PlanChoices

STEPS, TOKENS, LONGEST = 4, 1536, 512
LENGTHS = (300, 77, 512, 1, 130)
CASES: dict[str, dict[str, Any]] = {
    "llama packed": {"model": "llama", "packing": True},
    "llama packed, checkpointing": {"model": "llama", "packing": True, "gradient_checkpointing": True},
    "llama padded, checkpointing": {"model": "llama", "gradient_checkpointing": True},
    "llama 4-bit, packed, checkpointing": {
        "model": "llama", "packing": True, "gradient_checkpointing": True, "load_in_4bit": True,
    },
    "qwen2 packed": {"model": "qwen2", "packing": True},
    "qwen3 packed": {"model": "qwen3", "packing": True},
    "gemma packed": {"model": "gemma", "packing": True},
    "mistral padded": {"model": "mistral"},
}  # fmt: skip


def main(backend: str, folder: Path) -> None:
    if backend == "unsloth":
        failure = import_first(with_trial=False)
        assert failure is None, failure
    import torch
    from safetensors.torch import save_file

    from laras.data.collate import PadCollator
    from laras.data.pack import PackCollator
    from laras.models.build import build_model
    from laras.models.step import eager_step

    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    losses, gradients = {}, {}
    for name, case in CASES.items():
        changes = {key: value for key, value in case.items() if key != "model"}
        if backend == "transformers":
            changes |= {"packing": False, "gradient_checkpointing": False}
        choices = PlanChoices.model_validate(
            {
                "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False, "packing": False, "max_length": LONGEST, "finetuning_type": "lora",
                "load_in_4bit": False, "load_in_8bit": False, "precision": "bf16", "optim": "adamw_torch",
                "backend": backend, "attention": "sdpa", "loss_kind": "chunked", "lora_r": 16, "lora_alpha": 32.0,
                "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "trainable_parameters": 0,
                "total_parameters": 0, "learning_rate": 1e-3, "eval_steps": 1, "save_steps": 1, "logging_steps": 1,
                "fused_layers": False, "target_modules": (
                    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                ),
            } | changes
        )  # fmt: skip
        model = build_model(RunConfig(model_name_or_path=str(folder / case["model"])), choices, "cuda:0", Observer())
        collate = PackCollator(TOKENS, 8, max_length=LONGEST) if choices.packing else PadCollator(0)
        batch = {key: value.cuda() for key, value in collate(rows).items()}
        trained = {key: one for key, one in model.named_parameters() if one.requires_grad}
        for number, (_, one) in enumerate(sorted(trained.items())):  # B begins at zero, and A without a gradient
            start = torch.Generator().manual_seed(number)
            one.data.add_(0.02 * torch.randn(one.shape, generator=start).to(one.device))
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
        step, scale = eager_step(model), torch.tensor(1 / targets, device="cuda")
        losses[name] = []
        for index in range(STEPS):
            losses[name].append(step(batch, scale).item() / targets)
            if index == 0:
                flat = [one.grad.flatten().float() for _, one in sorted(trained.items())]
                gradients[name] = torch.cat(flat).cpu()
            optimizer.step()
            optimizer.zero_grad()
    (folder / f"{backend}.json").write_text(json.dumps(losses), encoding="utf-8")
    save_file(gradients, folder / f"{backend}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
