#!/usr/bin/env python3
"""Useful tokens/s and peak memory of Laras' own training path, one process a case, on one GPU.

    python benchmarks/throughput.py --out DIR [--only a,b] [--profile CASE]
    python benchmarks/throughput.py --out DIR --report   (DIR/throughput.jsonl to DIR/throughput.md)

The work: 512 examples of lognormal lengths (median 350, p95 1,500, cap 4,096 tokens, two thirds of them targets), a
random model of Qwen2.5's shape, LoRA r=16 on all linear layers, AdamW, clipping. Useful tokens are those of examples;
warm-up steps are not timed. One JSON line a case, on stdout and in DIR/throughput.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

PEAK_FLOPS = 790e12  # bf16 matrix product of 8192^3 on the H100 measured
MAX_LENGTH, WARM, TIMED, SEED = 4096, 6, 16, 1234
SHAPES = {
    "1.5b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
             "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
CASES = {
    "lora_16k": {"rows": 4}, "lora_8k": {"rows": 2},
    "lora_selective_16k": {"rows": 4, "kind": "selective"},
    "lora_full_16k": {"rows": 4, "kind": "full"}, "lora_full_8k": {"rows": 2, "kind": "full"},
    "qlora_full_16k": {"rows": 4, "kind": "full", "nf4": True, "chunk": 2048, "loss_chunk": 512},
    "qlora_full_8k": {"rows": 2, "kind": "full", "nf4": True, "chunk": 2048, "loss_chunk": 512},
    "qlora_full_8k_graph": {"rows": 2, "kind": "full", "nf4": True, "chunk": 2048, "loss_chunk": 512, "graph": True},
    "transformers_layers_16k": {"rows": 4, "fused": False},
    "7b_qlora_full_8k": {"rows": 2, "kind": "full", "nf4": True, "chunk": 2048, "loss_chunk": 512, "shape": "7b"},
}  # fmt: skip

# The peer's case, the least ratio of tokens/s, and the most memory as a share of the peer's.
AGAINST = {
    "lora_16k": ("unsloth_pack", 1.3, 1.0), "lora_full_16k": ("unsloth_pack_gc", 1.3, 1.1),
    "qlora_full_16k": ("unsloth_qlora_pack_gc", 1.25, 1.1),
}  # fmt: skip


def lengths(count=512, median=350.0, p95=1500.0):
    generator = random.Random(SEED)
    sigma = math.log(p95 / median) / 1.6448536
    made = [max(16, min(MAX_LENGTH, round(median * math.exp(sigma * generator.gauss(0, 1))))) for _ in range(count)]
    made[0] = MAX_LENGTH
    generator.shuffle(made)
    return made


def rows():
    import numpy as np

    generator, made = np.random.default_rng(SEED), []
    for length in lengths():
        ids = generator.integers(300, 50000, size=length)
        labels = ids.copy()
        labels[: length // 3] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def flops_per_useful_token(shape, documents, rank=16):
    """Frozen products forward and to the activations, 6 a LoRA parameter, causal attention within documents, the head
    at targets. Nothing computed again counts."""
    hidden, layers, wide, vocabulary = (
        shape[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    )
    narrow = shape["num_key_value_heads"] * hidden // shape["num_attention_heads"]
    sizes = [(hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden), *[(hidden, wide)] * 3]
    linear = layers * sum(a * b for a, b in sizes)
    adapters = layers * sum(rank * (a + b) for a, b in sizes)
    tokens = sum(len(one["input_ids"]) for one in documents)
    targets = sum(sum(label != -100 for label in one["labels"]) for one in documents)
    squares = sum(len(one["input_ids"]) ** 2 for one in documents)
    head = 4.0 * vocabulary * hidden * targets / tokens
    return 4.0 * linear + 6.0 * adapters + head + 6.0 * hidden * layers * squares / tokens


def model_folder(root, name):
    """A random model of the shape, written once."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    folder = root / name
    if not (folder / "model.safetensors.index.json").exists() and not (folder / "model.safetensors").exists():
        config = Qwen2Config(**SHAPES[name], max_position_embeddings=32768, rope_theta=1e6, use_sliding_window=False)
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def choices_of(case):
    from laras.records import PlanChoices

    kind = case.get("kind", "none")
    return PlanChoices(
        per_device_train_batch_size=case["rows"], per_device_eval_batch_size=1, gradient_accumulation_steps=1,
        gradient_checkpointing=kind != "none", checkpoint_kind=kind, packing=True, max_length=MAX_LENGTH,
        finetuning_type="lora", load_in_4bit=case.get("nf4", False), load_in_8bit=False, precision="bf16",
        optim="adamw_torch_fused", backend="transformers", attention="sdpa", loss_kind="chunked", lora_r=16,
        lora_alpha=32.0, lora_dropout=0.0, use_rslora=False, use_dora=False, trainable_parameters=0,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        total_parameters=0, learning_rate=1e-4, eval_steps=1, save_steps=1, logging_steps=1,
        fused_layers=case.get("fused", True), mlp_chunk_tokens=case.get("chunk", 4096),
        loss_chunk_tokens=case.get("loss_chunk", 1024), cuda_graph=case.get("graph", False),
    )  # fmt: skip


def batches_of(case, documents):
    from laras.data.pack import PackCollator, pack_documents, pack_shape

    sizes = [len(one["input_ids"]) for one in documents]
    targets = [sum(label != -100 for label in one["labels"]) for one in documents]
    budget = case["rows"] * MAX_LENGTH
    bins = pack_documents(sizes, budget, SEED)
    shape = pack_shape(bins, sizes, targets, budget, MAX_LENGTH)
    collate = PackCollator(budget, shape.max_documents, MAX_LENGTH, shape.max_targets)
    useful = [sum(sizes[index] for index in one) for one in bins]
    return [collate([documents[index] for index in one]) for one in bins], useful, shape


def measure(name, root, profile):
    import torch

    from laras.config import RunConfig
    from laras.models.build import build_model
    from laras.models.graphs import train_step
    from laras.progress import Observer

    class Loud(Observer):
        def warning(self, text):
            print(text, file=sys.stderr)

    case = CASES[name]
    documents = rows()
    config = RunConfig(model_name_or_path=str(model_folder(root, case.get("shape", "1.5b"))))
    torch.cuda.empty_cache()
    model = build_model(config, choices_of(case), "cuda:0", Observer())
    batches, useful, shape = batches_of(case, documents)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    step = train_step(model, choices_of(case), Loud())
    torch.cuda.reset_peak_memory_stats()
    losses, done = [], 0

    def one(index):
        batch = {key: value.pin_memory().to("cuda", non_blocking=True) for key, value in batches[index].items()}
        targets = (batch["labels"] != -100).sum()
        losses.append(step(batch, 1.0 / targets) / targets)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return useful[index]

    for number in range(WARM):
        one(number % len(batches))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for number in range(WARM, WARM + TIMED):
        done += one(number % len(batches))
    torch.cuda.synchronize()
    elapsed_s = time.perf_counter() - started
    rate = done / elapsed_s
    flops = flops_per_useful_token(SHAPES[case.get("shape", "1.5b")], documents)
    if profile:
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as record:
            one(0)
            torch.cuda.synchronize()
        table = record.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=80)
        (Path(profile) / f"profile_{name}.txt").write_text(table)
    return {
        "name": name, "useful_tokens_per_s": round(rate, 1), "step_ms": round(1e3 * elapsed_s / TIMED, 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "mfu": round(rate * flops / PEAK_FLOPS, 4), "useful_fraction": round(done / TIMED / shape.budget_tokens, 4),
        "max_documents": shape.max_documents, "max_targets": shape.max_targets, "loss": round(float(losses[-1]), 4),
        "captured": getattr(step, "is_captured", False), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "fused": model.laras_path.fused is not None,  # noqa: E501
    }  # fmt: skip


def report(folder):
    """The table of a run, each case beside the peer that was measured in the same run."""
    found = [json.loads(line) for line in (folder / "throughput.jsonl").read_text().splitlines()]
    rows = {row["name"]: row for row in found}
    lines = ["| case | useful tokens/s | MFU | peak GiB | peer, same run | its tokens/s | its GiB | tokens/s ratio |"
             " memory ratio | must | met |", "|" + "---|" * 11]  # fmt: skip
    for name in CASES:
        if "useful_tokens_per_s" not in rows.get(name, {}):
            continue
        row = rows[name]
        own = f"| {name} | {row['useful_tokens_per_s']:,.0f} | {row['mfu']:.1%} | {row['peak_allocated_gib']:.3f} "
        other, least, most = AGAINST.get(name, (None, 0, 0))
        if not rows.get(other, {}).get("ok"):
            lines.append(own + "| not measured | | | | | | |")
            continue
        peer = rows[other]
        ratio = row["useful_tokens_per_s"] / peer["useful_tok_s"]
        share = row["peak_allocated_gib"] / peer["peak_alloc_gb"]
        lines.append(
            own + f"| {other} | {peer['useful_tok_s']:,.0f} | {peer['peak_alloc_gb']:.3f} | {ratio:.2f} | {share:.2f} "
            f"| {least} at {most} | {'yes' if ratio >= least and share <= most else '**no**'} |"
        )
    cards, versions = {row["gpu"] for row in found}, [row["versions"] for row in found if "versions" in row]
    lines += [
        "",
        f"On {', '.join(sorted(cards))}. Versions: {json.dumps(versions[0]) if versions else 'of Laras only'}.",
    ]
    (folder / "throughput.md").write_text("\n".join(["# Throughput", "", *lines]) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("/tmp/laras_benchmark"))
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--profile", default="")
    parser.add_argument("--budget-s", type=float, default=480)
    parser.add_argument("--case")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.out)
        return
    if arguments.case:
        where = arguments.out if arguments.case in arguments.profile.split(",") else None
        print("@" + json.dumps(measure(arguments.case, arguments.root, where)), flush=True)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in arguments.only.split(","):
        left_s = arguments.budget_s - (time.time() - started)
        command = [sys.executable, __file__, "--out", str(arguments.out), "--root", str(arguments.root)]
        command += ["--case", name, "--profile", arguments.profile]
        if left_s < 15:
            break
        try:
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left_s, check=False)
        except subprocess.TimeoutExpired:
            print(json.dumps({"name": name, "error": "out of time"}), flush=True)
            break
        found = [line[1:] for line in ran.stdout.splitlines() if line.startswith("@")]
        result = json.loads(found[0]) if found else {"name": name, "error": ran.stderr[-1500:]}
        print(json.dumps(result), flush=True)
        with (arguments.out / "throughput.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
