"""The schema that editors read says what the configuration accepts."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from laras.config import PROFILES, DatasetFiles, RunConfig, SplitConfig
from laras.config_file import ALIASES
from laras.schema import SCHEMA_URL, config_schema, schema_text


def problems(values: dict[str, Any]) -> list[str]:
    return [error.message for error in Draft202012Validator(config_schema()).iter_errors(values)]


def resource(name: str) -> str:
    return resources.files("laras.resources").joinpath(name).read_text(encoding="utf-8")


def test_the_shipped_schema_is_that_of_the_code() -> None:
    remedy = "renew it: python -m laras.schema > src/laras/resources/laras.schema.json"
    assert resource("laras.schema.json") == schema_text(), remedy


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(config_schema())


@pytest.mark.parametrize("model", [RunConfig, SplitConfig, DatasetFiles])
def test_every_key_is_described(model: type[BaseModel]) -> None:
    assert not [name for name, field in model.model_fields.items() if not field.description]


def test_what_init_writes_names_the_schema_and_follows_it() -> None:
    text = resource("laras.yaml")
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA_URL}"
    assert problems(yaml.safe_load(text)) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_the_shipped_profiles_follow_it(profile: str) -> None:
    assert problems(yaml.safe_load(resource(f"profiles/{profile}.yaml")) or {}) == []


@pytest.mark.parametrize(
    "values",
    [
        {"report_to": "wandb"},
        {"report_to": []},
        {"dataset": {"train": ["a.jsonl", "b.jsonl"], "test": "c.jsonl"}},
        {"split": {"train": 0.8, "stratify_by": "topic"}},
        {"lora_target_modules": ["q_proj"]},
    ],
)
def test_what_the_configuration_takes_the_schema_takes(values: dict[str, Any]) -> None:
    RunConfig.model_validate(values)
    assert problems(values) == []


@pytest.mark.parametrize(
    "values",
    [{"lerning_rate": 1}, {"learning_rate": -1}, {"seed": "x"}, {"split": {"tets": 0.1}}, {"report_to": ["x"]}],
)
def test_what_the_configuration_refuses_the_schema_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RunConfig.model_validate(values)
    assert problems(values)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_names_of_other_tools_are_known_and_marked_as_such(alias: str) -> None:
    entry = config_schema()["properties"][alias]
    assert entry["deprecated"] and f"`{ALIASES[alias]}`" in entry["description"]
