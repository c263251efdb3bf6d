"""On a GPU in bf16 the fused layers give the plain padded path's loss within 1e-2 and its gradient's direction."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, Phi3Config, Qwen2Config, Qwen3Config, SmolLM3Config

from laras.config import RunConfig
from laras.data.collate import PadCollator
from laras.data.pack import PackCollator
from laras.models.build import build_model
from laras.models.fused import variant
from laras.models.fused.variant import Variant
from laras.models.step import eager_step
from laras.progress import Observer
from laras.records import PlanChoices

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = (300, 77, 512, 1, 130)
SIZES = {
    "vocab_size": 5000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "qwen3": Qwen3Config(**SIZES, head_dim=128),
    "phi3": Phi3Config(**{**SIZES, "hidden_size": 768}),  # heads of 96 channels
    "phi3, part rotated": Phi3Config(**SIZES, partial_rotary_factor=0.75),
    "gemma": GemmaConfig(**SIZES, head_dim=256),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(Qwen2Config(**SIZES, tie_word_embeddings=True), tmp_path_factory.mktemp("model"))


def saved(config, place):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
    return str(place)


def step(folder, batch, **changes):
    values = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "packing": True, "max_length": 512, "finetuning_type": "lora",
        "load_in_4bit": False, "load_in_8bit": False, "precision": "bf16", "optim": "adamw_torch",
        "backend": "transformers", "attention": "sdpa", "loss_kind": "chunked", "lora_r": 16, "lora_alpha": 32.0,
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "trainable_parameters": 0, "total_parameters": 0,
        "target_modules": ("all-linear",),
        "learning_rate": 1e-4, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "mlp_chunk_tokens": 500,
        "loss_chunk_tokens": 300,
    }  # fmt: skip
    choices = PlanChoices(**{**values, **changes})
    model = build_model(RunConfig(model_name_or_path=folder), choices, "cuda:0", Observer())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    on_gpu = {key: value.cuda() for key, value in batch.items()}
    loss = eager_step(model)(on_gpu, torch.tensor(1e-3, device="cuda")).item()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss, torch.cat([parameter.grad.flatten().float() for parameter in trained]), model


def documents():
    generator = torch.Generator().manual_seed(2)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 5000, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", ["none", "selective", "full", "offload"])
def test_bf16_agrees_with_the_plain_padded_path(folder, kind, quantised):
    if quantised:
        pytest.importorskip("bitsandbytes")
    padded = PadCollator(0)(documents())
    plain = step(folder, padded, packing=False, fused_layers=False, loss_kind="full", load_in_4bit=quantised)
    batch = PackCollator(1536, 8, max_length=512, max_targets=1024)(documents())
    fused = step(folder, batch, gradient_checkpointing=kind != "none", checkpoint_kind=kind, load_in_4bit=quantised)
    assert fused[2].laras_path.fused is not None
    assert fused[0] == pytest.approx(plain[0], rel=1e-2)
    assert torch.cosine_similarity(fused[1], plain[1], dim=0) > 0.999


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_agrees_with_the_plain_padded_path(tmp_path, name, quantised):
    if quantised:
        pytest.importorskip("bitsandbytes")
    place = saved(FAMILIES[name], tmp_path)
    padded = PadCollator(0)(documents())
    plain = step(place, padded, packing=False, fused_layers=False, loss_kind="full", load_in_4bit=quantised)
    batch = PackCollator(1536, 8, max_length=512, max_targets=1024)(documents())
    fused = step(place, batch, gradient_checkpointing=True, checkpoint_kind="full", load_in_4bit=quantised)
    assert fused[2].laras_path.fused_refusal is None
    assert fused[0] == pytest.approx(plain[0], rel=1e-2)
    assert torch.cosine_similarity(fused[1], plain[1], dim=0) > 0.999


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("flag", [field.name for field in dataclasses.fields(Variant)])
def test_every_variant_gives_the_same(folder, monkeypatch, flag, quantised):
    if quantised:
        pytest.importorskip("bitsandbytes")
    batch = PackCollator(1536, 8, max_length=512, max_targets=1024)(documents())
    for kind in ("none", "full"):
        changes = {"gradient_checkpointing": kind != "none", "checkpoint_kind": kind, "load_in_4bit": quantised}
        expected = step(folder, batch, **changes)
        with monkeypatch.context() as patch:
            other = dataclasses.replace(variant.CHOSEN, **{flag: not getattr(variant.CHOSEN, flag)})
            patch.setattr(variant, "CHOSEN", other)
            found = step(folder, batch, **changes)
        assert found[0] == pytest.approx(expected[0], rel=1e-3)
        assert torch.cosine_similarity(found[1], expected[1], dim=0) > 0.999
