"""The configuration: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from laras.config import PROFILES, RunConfig
from laras.config_file import ALIASES, FOREIGN_KEYS, config_to_yaml, load_config
from laras.errors import ConfigError, ExitCode


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "laras.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value.problems


def test_no_configuration_is_the_builtin_example() -> None:
    config = load_config()
    assert config.model_name_or_path.startswith("builtin:")
    assert config.dataset == "builtin:stdlib"


def test_a_float_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "learning_rate: 1e-4\n")).learning_rate == 1e-4


def test_overrides_win_over_the_file_and_the_file_over_the_profile(tmp_path: Path) -> None:
    path = write(tmp_path, "profile: conservative\neval_steps: 7\nsave_steps: 9\n")
    config = load_config(path, ["save-steps=11"])
    assert (config.learning_rate, config.eval_steps, config.save_steps) == (2e-5, 7, 11)


def test_dotted_overrides_keep_the_other_keys_of_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, "split: {validation: 0.2, stratify_by: topic}\n")
    split = load_config(path, {"split.test": 0.1}).split
    assert (split.validation, split.test, split.stratify_by) == (0.2, 0.1, "topic")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid(profile: str) -> None:
    assert load_config(None, {"profile": profile}).profile == profile


def test_the_resolved_configuration_reads_back_unchanged(tmp_path: Path) -> None:
    config = load_config(None, ["lora_r=4", "report_to=[]", "split.test=0.2"])
    assert load_config(write(tmp_path, config_to_yaml(config))) == config


def test_all_problems_come_at_once_with_a_guess_for_each_unknown_key() -> None:
    problems = problems_of("lerning_rate=1", "max_length=4", "split.tets=3", "lora_r=-1", "adapter=qlora")
    assert len(problems) == 5
    text = "\n".join(problems)
    assert "lerning_rate: unknown key; did you mean 'learning_rate'?" in text
    assert "split.tets: unknown key; did you mean 'test'?" in text
    assert "adapter: not a key of Laras" in text
    assert "max_length: input should be greater than or equal to 8 (got 4)" in text
    assert "lora_r: input should be 'auto', or input should be greater than or equal to 1 (got -1)" in text


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_names_a_key_and_is_no_key_itself(alias: str) -> None:
    assert ALIASES[alias] in RunConfig.model_fields
    assert alias not in RunConfig.model_fields


@pytest.mark.parametrize("key", sorted(FOREIGN_KEYS))
def test_every_foreign_key_is_refused_with_what_to_write_instead(key: str) -> None:
    (problem,) = problems_of(f"{key}=1")
    assert problem == f"{key}: not a key of Laras; {FOREIGN_KEYS[key]}"


def test_aliases_of_other_tools_are_accepted() -> None:
    config = load_config(None, ["base_model=a/b", "sequence_len=512", "micro_batch_size=2", "quantization_bit=4"])
    assert (config.model_name_or_path, config.max_length) == ("a/b", 512)
    assert (config.per_device_train_batch_size, config.load_in_4bit) == (2, True)


def test_an_alias_beside_its_key_is_refused() -> None:
    assert "lora_rank: means lora_r, which is given as well; keep one" in problems_of("lora_r=4", "lora_rank=8")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["per_device_train_batch_size=5"], "not a multiple"),
        (["per_device_train_batch_size=4", "gradient_accumulation_steps=3"], "does not divide"),
        (["load_in_4bit=true", "load_in_8bit=true"], "choose one"),
        (["finetuning_type=full", "load_in_8bit=true"], "unquantised"),
        (["finetuning_type=full", "use_dora=true"], "kind of LoRA"),
        (["split={train: 0.5, validation: 0.5, test: 0.5}"], "add up to 1"),
        (["split={validation: 0.6, test: 0.6}"], "leaves nothing"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(overrides: list[str], part: str) -> None:
    assert part in "\n".join(problems_of(*overrides))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\nseed: 2\n", "written twice"),
        ("seed: [1\n", "not valid YAML"),
        ("- a\n- b\n", "must hold"),
        ("seed: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("1: 2\n", "must hold"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        load_config(write(tmp_path, text))
    assert caught.value.hint


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == load_config()


def test_missing_folder_and_encoding_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes("run_name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)


@pytest.mark.parametrize("override", ["learning_rate", "=3", "seed=[1"])
def test_an_override_that_is_not_key_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, [override])


def test_an_override_below_a_plain_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="already given a plain value"):
        load_config(None, ["split=3", "split.test=0.1"])


def test_input_paths_are_found_beside_the_file_and_hub_ids_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    path = write(tmp_path, "dataset: {train: ['a.jsonl', '*.jsonl'], test: b.jsonl}\nmodel_name_or_path: org/model\n")
    config = load_config(path)
    assert not isinstance(config.dataset, str)
    assert config.dataset.train == (str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl"))
    assert config.dataset.test == str(tmp_path / "b.jsonl")
    assert config.model_name_or_path == "org/model"


@given(st.dictionaries(st.text(max_size=12), st.none() | st.integers() | st.text(max_size=8), max_size=4))
def test_any_mapping_gives_a_configuration_or_a_config_error(values: dict[str, object]) -> None:
    try:
        config = load_config(None, values)
    except ConfigError as error:
        assert str(error)
    else:
        assert yaml.safe_load(config_to_yaml(config))["seed"] == config.seed


def test_the_built_in_example_is_one_epoch_and_a_users_own_run_is_three(tmp_path: Path) -> None:
    assert (load_config().num_train_epochs, load_config().effective_batch_size) == (1, 4)
    assert load_config(None, ["num_train_epochs=2"]).num_train_epochs == 2
    assert load_config(None, ["dataset=chats.jsonl"]).num_train_epochs == 3
