"""The plan is the fastest that fits, respects what is forced, and says why."""

import pytest

from laras.config import RunConfig
from laras.planning.architecture import model_spec_from_config
from laras.planning.catalogue import find_gpu
from laras.planning.hardware import cpu_hardware
from laras.planning.planner import plan_training


def spec_of(hidden=4096, layers=32):
    keys = {"num_attention_heads": 32, "vocab_size": 128256, "max_position_embeddings": 8192}
    return model_spec_from_config(
        {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, **keys}, "m"
    )


def plan(gpu="h100", spec=None, **keys):
    hardware = find_gpu(gpu).to_hardware() if gpu else cpu_hardware()
    return plan_training(RunConfig(max_length=1024, **keys), None, None, spec or spec_of(), hardware)


@pytest.mark.parametrize("gpu", ["t4", "rtx 4090", "a100 40gb", "h100", "h200"])
def test_the_plan_is_the_fastest_that_fits(gpu):
    result = plan(gpu)
    assert result.fits
    assert result.memory.train_peak_reserved_bytes <= result.memory.device_budget_bytes
    assert all(a.tokens_per_s <= result.time.tokens_per_s for a in result.alternatives if a.fits)
    assert result.choices.per_device_train_batch_size * result.choices.gradient_accumulation_steps == 16


def test_precision_follows_what_the_card_really_computes():
    assert plan("t4").choices.precision == "fp16"
    assert plan("l4").choices.precision == "bf16"
    assert plan("t4", precision="fp32").choices.precision == "fp32"


@pytest.mark.parametrize(
    ("hidden", "layers", "rank", "rslora"), [(512, 4, 8, False), (2048, 16, 16, False), (4096, 32, 32, True)]
)
def test_rank_follows_the_real_size(hidden, layers, rank, rslora):
    choices = plan(spec=spec_of(hidden, layers)).choices
    assert (choices.lora_r, choices.lora_alpha, choices.use_rslora) == (rank, 2 * rank, rslora)


def test_forced_values_are_respected():
    forced = {
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "load_in_4bit": True,
        "lora_r": 5,
        "optim": "adamw_8bit",
        "loss_kind": "chunked",
    }
    result = plan(**forced)
    assert {key: getattr(result.choices, key) for key in forced} == forced
    assert result.reasons["load_in_4bit"] == "as configured"
    assert plan(gradient_accumulation_steps=4).choices.per_device_train_batch_size == 4


def test_what_cannot_fit_says_what_would():
    result = plan("t4", finetuning_type="full", gradient_checkpointing=False)
    assert not result.fits
    assert {"max_length: 512", "finetuning_type: lora", "gradient_checkpointing: auto"} <= set(result.remedies)
    assert "load_in_4bit: auto" in plan("t4", load_in_4bit=False).remedies
    assert result.warnings


def test_a_cpu_trains_in_fp32_without_packing_or_4bit():
    choices = plan(None, spec=spec_of(64, 2)).choices
    assert (choices.precision, choices.optim, choices.packing, choices.load_in_4bit) == (
        "fp32",
        "adamw_torch",
        False,
        False,
    )


def test_equal_inputs_give_equal_plans():
    assert plan().digest() == plan().digest()
