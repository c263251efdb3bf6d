"""The doctor looks at everything, quickly, and says what to do; a plan's JSON keeps its fields."""

import time

from laras.config import RunConfig
from laras.planning.architecture import model_spec_from_config
from laras.planning.catalogue import find_gpu
from laras.planning.doctor import examine
from laras.planning.planner import plan_training
from laras.planning.presentation import plan_json


def test_the_doctor_is_quick_and_complete():
    started = time.monotonic()
    findings = examine()
    assert time.monotonic() - started < 3
    names = {one.name for one in findings}
    assert {
        "python",
        "driver",
        "gpu",
        "bf16",
        "4-bit",
        "attention",
        "unsloth",
        "trackers",
        "disk",
        "cache",
        "hub",
    } <= names
    assert all(one.found for one in findings)
    assert all(one.advice for one in findings if one.status == "problem")


def test_a_host_that_cannot_be_reached_is_a_note_with_advice(monkeypatch):
    monkeypatch.setattr("laras.planning.doctor._HUB_HOST", "nowhere.invalid")
    hub = next(one for one in examine() if one.name == "hub")
    assert hub.status == "note"
    assert "network" in hub.advice or "offline" in hub.found.lower()


def test_the_plan_as_json_has_the_documented_fields():
    keys = {"num_attention_heads": 16, "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 8}
    spec = model_spec_from_config({"model_type": "llama", **keys}, "m")
    plan = plan_json(plan_training(RunConfig(), None, None, spec, find_gpu("l4").to_hardware()))
    assert {"gpu", "fits", "choices", "reasons", "memory", "time", "alternatives"} <= plan.keys()
    documented = {
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "packing", "max_length",
        "load_in_4bit", "precision", "optim", "backend", "attention", "lora_r", "lora_alpha", "use_rslora",
        "target_modules", "trainable_parameters", "total_parameters",
    }  # fmt: skip
    assert documented <= plan["choices"].keys()
    memory = {"train_peak_allocated_bytes", "train_peak_reserved_bytes", "eval_peak_allocated_bytes"}
    assert memory | {"device_budget_bytes", "components"} <= plan["memory"].keys()
    assert {"tokens_per_s", "steps", "total_s"} <= plan["time"].keys()
    assert set(plan["reasons"]) <= set(plan["choices"])
