"""The configuration from a YAML file, flat where the ecosystem is flat, and overrides from the command line.

Values come, each overriding the one before, from the defaults of `RunConfig`, the profile named by `profile`, the file,
and the command line. Every problem is reported in one go; an unknown key is an error that names the key most like it.
Input paths in the file may be relative to the file; `output_dir` is relative to the working folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from laras.config import PROFILES, DatasetFiles, RunConfig, SplitConfig
from laras.errors import ConfigError
from laras.yaml_text import parse_yaml, read_text, unusable_values

# The built-in example is to end within minutes on a laptop's CPU: one epoch of small, quick steps.
_EXAMPLE = {"num_train_epochs": 1, "effective_batch_size": 4, "learning_rate": 5.0e-4}

# Keys of Axolotl, LLaMA-Factory, Unsloth and older transformers that mean exactly one of ours.
ALIASES: dict[str, str] = {
    "base_model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model": "model_name_or_path",
    "datasets": "dataset",
    "dataset_name": "dataset",
    "train_file": "dataset",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "effective_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "sample_packing": "packing",
    "gradient_clipping": "max_grad_norm",
    "attn_impl": "attn_implementation",
    "output": "output_dir",
    "quantization_bit": "load_in_4bit",
    "assistant_only_loss": "completion_only_loss",
}
# Keys that have no one-to-one counterpart: the error says what to write instead.
FOREIGN_KEYS: dict[str, str] = {
    "adapter": "write `finetuning_type: lora` and `load_in_4bit: true` for QLoRA",
    "stage": "Laras does supervised fine-tuning only; remove it",
    "val_set_size": "write `split: {validation: 0.1}`",
    "val_size": "write `split: {validation: 0.1}`",
    "train_on_inputs": "write `completion_only_loss: false` to learn the prompt too",
    "train_on_prompt": "write `completion_only_loss: false` to learn the prompt too",
    "bf16": "write `precision: bf16` (or leave it `auto`)",
    "fp16": "write `precision: fp16` (or leave it `auto`)",
    "tf32": "write `precision: fp32`; TF32 is used where the GPU has it",
    "flash_attention": "write `attn_implementation: flash_attention_2`",
    "wandb_project": "add `wandb` to `report_to` and set the environment variable WANDB_PROJECT",
    "template": "the tokenizer's own chat template is used; `chat_template` names a Jinja file to replace it",
    "warmup_steps": "write `warmup_ratio`, a fraction of all steps",
}


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file (or, without one, the built-in example), applies overrides and validates the result.

    Args:
        path: The YAML file; None for the built-in example.
        overrides: `{"learning_rate": 1e-4, "split.test": 0.2}` or `["learning_rate=1e-4", "split.test=0.2"]`.

    Raises:
        ConfigError: With every problem at once.
    """
    given = _read_yaml(Path(path)) if path is not None else {}
    changed = _parse_overrides(overrides)
    where = f"{path}" if path is not None else "the command line"
    if unusable := [*unusable_values(given), *unusable_values(changed)]:
        raise _config_error(unusable, where)
    values, problems = _canonical_keys(given)
    override_values, override_problems = _canonical_keys(changed)
    problems += override_problems
    values = _merged(values, override_values)
    if not {"model_name_or_path", "dataset", "profile"} & values.keys():
        values = _merged(_EXAMPLE, values)
    profile = values.get("profile", "default")
    if isinstance(profile, str) and profile in PROFILES:
        values = _merged(_profile_values(profile), values)
    if path is not None:
        values = _relative_to(Path(path).parent, values, given)
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += _validation_problems(error)
    if problems or config is None:
        raise _config_error(problems, where)
    return config


def _config_error(problems: Sequence[str], where: str) -> ConfigError:
    return ConfigError(
        f"{len(problems)} problem{'s' * (len(problems) != 1)} in {where}",
        problems=problems,
        hint="`laras init` writes a file with every key that a person would change",
    )


def config_to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, every key present, in the order of the class."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ConfigError(
            f"no configuration file {path}", hint="`laras init` writes laras.yaml; `laras train` alone runs the example"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a configuration file", hint="name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start})", hint="save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from None
    except ValueError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}", hint="name the YAML file of a run") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", hint="check the indentation and quotes there") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            f"{path} must hold `key: value` lines, not a {type(values).__name__}", hint="`laras init` writes an example"
        )
    return values


def _parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """`a.b=1` → {"a": {"b": 1}}, values read as YAML; dashes in keys are underscores."""
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = []
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals or not key.strip():
                raise ConfigError(f"override {text!r} is not KEY=VALUE", hint="for example learning_rate=1e-4")
            try:
                pairs.append((key.strip(), parse_yaml(value)))
            except ValueError:
                raise ConfigError(f"override {text!r:.200}: the value is not valid YAML", hint="quote it") from None
    nested: dict[str, Any] = {}
    for key, value in pairs:
        *parents, leaf = str(key).replace("-", "_").split(".")
        level = nested
        for parent in parents:
            child = level.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(
                    f"override {key!r}: {parent!r} is already given a plain value", hint="give one of them"
                )
            level = child
        level[leaf] = value
    return nested


def _canonical_keys(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replaces aliases by our names; returns the problems of unknown and doubled keys."""
    known = list(RunConfig.model_fields)
    result: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if key in FOREIGN_KEYS:
            problems.append(f"{key}: not a key of Laras; {FOREIGN_KEYS[key]}")
        elif name not in known:
            close = difflib.get_close_matches(key, [*known, *ALIASES], n=1, cutoff=0.6)
            guess = f"; did you mean {ALIASES.get(close[0], close[0])!r}?" if close else ""
            problems.append(f"{key}: unknown key{guess}")
        elif name in result:
            problems.append(f"{key}: means {name}, which is given as well; keep one")
        else:
            result[name] = _quantization_bits(value) if key == "quantization_bit" else value
    return result, problems


def _quantization_bits(value: Any) -> Any:
    return {4: True, None: False}.get(value, value) if isinstance(value, int | None) else value


def _validation_problems(error: ValidationError) -> list[str]:
    problems: list[str] = []
    for item in error.errors(include_url=False):
        # Union members appear in the location as tags such as `float` or `literal['auto']`: not for the reader.
        parents = [str(part) for part in item["loc"][:-1] if _is_field_name(part)]
        leaf = str(item["loc"][-1]) if item["loc"] else ""
        is_unknown_key = item["type"] == "extra_forbidden"
        location = ".".join([*parents, leaf] if is_unknown_key or _is_field_name(leaf) or leaf.isdigit() else parents)
        if is_unknown_key:
            sections: dict[str, type[BaseModel]] = {"split": SplitConfig, "dataset": DatasetFiles}
            model = sections.get(parents[0]) if parents else None
            close = difflib.get_close_matches(leaf, list(model.model_fields) if model else [], n=1)
            text = "unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
        else:
            text = item["msg"].removeprefix("Value error, ")
            text = text[0].lower() + text[1:]
            if item["type"] != "missing" and not isinstance(item["input"], dict | BaseModel):
                text += f" (got {item['input']!r:.80})"
        line = f"{location}: {text}" if location else text
        same = next((i for i, other in enumerate(problems) if location and other.startswith(f"{location}: ")), None)
        if same is None:
            problems.append(line)
        else:  # the members of one union: one line for the user
            problems[same] = problems[same].rsplit(" (got", 1)[0] + f", or {text}"
    return problems


def _is_field_name(part: str | int) -> bool:
    if isinstance(part, int):
        return True
    return part in {*RunConfig.model_fields, *SplitConfig.model_fields, *DatasetFiles.model_fields}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings merge, everything else replaces."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _profile_values(profile: str) -> dict[str, Any]:
    text = resources.files("laras.resources.profiles").joinpath(f"{profile}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text) or {}


def _relative_to(folder: Path, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Input paths that the file gives and that exist beside it are taken from there, else from the working folder."""

    def resolved(value: Any) -> Any:
        if isinstance(value, str) and not value.startswith("builtin:") and not Path(value).is_absolute():
            beside = folder / value
            is_glob = any(mark in value for mark in "*?[")
            try:
                found = any(folder.glob(value)) if is_glob else beside.exists()
            except (OSError, ValueError, RecursionError):  # no path of this system: refused by whoever opens it
                found = False
            return str(beside) if found else value
        if isinstance(value, Mapping):
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [resolved(item) for item in value]
        return value

    canonical, _ = _canonical_keys(given)
    result = dict(values)
    for key in ("model_name_or_path", "dataset", "chat_template"):
        if key in canonical and result.get(key) == canonical[key]:
            result[key] = resolved(result[key])
    return result
