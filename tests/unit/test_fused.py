"""Fused layers give the losses and gradients of the plain padded path; packed documents do not see each other."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from laras.config import RunConfig
from laras.data.collate import PadCollator
from laras.data.pack import PackCollator
from laras.models.build import build_model
from laras.models.step import eager_step, summed_loss
from laras.progress import Observer
from laras.records import PlanChoices

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
LENGTHS = (5, 17, 9, 1, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # random biases and norms, or a lost one would go unseen
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        found[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(found[name])
    return found


def choices(**changes):
    values = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "packing": True, "max_length": 32, "finetuning_type": "lora",
        "load_in_4bit": False, "load_in_8bit": False, "precision": "fp32", "optim": "adamw_torch",
        "backend": "transformers", "attention": "sdpa", "loss_kind": "chunked", "lora_r": 4, "lora_alpha": 8.0,
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "trainable_parameters": 0, "total_parameters": 0,
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "learning_rate": 1e-4, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "mlp_chunk_tokens": 16,
        "loss_chunk_tokens": 7,
    }  # fmt: skip
    return PlanChoices(**{**values, **changes})


def built(folder, **changes):
    model = build_model(RunConfig(model_name_or_path=folder), choices(**changes), "cpu", Observer())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def rows():
    generator = torch.Generator().manual_seed(2)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 96, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def packed(documents):
    return PackCollator(48, 8, max_length=32, max_targets=40)(documents)


def step(model, batch):
    model.zero_grad()
    loss = eager_step(model)(batch, torch.tensor(0.5))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return loss.item(), gradient


def same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert torch.cosine_similarity(found[1], expected[1], dim=0) > 0.999999
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["none", "selective", "full", "transformers"])
def test_every_path_gives_the_loss_and_gradient_of_the_plain_padded_one(folders, name, kind):
    plain = built(folders[name], packing=False, fused_layers=False, loss_kind="full")
    expected = step(plain, PadCollator(0)(rows()))
    changes = {"fused_layers": False} if kind == "transformers" else {"checkpoint_kind": kind}
    model = built(folders[name], gradient_checkpointing=kind not in ("none", "transformers"), **changes)
    assert (model.laras_path.fused is not None) == (kind != "transformers" and name != "qwen3")
    same(step(model, packed(rows())), expected)
    same(step(model, PadCollator(0)(rows())), expected)
    without_places = {key: value for key, value in packed(rows()).items() if key != "target_positions"}
    same(step(model, without_places), expected)


def test_changing_one_document_changes_no_other_loss(folders):
    model = built(folders["qwen2"])
    documents = rows()
    silent = [{**documents[1], "labels": [-100] * LENGTHS[1]}, *documents[2:]]
    changed = [{**silent[0], "input_ids": [7] * LENGTHS[1]}, *documents[2:]]
    with torch.no_grad():
        assert summed_loss(model, packed(silent)) == summed_loss(model, packed(changed))


def test_adapters_that_change_are_taken_over(folders):
    model = built(folders["llama"])
    before = summed_loss(model, packed(rows())).item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        summed_loss(model, packed(rows())).backward()
        optimizer.step()
    assert summed_loss(model, packed(rows())).item() < before
    path, model.laras_path = model.laras_path, None
    plain = summed_loss(model, PadCollator(0)(rows())).item()
    model.laras_path = path
    assert summed_loss(model, packed(rows())).item() == pytest.approx(plain, rel=1e-5)


def test_disabled_adapters_are_honoured(folders):
    model = built(folders["qwen2"])
    fused = model.laras_path.fused
    with torch.no_grad(), model.disable_adapter():
        assert fused.refusal() == "adapters are disabled or merged"
        base = summed_loss(model, packed(rows())).item()
    assert fused.refusal() is None
    assert base != pytest.approx(summed_loss(model, packed(rows())).item(), rel=1e-4)


def test_what_fused_layers_refuse_is_said(folders):
    texts = []
    observer = Observer()
    observer.message = texts.append
    config = RunConfig(model_name_or_path=folders["qwen2"])
    build_model(config, choices(lora_dropout=0.1), "cpu", observer)
    assert texts == ["layers of transformers: no fused layers for adapter dropout, DoRA or trained biases"]


def test_a_step_runs_on_meta_tensors(folders):
    config = RunConfig(model_name_or_path=folders["qwen2"])
    model = build_model(config, choices(precision="bf16", gradient_checkpointing=True), "meta", Observer())
    batch = {key: value.to("meta") for key, value in packed(rows()).items()}
    eager_step(model)(batch, torch.ones((), device="meta"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained)
