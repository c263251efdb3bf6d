"""The closed form of the fused layers' memory is that of their simulated step, for every family and way to run."""

from __future__ import annotations

import json

import pytest

from laras.config import RunConfig
from laras.models.simulation import trace_step
from laras.planning.allocator import replay
from laras.planning.architecture import model_spec_from_config
from laras.planning.catalogue import find_gpu
from laras.planning.memory import MemoryCase, estimate_memory, workspace_bytes
from laras.planning.planner import plan_training
from laras.planning.throughput import recorded_step_s
from laras.records import PlanChoices

H100 = find_gpu("h100").to_hardware()
LAYERS = 7
# Wide enough that what the closed form leaves out (rounding, rotations, indices) is small.
SIZES = {
    "hidden_size": 1024, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 3072, "vocab_size": 32000, "max_position_embeddings": 4096, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "phi3": {"num_key_value_heads": 8},
    "gemma": {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1},
}


def choices(kind, **keys):
    defaults = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": kind != "none", "checkpoint_kind": kind, "packing": True, "max_length": 1024,
        "finetuning_type": "lora", "load_in_4bit": False, "load_in_8bit": False, "precision": "bf16",
        "optim": "adamw_torch_fused", "backend": "transformers", "attention": "sdpa", "loss_kind": "chunked",
        "lora_r": 16, "lora_alpha": 16.0, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "target_modules": ("all-linear",), "trainable_parameters": 1, "total_parameters": 1, "learning_rate": 1e-4,
        "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "mlp_chunk_tokens": 2048,
    }  # fmt: skip
    return PlanChoices(**{**defaults, **keys})


def simulated(tmp_path, values, kind, **keys):
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = RunConfig(model_name_or_path=str(tmp_path))
    return trace_step(config, choices(kind, **keys), LAYERS, H100)


@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("kind", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_closed_form_is_the_simulated_peak(tmp_path, family, kind, nf4):
    values = {"model_type": family, **SIZES, **FAMILIES[family]}
    whole = simulated(tmp_path, values, kind, load_in_4bit=nf4).unroll(LAYERS)
    expected = replay(whole.until("evaluation")).peak_allocated_bytes + workspace_bytes(H100)
    case = MemoryCase(
        4, 1024, checkpointing=kind != "none", fused=True, checkpoint_kind=kind, lora_r=16, loss_kind="chunked",
        loss_chunk_tokens=1024, mlp_chunk_tokens=2048, weights="nf4" if nf4 else "bf16",
    )  # fmt: skip
    closed = estimate_memory(model_spec_from_config(values, "m"), case, H100, 1)
    assert closed.train_peak_allocated_bytes == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("family", "kind"), [("qwen3", "full"), ("phi3", "full"), ("qwen3", "offload")])
def test_a_short_trace_unrolled_is_the_whole_depth(tmp_path, monkeypatch, family, kind):
    values = {"model_type": family, **SIZES, **FAMILIES[family]}
    short = simulated(tmp_path, values, kind, load_in_4bit=True)
    assert short.layers < LAYERS
    monkeypatch.setattr("laras.models.simulation._repeat", lambda *_: None)
    whole = simulated(tmp_path, values, kind, load_in_4bit=True)
    assert whole.layers == LAYERS
    assert short.unroll(LAYERS).peaks() == whole.unroll(LAYERS).peaks()
    assert short.work(LAYERS) == whole.work(LAYERS)


def test_kinds_hold_less_the_more_they_compute_again(tmp_path):
    values = {"model_type": "qwen3", **SIZES, **FAMILIES["qwen3"]}
    peaks = []
    for kind in ("none", "selective", "full", "offload"):
        whole = simulated(tmp_path, values, kind).unroll(LAYERS)
        peaks.append(replay(whole.until("evaluation")).peak_allocated_bytes)
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
    inputs = 2 * 1024 * 4 * 1024  # of a layer: bf16, hidden size, tokens
    assert (LAYERS - 2) * inputs <= peaks[2] - peaks[3] <= (LAYERS - 1) * inputs


def test_what_is_copied_is_the_input_of_every_layer_but_the_last_both_ways(tmp_path):
    values = {"model_type": "qwen3", **SIZES, **FAMILIES["qwen3"]}
    work = {kind: simulated(tmp_path, values, kind).work(LAYERS) for kind in ("full", "offload")}
    copied = (LAYERS - 1) * 2 * 1024 * 4 * 1024
    assert {kind: part.copied_bytes for kind, part in work["offload"].items() if part.copied_bytes} == {
        "forward": copied,
        "backward": copied,
    }
    assert not any(part.copied_bytes for part in work["full"].values())
    both = [recorded_step_s(work[kind], H100, span_tokens=1024) for kind in ("full", "offload")]
    assert both[0] < both[1] < 1.05 * both[0]
    slow = H100.model_copy(update={"host_link_bytes_per_s": 1e9})
    assert recorded_step_s(work["offload"], slow, span_tokens=1024) >= 2 * copied / 1e9


@pytest.mark.parametrize(
    ("gpu", "tokens", "kind"),
    [
        ("h100", 4096, "none"), ("rtx 4090", 4096, "selective"), ("l4", 2048, "selective"), ("l4", 16384, "full"),
        ("rtx 3060", 16384, "offload"),
    ],
)  # fmt: skip
def test_a_plan_computes_a_part_again_before_everything_and_that_before_it_moves_inputs(gpu, tokens, kind):
    values = {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768,
    }  # fmt: skip
    config, hardware = RunConfig(max_length=tokens), find_gpu(gpu).to_hardware()
    result = plan_training(config, None, None, model_spec_from_config(values, "m"), hardware)
    assert result.fits
    assert result.choices.fused_layers
    assert result.choices.gradient_checkpointing == (kind != "none")
    assert result.choices.checkpoint_kind == kind
