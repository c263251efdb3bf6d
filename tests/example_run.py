"""A run directory as training leaves it, made from records: what the report and its tests read."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from laras.config import RunConfig
from laras.config_file import config_to_yaml
from laras.records import (
    Alternative,
    BestCheckpoint,
    DatasetProfile,
    Environment,
    EvalResult,
    HardwareSpec,
    LengthStats,
    Measured,
    MemoryEstimate,
    ModelSpec,
    Opening,
    PlanChoices,
    RowProblem,
    RunEvent,
    RunResult,
    Sample,
    Samples,
    SourceFile,
    SplitDrift,
    SplitInfo,
    SplitManifest,
    SplitScore,
    TimeEstimate,
    TrainPlan,
)

GIB = 2**30


def lengths(rows: int, scale: float, seed: int) -> LengthStats:
    rng = random.Random(seed)
    values = sorted(min(2048, 12 + int(rng.lognormvariate(5.2, 0.7) * scale)) for _ in range(rows))
    edges = tuple(range(0, 2049, 64))
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(len(counts) - 1, value // 64)] += 1
    at = lambda share: float(values[min(rows - 1, int(share * rows))])  # noqa: E731
    return LengthStats(
        rows=rows, min=values[0], max=values[-1], mean=sum(values) / rows, median=at(0.5), p90=at(0.9), p95=at(0.95),
        p99=at(0.99), total=sum(values), target_total=sum(values) * 6 // 10, histogram_edges=edges,
        histogram_counts=tuple(counts),
    )  # fmt: skip


def choices(**changed: object) -> PlanChoices:
    values: dict[str, object] = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 4,
        "gradient_checkpointing": False, "packing": True, "max_length": 2048, "finetuning_type": "lora",
        "load_in_4bit": False, "load_in_8bit": False, "precision": "bf16", "optim": "adamw_torch_fused",
        "backend": "transformers", "attention": "sdpa", "loss_kind": "chunked", "lora_r": 8, "lora_alpha": 16,
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "target_modules": ("q_proj", "v_proj"),
        "trainable_parameters": 2_442_240, "total_parameters": 137_000_000, "learning_rate": 2e-4, "eval_steps": 50,
        "save_steps": 50, "logging_steps": 1,
    }  # fmt: skip
    return PlanChoices.model_validate({**values, **changed})


def model_spec(source: str = "HuggingFaceTB/SmolLM2-135M-Instruct") -> ModelSpec:
    return ModelSpec(
        source=source, model_type="llama", architecture="LlamaForCausalLM", layers=30, hidden_size=576,
        intermediate_size=1536, attention_heads=9, key_value_heads=3, head_dim=64, vocab_size=49152,
        max_position_embeddings=8192, tie_word_embeddings=True, total_parameters=134_515_008,
        linear_parameters=106_168_320, embedding_parameters=28_311_552, config_digest="c0" * 32,
    )  # fmt: skip


def write_example_run(
    path: Path, *, steps: int = 600, seed: int = 0, finished: bool = True, evaluated: bool = True, hostile: str = ""
) -> Path:
    """Writes the records, metrics and ledger of a run with a resume, two memory splits and an early stop."""
    config = RunConfig(run_name=path.name, seed=seed, dataset="data/chats.jsonl")
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    profile = _profile(hostile)
    split = _split(profile, seed)
    plan = _plan(split, hostile, steps)
    environment = Environment(
        laras_version="0.1.0", python_version="3.11.9", platform="Linux-x86_64", device="NVIDIA L4", driver="550.54",
        packages={"torch": "2.13.0", "transformers": "5.17.0", "trl": "1.15.0"}, processes=1,
        created_at="2026-11-24T09:30:00+00:00",
    )  # fmt: skip
    for record in (environment, profile, split, plan):
        record.save(path)
    best = write_metrics(path, steps, seed)
    if finished:
        result = _result(plan, steps, best, hostile)
        result.save(path)
        if evaluated:
            _evaluation(result, seed).save(path)
            _samples(seed, hostile).save(path)
            ledger = path / "splits" / "sealed" / "openings.jsonl"
            ledger.parent.mkdir(parents=True)
            opening = Opening(
                opened_at="2026-11-24T10:00:00+00:00", purpose=f"laras test{hostile}", max_samples=None,
                laras_version="0.1.0",
            )  # fmt: skip
            ledger.write_text((opening.model_dump_json() + "\n") * 2, encoding="utf-8")
    return path


def write_metrics(path: Path, steps: int, seed: int) -> BestCheckpoint:
    """`logs/metrics.jsonl` with a spike, a null and validation every twelfth of the run."""
    rng = random.Random(seed)
    every, best = max(1, steps // 12), BestCheckpoint(step=0, eval_loss=math.inf)
    lines = []
    for step in range(1, steps + 1):
        share = step / steps
        loss = 0.9 + 1.5 * math.exp(-6 * share) + rng.gauss(0, 0.06) + (2.5 if step == steps // 3 else 0)
        line = {
            "step": step, "epoch": 3 * share, "time_s": 0.4 * step, "loss": None if step == steps // 2 else loss,
            "grad_norm": abs(rng.gauss(0.8, 0.25)), "learning_rate": 2e-4 * min(1, share * 10) * (1.02 - share),
            "tokens_per_s": 5200 + rng.gauss(0, 180), "memory/allocated_bytes": 3.1 * GIB + rng.random() * GIB / 3,
            "memory/reserved_bytes": 4.2 * GIB + rng.random() * GIB / 5, "memory/used_fraction": 0.3,
        }  # fmt: skip
        lines.append(line)
        if step % every == 0:
            eval_loss = 1.05 + 1.4 * math.exp(-6 * share) + 0.25 * max(0, share - 0.75)
            if eval_loss < best.eval_loss:
                best = BestCheckpoint(step=step, eval_loss=eval_loss)
            place = {"step": step, "epoch": 3 * share, "time_s": 0.4 * step}
            scores = {
                "eval_loss": eval_loss,
                "eval_perplexity": math.exp(eval_loss),
                "eval_token_accuracy": 0.5 + share / 4,
            }
            lines.append({**place, **scores})
    logs = path / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return best


def _profile(hostile: str) -> DatasetProfile:
    problem = RowProblem(file="data/chats.jsonl", line=17, reason=f"the last turn is empty{hostile}", action="skipped")
    return DatasetProfile(
        source=f"data/chats.jsonl{hostile}",
        files=(SourceFile(path="data/chats.jsonl", bytes=4_000_000, sha256="ab" * 32),),
        format="messages", rows=3003, kept_rows=3000, problems=(problem,), tokens=lengths(3000, 1.0, 1),
        max_length_tokens=2048, overlong="truncate", truncated_rows=9, duplicate_rows=31, near_duplicate_groups=44,
        mask_source="derived", tokenizer_digest="11" * 32, chat_template_digest="22" * 32,
    )  # fmt: skip


def _split(profile: DatasetProfile, seed: int) -> SplitManifest:
    parts = {
        name: SplitInfo(rows=rows, tokens=lengths(rows, scale, rows), sha256=f"{rows + len(name):064x}")
        for name, rows, scale in (("train", 2100, 1.0), ("validation", 450, 1.05), ("test", 450, 0.95))
    }
    return SplitManifest(
        parent_digest=profile.digest(), seed=seed, ratios=(0.7, 0.15, 0.15), stratify_by="topic",
        strata={"maths": {"train": 1000, "validation": 220, "test": 210}, "law": {"train": 1100, "test": 240}},
        drift=(SplitDrift(split="validation", ks_statistic=0.03, p_value=0.71),
               SplitDrift(split="test", ks_statistic=0.05, p_value=0.22)),
        excluded_rows=3, warnings=("the validation split is small",), **parts,
    )  # fmt: skip


def _plan(split: SplitManifest, hostile: str, steps: int) -> TrainPlan:
    components = {
        "weights": 270_000_000, "adapters": 9_800_000, "gradients": 9_800_000, "optimizer_states": 19_600_000,
        "activations": int(1.9 * GIB), "logits": int(0.9 * GIB), "workspace": 64 * 2**20,
    }  # fmt: skip
    other = Alternative(
        per_device_train_batch_size=8, gradient_checkpointing=True, packing=True, load_in_4bit=False,
        loss_kind="chunked", train_peak_allocated_bytes=2 * GIB, tokens_per_s=4100, fits=True,
    )  # fmt: skip
    return TrainPlan(
        parent_digest=split.digest(), config_digest="33" * 32, model=model_spec(), choices=choices(),
        hardware=HardwareSpec(
            kind="cuda", gpu_name="NVIDIA L4", count=1, total_bytes=23 * GIB, other_processes_bytes=0,
            compute_capability=(8, 9), native_bf16=True, bandwidth_bytes_per_s=3e11, peak_flops={"bf16": 1.2e14},
            source="local",
        ),
        reasons={"precision": f"the GPU computes in bf16{hostile}", "packing": "sequences are short: less padding",
                 "per_device_train_batch_size": "fastest that fits the budget"},
        memory=MemoryEstimate(
            train_peak_allocated_bytes=sum(components.values()), train_peak_reserved_bytes=int(4.4 * GIB),
            eval_peak_allocated_bytes=2 * GIB, device_budget_bytes=int(5.2 * GIB), components=components,
            peak_moment="backward of the last layer", method="closed-form",
        ),
        time=TimeEstimate(tokens_per_s=5400, steps=steps, total_s=0.38 * steps), total_steps=steps, fits=True,
        alternatives=(other,), warnings=("nothing serious",),
    )  # fmt: skip


def _result(plan: TrainPlan, steps: int, best: BestCheckpoint, hostile: str) -> RunResult:
    return RunResult(
        parent_digest=plan.digest(), status="finished", steps=steps, epochs=3.0, train_loss=1.1, best=best,
        stopped_early=True,
        measured=Measured(
            peak_allocated_bytes=int(3.43 * GIB), peak_reserved_bytes=int(4.4 * GIB), tokens_per_s=5210.5,
            elapsed_s=0.4 * steps,
        ),
        events=(
            RunEvent(step=steps // 4, kind="resume", detail=f"went on from step-{steps // 4}{hostile}"),
            RunEvent(step=steps * 2 // 5, kind="out_of_memory", detail="micro-batch 4 -> 2, same gradient"),
            RunEvent(step=steps * 3 // 5, kind="out_of_memory", detail="micro-batch 2 -> 1, same gradient"),
        ),
    )  # fmt: skip


def _evaluation(result: RunResult, seed: int) -> EvalResult:
    shift = 0.05 * seed
    return EvalResult(
        parent_digest=result.digest(), openings=2, loss_improvement_ci95=(1.05, 1.25),
        base=SplitScore(loss=2.31, loss_ci95=(2.24, 2.39), perplexity=10.07, perplexity_ci95=(9.4, 10.9),
                        token_accuracy=0.52, target_tokens=61_234, examples=450),
        tuned=SplitScore(loss=1.16 + shift, loss_ci95=(1.1 + shift, 1.22 + shift), perplexity=3.19,
                         perplexity_ci95=(3.0, 3.39), token_accuracy=0.71, target_tokens=61_234, examples=450),
    )  # fmt: skip


def _samples(seed: int, hostile: str) -> Samples:
    sample = Sample(
        row=41, prompt=f"<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n{hostile}",
        reference="4", base=f"It depends on what you mean. {hostile}", tuned=f"4{hostile}",
    )  # fmt: skip
    return Samples(seed=seed, max_new_tokens=64, samples=(sample, sample.model_copy(update={"row": 97, "base": None})))
