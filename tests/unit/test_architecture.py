"""Architectures are read from config.json and counted exactly."""

import json

import pytest

from laras.errors import ConfigError
from laras.planning.architecture import load_model_spec, model_spec_from_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MODELS = {
    "llama": {},
    "llama-bias-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32},
    "phi": {},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "num_key_value_heads": None},
    "starcoder2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_those_of_the_real_model(name, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in {**SIZES, **MODELS[name]}.items() if value is not None}
    if name == "gpt2":
        keys = {key: value for key, value in keys.items() if key.startswith("n_") or key == "vocab_size"}
    config = AutoConfig.for_model(name.split("-")[0], **keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    spec = load_model_spec(tmp_path)
    assert spec.total_parameters == sum(p.numel() for p in model.parameters())
    assert spec.layers == 3
    assert spec.hidden_size == 64
    assert spec.vocab_size == 320


@pytest.mark.parametrize(
    ("model_type", "keys", "width"),
    [
        ("mamba", {}, 128),
        ("falcon_mamba", {"intermediate_size": 160}, 160),
        ("mamba2", {"num_heads": 8, "head_dim": 24, "n_groups": 2, "expand": 3}, 192),
    ],
)
def test_a_model_of_state_space_layers_needs_no_attention_heads(model_type, keys, width, tmp_path):
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 320}
    AutoConfig.for_model(model_type, **sizes, **keys).save_pretrained(tmp_path)
    spec = load_model_spec(tmp_path)
    assert (spec.attention_heads, spec.key_value_heads, spec.intermediate_size) == (0, 0, width)
    assert spec.linear_parameters == 3 * 3 * 64 * width


def test_a_bare_file_and_its_folder_give_the_same_spec(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SIZES}))
    by_file, by_folder = load_model_spec(path), load_model_spec(tmp_path)
    assert by_file.model_dump(exclude={"source"}) == by_folder.model_dump(exclude={"source"})


def test_the_text_part_of_a_multimodal_model_is_read():
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": SIZES}
    spec = model_spec_from_config(config, "m")
    assert spec.model_type == "gemma3_text"
    assert spec.head_dim == 256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "no model_type"),
        ({"model_type": "llama", "hidden_size": 8}, "lacks sizes"),
        ({"model_type": "bert", **SIZES}, "not a causal"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], **SIZES}, "not a causal"),
        ({"model_type": "new", "is_encoder_decoder": True, **SIZES}, "not a causal"),
    ],
)
def test_an_unusable_configuration_says_why(config, message):
    with pytest.raises(ConfigError, match=message):
        model_spec_from_config(config, "m")


def test_every_missing_size_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        model_spec_from_config({"model_type": "llama"}, "m")
    assert len(caught.value.problems) == 4


def test_paths_that_hold_no_model_say_so(tmp_path):
    with pytest.raises(ConfigError, match="no model at"):
        load_model_spec(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="as JSON"):
        load_model_spec(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not an object"):
        load_model_spec(tmp_path)


def test_a_hub_id_that_cannot_be_reached_is_a_configuration_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="the Hub gives no"):
        load_model_spec("nobody/has-this-model")
