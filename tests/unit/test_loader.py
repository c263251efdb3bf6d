"""What cannot be trained is refused with a clear error; what can is loaded as asked."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from laras.errors import ConfigError, MissingExtraError
from laras.models import loader
from laras.models.loader import load_model, load_model_config, load_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [load_tokenizer, load_model_config, lambda s: load_model(s, precision="fp32")])
@pytest.mark.parametrize("source", ["./no/such/model", "/no/such/model", "~/no-such-model", "a/b/c"])
def test_a_path_that_does_not_exist_is_named(load, source):
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load(source)
    assert source in str(caught.value)


def test_a_file_is_not_a_model_folder(model_dir):
    with pytest.raises(ConfigError, match="is a file"):
        load_model_config(str(model_dir / "config.json"))


def test_an_empty_folder_is_refused(tmp_path):
    for load in (load_tokenizer, load_model_config):
        with pytest.raises(ConfigError, match="cannot be loaded"):
            load(str(tmp_path))


def test_a_model_that_is_not_a_causal_lm_is_refused_by_its_architecture(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"not a causal language model.*BertForMaskedLM"):
        load_model(str(tmp_path), precision="fp32")


@pytest.mark.parametrize(("model_type", "causal"), [("llama", True), ("t5", False)])
def test_without_architectures_the_model_type_decides(tmp_path, model_type, causal):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if causal:
        assert load_model_config(str(tmp_path)).model_type == model_type
    else:
        with pytest.raises(ConfigError, match="model_type t5"):
            load_model_config(str(tmp_path))


REMOTE_CODE = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "laras-own"
"""


def test_code_of_the_repository_runs_only_when_trusted(tmp_path):
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    values = {"model_type": "laras-own", "auto_map": auto_map, "architectures": ["OwnModel"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "own.py").write_text(REMOTE_CODE)
    with pytest.raises(ConfigError, match="trust_remote_code is false"):
        load_model_config(str(tmp_path))
    assert load_model_config(str(tmp_path), trust_remote_code=True).model_type == "laras-own"


def test_pickled_weights_are_refused(model_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_model(str(tmp_path), precision="fp32")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_come_in_the_precision_asked_for(model_dir, precision, dtype):
    assert {p.dtype for p in load_model(str(model_dir), precision=precision).parameters()} == {dtype}


def test_four_bits_are_nf4_with_double_quantisation_and_stay_close(model_dir):
    pytest.importorskip("bitsandbytes")
    exact = load_model(str(model_dir), precision="fp32")
    model = load_model(str(model_dir), precision="fp32", load_in_4bit=True)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    input_ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        difference = (model(input_ids).logits - exact(input_ids).logits).abs().max()
    assert 0 < difference < 0.1


def test_eight_bits_quantise_the_decoder(model_dir):
    pytest.importorskip("bitsandbytes")
    model = load_model(str(model_dir), precision="fp32", load_in_8bit=True)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert model.lm_head.weight.dtype == torch.float32


def test_quantisation_without_bitsandbytes_names_the_extra(model_dir, monkeypatch):
    monkeypatch.setattr(loader, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(MissingExtraError, match="bitsandbytes") as caught:
        load_model(str(model_dir), precision="fp32", load_in_4bit=True)
    assert "laras[bnb]" in str(caught.value)


def test_the_tokenizer_can_pad_and_takes_another_template(model_dir, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(str(model_dir), chat_template=template)
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
    with pytest.raises(ConfigError, match="not a file"):
        load_tokenizer(str(model_dir), chat_template=tmp_path / "absent.jinja")


def test_4bit_weights_stay_what_they_are_when_a_cpu_evaluates(tmp_path):
    from tiny_models import base_model

    model = load_model(str(base_model("llama", tmp_path)), precision="bf16", load_in_4bit=True).eval()
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert all(torch.equal(layer.weight.data, weight) for layer, weight in zip(layers, before, strict=True))


def test_a_model_without_sdpa_is_loaded_with_its_own_attention_unless_one_is_named(tmp_path):
    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), precision="fp32").config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="scaled_dot_product_attention"):
        load_model(str(tmp_path), precision="fp32", attention="sdpa")
