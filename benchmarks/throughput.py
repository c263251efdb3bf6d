#!/usr/bin/env python3
"""Useful tokens/s and peak memory of Laras' own training path, one process a case, on one GPU.

    python benchmarks/throughput.py --out DIR [--only a,b] [--profile CASE]
    python benchmarks/throughput.py --out DIR --session [--peers DIR]   (everything, see `session.py`)
    python benchmarks/throughput.py --out DIR --predict   (memory without a GPU, to DIR/throughput_predicted.jsonl)
    python benchmarks/throughput.py --out DIR --report    (DIR/throughput.jsonl to DIR/throughput.md)

The work: 512 examples of lognormal lengths (median 350, p95 1,500, cap 4,096 tokens, two thirds of them targets), a
random model of Qwen2.5's shape, LoRA r=16 on all linear layers, AdamW, clipping. Useful tokens are those of examples;
warm-up steps are not timed. One JSON line a case, on stdout and in DIR/throughput.jsonl.

`CASE@key=value,...` changes a case: a flag of `laras.models.fused.variant`, or a key of CASES, as in `kind=offload`.
`--tiny` runs a tiny model on any device, to see that everything runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEAK_FLOPS = 790e12  # bf16 matrix product of 8192^3 on the H100 measured
TINY = "--tiny" in sys.argv
MAX_LENGTH, WARM, TIMED, SEED = (128, 1, 2, 1234) if TINY else (4096, 6, 16, 1234)
SHAPES = {
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
             "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
if TINY:
    _TINY_SHAPE = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 2048, "tie_word_embeddings": True,
    }  # fmt: skip
    SHAPES = dict.fromkeys(SHAPES, _TINY_SHAPE)
FOLDERS = {
    "135m": "small",
    "1.5b": "qwen15b",
    "7b": "qwen7b",
}  # as the runner of the peers names them, so that each is written once
CASES = {
    "lora_16k": {"rows": 4}, "lora_8k": {"rows": 2},
    "lora_selective_16k": {"rows": 4, "kind": "selective"},
    "lora_full_16k": {"rows": 4, "kind": "full"}, "lora_full_8k": {"rows": 2, "kind": "full"},
    "qlora_full_16k": {"rows": 4, "kind": "full", "nf4": True, "loss_chunk": 512},
    "qlora_full_8k": {"rows": 2, "kind": "full", "nf4": True, "chunk": 2736, "loss_chunk": 512},
    "7b_qlora_full_8k": {"rows": 2, "kind": "full", "nf4": True, "loss_chunk": 512, "shape": "7b"},
    "transformers_layers_16k": {"rows": 4, "fused": False},
    "small_lora_4k": {"rows": 1, "shape": "135m"},  # the host takes the time
    # 32 examples a step, as many as 16k packed tokens hold: padded, whole logits, nothing checkpointed or fused.
    "unoptimised": {"rows": 4, "fused": False, "padded": True, "accumulation": 8, "warm": 1, "timed": 3},
}  # fmt: skip

# A case, another of the same run, the least ratio of tokens/s to it, and the most memory as a share of its.
AGAINST = (
    ("lora_16k", "unsloth_pack@16k", 1.3, 1.0), ("lora_full_16k", "unsloth_pack_gc@16k", 1.3, 1.1),
    ("qlora_full_16k", "unsloth_qlora_pack_gc@16k", 1.25, 1.1),
    ("lora_8k", "unsloth_pack@8k", 1.6, 1.0), ("lora_full_8k", "unsloth_pack_gc@8k", 1.6, 1.1),
    ("qlora_full_8k", "unsloth_qlora_pack_gc@8k", 1.6, 1.1),
    ("7b_qlora_full_8k", "unsloth_qlora_pack_gc@7b", 1.25, 1.1),
    ("lora_full_8k", "trl_pad8_gc@8k", 10.0, 0.4), ("lora_full_8k", "unoptimised", 3.0, 0.3),
)  # fmt: skip


def resolve(name):
    """A case by name, changed by what follows an `@`, and its variant of the fused layers."""
    from dataclasses import fields, replace

    from laras.models.fused import variant

    base, _, changes = name.partition("@")
    case, flags = dict(CASES[base]), {}
    known = {field.name for field in fields(variant.Variant)}
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key in known:
            flags[key] = bool(int(value))
        else:
            case[key] = int(value) if value.isdigit() else value
    return case, replace(variant.Variant(), **flags)


def lengths(count=24 if TINY else 512, median=20.0 if TINY else 350.0, p95=80.0 if TINY else 1500.0):
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
        ids = generator.integers(300, 2000 if TINY else 49_000, size=length)  # every vocabulary is larger
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
    from transformers import AutoModelForCausalLM

    folder = root / FOLDERS[name]
    if not (folder / "model.safetensors.index.json").exists() and not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(model_config(name), dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def model_config(name):
    from transformers import Qwen2Config

    return Qwen2Config(**SHAPES[name], max_position_embeddings=32768, rope_theta=1e6, use_sliding_window=False)


def choices_of(case):
    from laras.records import PlanChoices

    kind, padded = case.get("kind", "none"), case.get("padded", False)
    return PlanChoices(
        per_device_train_batch_size=case["rows"], per_device_eval_batch_size=1,
        gradient_accumulation_steps=case.get("accumulation", 1),
        gradient_checkpointing=kind != "none", checkpoint_kind=kind, packing=not padded, max_length=MAX_LENGTH,
        finetuning_type="lora", load_in_4bit=case.get("nf4", False), load_in_8bit=False, precision="bf16",
        optim="adamw_torch_fused", backend="transformers", attention="sdpa",
        loss_kind="full" if padded else "chunked", lora_r=16,
        lora_alpha=32.0, lora_dropout=0.0, use_rslora=False, use_dora=False, trainable_parameters=0,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        total_parameters=0, learning_rate=1e-4, eval_steps=1, save_steps=1, logging_steps=1,
        fused_layers=case.get("fused", True), mlp_chunk_tokens=case.get("chunk", 4096) // (32 if TINY else 1),
        loss_chunk_tokens=case.get("loss_chunk", 1024) // (32 if TINY else 1), cuda_graph=bool(case.get("graph")),
    )  # fmt: skip


def batches_of(case, documents):
    """Optimizer steps as lists of micro-batches, the useful tokens of each, and the shape of a packed one."""
    from laras.data.collate import PadCollator
    from laras.data.pack import PackCollator, pack_documents, pack_shape

    sizes = [len(one["input_ids"]) for one in documents]
    targets = [sum(label != -100 for label in one["labels"]) for one in documents]
    budget = case["rows"] * MAX_LENGTH
    if case.get("padded"):
        each, collate = case["rows"], PadCollator(0)
        micro = [documents[start : start + each] for start in range(0, len(documents) - each + 1, each)]
        many = min(case["accumulation"], len(micro))
        steps = [micro[start : start + many] for start in range(0, len(micro) - many + 1, many)]
        useful = [sum(len(row["input_ids"]) for part in step for row in part) for step in steps]
        return [[collate(part) for part in step] for step in steps], useful, None
    bins = pack_documents(sizes, budget, SEED)
    shape = pack_shape(bins, sizes, targets, budget, MAX_LENGTH)
    collate = PackCollator(budget, shape.max_documents, MAX_LENGTH, shape.max_targets)
    useful = [sum(sizes[index] for index in one) for one in bins]
    return [[collate([documents[index] for index in one])] for one in bins], useful, shape


def measure(name, root, profile):
    import torch

    from laras.config import RunConfig
    from laras.models.build import build_model
    from laras.models.fused import variant
    from laras.models.graphs import train_step
    from laras.progress import Observer

    class Loud(Observer):
        def warning(self, text):
            print(text, file=sys.stderr)

    case, variant.CHOSEN = resolve(name)
    on_gpu = torch.cuda.is_available()
    device = "cuda:0" if on_gpu else "cpu"
    documents = rows()
    config = RunConfig(model_name_or_path=str(model_folder(root, case.get("shape", "1.5b"))))
    torch.cuda.empty_cache()
    model = build_model(config, choices_of(case), device, Loud())
    batches, useful, shape = batches_of(case, documents)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    step = train_step(model, choices_of(case), Loud())
    plain = model.laras_path.fused is None  # the trainer runs transformers' layers so
    losses, done = [], 0

    def one(index):
        targets = sum(int((part["labels"] != -100).sum()) for part in batches[index])
        total = 0.0
        for part in batches[index]:
            pinned = {key: value.pin_memory() if on_gpu else value for key, value in part.items()}
            batch = {key: value.to(device, non_blocking=True) for key, value in pinned.items()}
            total = total + step(batch, torch.tensor(1.0 / targets).to(device, non_blocking=True)) / targets
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return useful[index]

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    warm, timed = case.get("warm", WARM), case.get("timed", TIMED)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for number in range(warm):
        one(number % len(batches))
    wait()
    started = time.perf_counter()
    for number in range(warm, warm + timed):
        done += one(number % len(batches))
    wait()
    elapsed_s = time.perf_counter() - started
    rate = done / elapsed_s
    flops = flops_per_useful_token(SHAPES[case.get("shape", "1.5b")], documents)
    slots = timed * shape.budget_tokens if shape else None
    memory = {} if not on_gpu else {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
    }  # fmt: skip
    profiled = _profile(name, lambda: (one(0), wait()), Path(profile)) if profile else {}
    return {
        "name": name, "useful_tokens_per_s": round(rate, 1), "step_ms": round(1e3 * elapsed_s / timed, 2), **memory,
        "mfu": round(rate * flops / PEAK_FLOPS, 4), "useful_fraction": round(done / slots, 4) if slots else None,
        "loss": round(float(losses[-1]), 4), "captured": getattr(step, "is_captured", False),
        "gpu": torch.cuda.get_device_name() if on_gpu else "no GPU", "torch": torch.__version__, "fused": not plain,
        "variant": vars(variant.CHOSEN), "kind": case.get("kind", "none"), "chunk": choices_of(case).mlp_chunk_tokens,
        **profiled,
    }  # fmt: skip


def _profile(name, step, folder):
    """Where the time of a step goes, to a file; what goes wrong here costs no measurement."""
    import torch

    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as record:
            step()
        key = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
        table = record.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)
        (folder / f"profile_{name}.txt").write_text(table)
    except Exception as error:  # noqa: BLE001 - a profile is not what was asked for
        return {"profile_error": str(error)[:300]}
    return {}


def predict(name):
    """The simulated peak of a case on an H100, every token a target; needs no GPU."""
    from laras.config import RunConfig
    from laras.models.fused import variant
    from laras.models.simulation import trace_step
    from laras.planning.allocator import replay
    from laras.planning.catalogue import find_gpu
    from laras.planning.memory import workspace_bytes

    case, variant.CHOSEN = resolve(name)
    hardware, layers = find_gpu("h100").to_hardware(), SHAPES[case.get("shape", "1.5b")]["num_hidden_layers"]
    _, _, shape = batches_of(case, rows())
    with tempfile.TemporaryDirectory() as folder:
        model_config(case.get("shape", "1.5b")).save_pretrained(folder)
        config = RunConfig(model_name_or_path=folder)
        trace = trace_step(config, choices_of(case), layers, hardware, shape and shape.max_documents)
    whole = trace.unroll(layers)
    peaks = {key: round(value / 2**30, 3) for key, value in whole.peaks().items()}
    peak = replay(whole.until("evaluation")).peak_allocated_bytes + workspace_bytes(hardware)
    work = trace.work(layers)
    return {
        "name": name, "predicted_allocated_gib": round(peak / 2**30, 3), "without_workspace_gib": peaks,
        "kernels": sum(work[kind].kernels for kind in ("forward", "loss", "backward") if kind in work),
        "calls": sum(work[kind].calls for kind in ("forward", "loss", "backward") if kind in work),
    }  # fmt: skip


def report(folder):
    """The table of DIR/throughput.jsonl: each case beside others of the same `run`, which is one call on one GPU."""
    found = [json.loads(line) for line in (folder / "throughput.jsonl").read_text().splitlines()]
    rows = {(row.get("run"), row["name"]): row for row in found if "error" not in row}
    lines = ["| case | useful tokens/s | MFU | peak GiB | against, same run | its tokens/s | its GiB | tokens/s ratio |"
             " memory ratio | must | met | run |", "|" + "---|" * 12]  # fmt: skip
    alone = []
    for (run, name), row in rows.items():
        if name.partition("@")[0] not in CASES:
            continue
        own = f"| {name} | {_rate(row):,.0f} | {row['mfu']:.1%} | {_peak_gib(row):.3f} "
        pairs = [(other, least, most) for case, other, least, most in AGAINST if case == name.partition("@")[0]]
        pairs = [(rows[run, other], *limits) for other, *limits in pairs if (run, other) in rows]
        for other, least, most in pairs:
            ratio, share = _rate(row) / _rate(other), _peak_gib(row) / _peak_gib(other)
            lines.append(
                own + f"| {other['name']} | {_rate(other):,.0f} | {_peak_gib(other):.3f} | {ratio:.2f} | {share:.2f} "
                f"| {least} at {most} | {'yes' if ratio >= least and share <= most else '**no**'} | {run} |"
            )
        if not pairs:
            alone.append(own + f"| | | | | | | | {run} |")
    cards = {row["gpu"] for row in found if "gpu" in row}
    versions = [row["versions"] for row in found if "versions" in row]
    lines += [
        *alone,
        "",
        f"On {', '.join(sorted(cards))}. Versions: {json.dumps(versions[0]) if versions else 'of Laras only'}.",
    ]
    (folder / "throughput.md").write_text("\n".join(["# Throughput", "", *lines]) + "\n")


def _rate(row):
    """Useful tokens/s; the peers' runner has other names."""
    return row.get("useful_tokens_per_s") or row["useful_tok_s"]


def _peak_gib(row):
    return row.get("peak_allocated_gib") or row.get("peak_alloc_gb") or math.nan


def run_case(name, arguments, left_s):
    """Measures a case in a process of its own; a result, or the error."""
    command = [sys.executable, __file__, "--out", str(arguments.out), "--root", str(arguments.root)]
    command += ["--case", name, "--profile", arguments.profile, *(["--tiny"] if TINY else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.time()
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left_s, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"out of time after {left_s:.0f} s"}
    found = [line[1:] for line in ran.stdout.splitlines() if line.startswith("@")]
    result = json.loads(found[0]) if found else {"name": name, "error": ran.stderr[-1500:]}
    return {**result, "wall_s": round(time.time() - started, 1)}


def keep(result, folder, file="throughput.jsonl"):
    """Writes a line at once, so that nothing is lost when time runs out."""
    print(json.dumps(result), flush=True)
    with (folder / file).open("a") as lines:
        lines.write(json.dumps(result) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("/tmp/laras_benchmark"))
    parser.add_argument("--only", default=",".join(CASES), help="cases; with changes to one, separated by spaces")
    parser.add_argument("--profile", default="")
    parser.add_argument("--budget-s", type=float, default=480)
    parser.add_argument("--case")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--session", action="store_true")
    parser.add_argument("--groups", default="16k,8k,variants", help="of a session")
    parser.add_argument("--peers", type=Path, help="folder of the runner of the peers")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = arguments.only.split() if "@" in arguments.only else arguments.only.split(",")
    if arguments.report:
        report(arguments.out)
    elif arguments.case:
        where = arguments.out if arguments.case in arguments.profile.split(",") else None
        print("@" + json.dumps(measure(arguments.case, arguments.root, where)), flush=True)
    elif arguments.predict:
        for name in names:
            keep(predict(name), arguments.out, "throughput_predicted.jsonl")
    elif arguments.session:
        from session import run_session

        return 0 if run_session(arguments) else 3
    else:
        started = time.time()
        for name in names:
            left_s = arguments.budget_s - (time.time() - started)
            if left_s < 15:
                break
            keep(run_case(name, arguments, left_s), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
