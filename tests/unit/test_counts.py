"""A family without a table is counted on the model itself; the count is remembered, and what cannot be built is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from laras.config import RunConfig
from laras.errors import LarasError
from laras.models.parameters import count_parameters
from laras.planning.architecture import load_model_spec
from laras.planning.counts import ParameterCounts, with_counts

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 640}
FAMILIES = {
    "opt": {**SMALL, "ffn_dim": 256, "word_embed_proj_dim": 64},
    "falcon": {**SMALL, "multi_query": True},
    "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 640, "rotary_dim": 8},
    "lfm2": {
        **SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": 128,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "olmoe": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 32, "num_experts": 4},
}  # fmt: skip


def folder(model_type: str, place: Path) -> Path:
    AutoConfig.for_model(model_type, **FAMILIES[model_type]).save_pretrained(place)
    return place


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_counts_are_those_of_the_built_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = folder(model_type, tmp_path / "model")
    config = RunConfig(model_name_or_path=str(place))
    spec = with_counts(load_model_spec(place), config, count_parameters)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
    assert spec.is_counted and spec.total_parameters == sum(one.numel() for one in model.parameters())
    assert 0 < spec.linear_parameters <= spec.total_parameters - spec.embedding_parameters

    def again(_: RunConfig) -> ParameterCounts:
        raise AssertionError("counted twice")

    assert with_counts(load_model_spec(place), config, again) == spec


def test_a_family_with_a_table_is_not_built(tmp_path: Path) -> None:
    place = tmp_path / "model"
    AutoConfig.for_model("llama", **SMALL).save_pretrained(place)

    def never(_: RunConfig) -> ParameterCounts:
        raise AssertionError("built")

    assert not with_counts(load_model_spec(place), RunConfig(model_name_or_path=str(place)), never).is_counted


def test_a_model_that_cannot_be_built_keeps_what_its_configuration_implies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({**SMALL, "model_type": "nobody_knows"}), encoding="utf-8")
    spec, config = load_model_spec(place), RunConfig(model_name_or_path=str(place))
    with pytest.raises(LarasError):
        count_parameters(config)
    assert with_counts(spec, config, count_parameters) == spec
