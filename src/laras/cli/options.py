"""What the verbs share on the command line: CONFIG, overrides in three spellings, `--json`, and who watches."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from laras.errors import ConfigError

if TYPE_CHECKING:
    from laras.config import RunConfig


class _Shown:
    """How help shows parameters: a flag takes no value, and usage names an argument as its `metavar` does."""

    def get_params(self, ctx: Any) -> Any:
        """Parameters of the command, the options that typer adds included."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for one in params:
            if getattr(one, "is_flag", False):
                one.metavar = ""  # typer would say <bool>, as if it took one
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words behind the command's name in its usage."""
        arguments = [one.metavar or "" for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return [*arguments, "[OPTIONS]"]


class Verb(_Shown, TyperCommand):
    """A verb of the command line."""


class Verbs(_Shown, TyperGroup):
    """All of them."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """One verb and what it takes."""
        return ["COMMAND", "..."]


# Options that the verb does not know are overrides of the configuration.
OVERRIDES = {"ignore_unknown_options": True, "allow_interspersed_args": True}

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file, without one the built-in example; then keys of it: lora_r=8 or --learning-rate 1e-4.",
        show_default=False,
    ),
]


def _final_run(run: Path) -> Path:
    """Records are loaded when a run is named, not when help is asked for."""
    from laras.sweep_record import final_run

    return final_run(run)


RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Directory of a run, or of a sweep, which stands for its final model.",
        show_default=False,
        callback=_final_run,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def read_config(arguments: Sequence[str] | None, from_run: Path | None = None) -> tuple[RunConfig, str | None]:
    """The configuration that the arguments describe, and the file's text as given.

    Args:
        arguments: A file, overrides, both or none.
        from_run: A run, or a sweep, whose configuration is taken where no file is named.

    Raises:
        ConfigError: With every problem at once.
    """
    from laras.config_file import load_config
    from laras.sweep_record import lent_config

    path, overrides = split_arguments(arguments or ())
    if path is None and from_run is not None:
        return lent_config(from_run, overrides), None
    config = load_config(path, overrides)
    return config, path.read_text(encoding="utf-8") if path else None


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The configuration file, if one is named, and the overrides as KEY=VALUE.

    `learning_rate=1e-4`, `--learning-rate=1e-4` and `--learning_rate 1e-4` say the same; an option without a value
    is true.

    Raises:
        ConfigError: Two files are named.
    """
    paths: list[str] = []
    overrides: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                value = waiting.pop(0) if waiting and _is_value(waiting[0]) else "true"
            overrides.append(f"{key}={value}")
        elif "=" in word and not Path(word).exists():
            overrides.append(word)
        else:
            paths.append(word)
    if len(paths) > 1:
        raise ConfigError(
            f"one configuration file is expected, not {len(paths)}: {', '.join(paths)}",
            hint="overrides are written KEY=VALUE or --key VALUE",
        )
    return (Path(paths[0]) if paths else None), overrides


def _is_value(word: str) -> bool:
    """Whether a word after an option is its value; a configuration file or another option is not."""
    return not word.startswith("--") and not word.endswith((".yaml", ".yml"))


def print_json(value: Mapping[str, Any]) -> None:
    """One object on stdout; a number that JSON has no word for is null."""
    sys.stdout.write(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:  # infinite or not a number
        return None
    return value
