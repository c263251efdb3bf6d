"""Adapters go to every linear layer but the head, start as nothing, and depend on the seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from laras.errors import ConfigError
from laras.models.lora import attach_lora, linear_module_names, resolve_target_modules

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny(model_type: str, **more: object):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SMALL | more)))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; a packed 4-bit weight counts as the parameters that it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes keeps the shape before packing here
        count = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ARCHITECTURES = [
    ("llama", {"pad_token_id": 0}, LLAMA),
    ("gemma", {"head_dim": 8, "num_key_value_heads": 1}, LLAMA),
    ("gpt_neox", {}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ("phi", {"pad_token_id": 0}, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    ("gpt2", {"bos_token_id": 0, "eos_token_id": 0}, {"c_attn", "c_proj", "c_fc"}),
    ("falcon", {"bos_token_id": 0}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
]


@pytest.mark.parametrize(("model_type", "more", "expected"), ARCHITECTURES)
def test_every_linear_layer_but_the_head_is_a_target(model_type, more, expected):
    model = tiny(model_type, **more)
    assert set(linear_module_names(model)) == expected
    adapted = attach_lora(model, target_modules=resolve_target_modules(model, "auto"), r=2, alpha=4, seed=1)
    head = adapted.get_base_model().get_output_embeddings()
    assert type(head) is torch.nn.Linear
    assert not head.weight.requires_grad


def test_targets_are_found_without_weights():
    with torch.device("meta"):
        assert set(linear_module_names(tiny("llama", pad_token_id=0))) == LLAMA


def test_requested_targets_are_respected_and_unknown_ones_all_named():
    model = tiny("llama", pad_token_id=0)
    assert resolve_target_modules(model, ["q_proj", "layers.0.mlp.up_proj"]) == ("q_proj", "layers.0.mlp.up_proj")
    assert set(resolve_target_modules(model, "all-linear")) == LLAMA
    with pytest.raises(ConfigError, match="W_pack, qproj not found") as caught:
        resolve_target_modules(model, ["W_pack", "q_proj", "qproj"])
    assert "gate_proj" in str(caught.value)
    with pytest.raises(ConfigError, match="lm_head not found among the layers that take adapters"):
        resolve_target_modules(model, "lm_head")


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapted_model_starts_as_the_base_model(use_dora):
    model = tiny("llama", pad_token_id=0)
    input_ids = torch.arange(8)[None]
    before = model(input_ids).logits
    adapted = attach_lora(model, target_modules=LLAMA, r=2, alpha=4, use_dora=use_dora, seed=1)
    torch.testing.assert_close(adapted(input_ids).logits, before, atol=1e-5, rtol=1e-5)


def test_adapters_depend_on_the_seed_alone_and_leave_the_random_state():
    def adapters(seed: int, noise: int):
        model = tiny("llama", pad_token_id=0)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        adapted = attach_lora(model, target_modules=LLAMA, r=2, alpha=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.flatten() for p in adapted.parameters() if p.requires_grad])

    assert torch.equal(adapters(seed=1, noise=2), adapters(seed=1, noise=3))
    assert not torch.equal(adapters(seed=1, noise=2), adapters(seed=4, noise=2))


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_the_scaling_is_that_of_the_method(use_rslora, scaling):
    adapted = attach_lora(
        tiny("llama", pad_token_id=0), target_modules=["q_proj"], r=4, alpha=8, use_rslora=use_rslora, seed=1
    )
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == pytest.approx(scaling)


def test_parameters_are_counted():
    model = tiny("llama", pad_token_id=0)
    base = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (base, base)
    adapted = attach_lora(model, target_modules=["q_proj", "up_proj"], r=2, alpha=4, seed=1)
    added = 2 * (2 * (16 + 16) + 2 * (16 + 24))
    assert count_parameters(adapted) == (added, base + added)


def test_adapters_stay_in_float32_over_half_precision_weights():
    adapted = attach_lora(tiny("llama", pad_token_id=0).bfloat16(), target_modules=LLAMA, r=2, alpha=4, seed=1)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_packed_weights_count_as_what_they_stand_for(tmp_path):
    pytest.importorskip("bitsandbytes")
    from laras.models.loader import load_model

    model = tiny("llama", pad_token_id=0, hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path)
    packed = load_model(str(tmp_path), precision="fp32", load_in_4bit=True)
    assert count_parameters(packed)[1] == count_parameters(model)[1]
    adapted = attach_lora(packed, target_modules=linear_module_names(packed), r=2, alpha=4, seed=1)
    adapted(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_a_router_that_derives_from_a_linear_layer_gets_no_adapter():
    model = tiny("phimoe", num_local_experts=2, num_key_value_heads=2, head_dim=8)
    assert any(isinstance(module, nn.Linear) and "router" in name for name, module in model.named_modules())
    assert linear_module_names(model) == ("k_proj", "o_proj", "q_proj", "v_proj")


UNUSUAL = {
    "gemma3n_text": {  # a list of linear layers, called by their numbers as decoder layers are
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "head_dim": 16, "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8, "intermediate_size": 96, "layer_types": ["full_attention"] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "mamba": {"num_hidden_layers": 2},  # whose kernels take some weights as they are
}  # fmt: skip


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_every_target_that_is_found_can_be_adapted(model_type):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    config = AutoConfig.for_model(model_type, pad_token_id=0, **{**sizes, **UNUSUAL[model_type]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = linear_module_names(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert not any(name.isdigit() for name in names)
    adapted = attach_lora(model, target_modules=names, r=4, alpha=8, seed=0)
    found = {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
    refused = {name for name in linear if model_type == "mamba" and name.endswith("out_proj")}
    assert found == linear - {"lm_head"} - refused
