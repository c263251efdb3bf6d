"""What is searched: `learning_rate=1e-5..1e-3:log`, `lora_r=8,16,32`, checked against the configuration.

`LOW..HIGH` is a range with both ends; of whole numbers where both are written so or the key takes no others; `:log`
spaces it by ratios. `A,B,C` are choices. Every problem is reported at once, in the words of the configuration.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from laras.config import RunConfig
from laras.config_file import ALIASES, load_config
from laras.errors import ConfigError
from laras.formatting import setting
from laras.records import PlanChoices
from laras.sweep_record import Setting, SweepParameter
from laras.yaml_text import parse_yaml

Search = Mapping[str, str | Sequence[Any]] | Sequence[str]

# Keys that change how the model learns, and neither the data, nor what the score means, nor only the speed.
SEARCHABLE = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "effective_batch_size",
    "num_train_epochs", "max_steps", "optim", "finetuning_type", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "use_rslora", "use_dora", "load_in_4bit",
)  # fmt: skip
DEFAULT_RANKS = (8, 16, 32, 64)
_DECADE = 10.0
_MAX_COMBINATIONS = 256  # of the ends of ranges and all choices, validated before anything runs
_RANGE = re.compile(r"(?P<low>[^.:\s]+(?:\.\d+[^.:\s]*)?)\s*\.\.\s*(?P<high>[^:\s]+)(?P<log>\s*:\s*log)?")
_HINT = "for example --search learning_rate=1e-5..1e-3:log --search lora_r=8,16,32"


def parse_search(search: Search, config: RunConfig) -> tuple[SweepParameter, ...]:
    """The parameters that a search names, in its order.

    Args:
        search: `["learning_rate=1e-5..1e-3:log"]` or `{"learning_rate": "1e-5..1e-3:log", "lora_r": [8, 16]}`.
        config: What the trials vary.

    Raises:
        ConfigError: With every problem at once.
    """
    problems: list[str] = []
    parameters: list[SweepParameter] = []
    for name, given in _named(search, problems):
        if refusal := _refused_key(name):
            problems.append(refusal)
        elif name in {parameter.name for parameter in parameters}:
            problems.append(f"{name}: searched twice; keep one")
        else:
            try:
                parameters.append(_parameter(name, given, config))
            except ValueError as error:
                problems += [line if line.startswith(f"{name}:") else f"{name}: {line}" for line in error.args]
    if not problems:
        problems = _combination_problems(parameters, config)
    if problems:
        raise ConfigError(
            f"{len(problems)} problem{'s' * (len(problems) != 1)} in the search", problems=problems, hint=_HINT
        )
    return tuple(parameters)


def default_space(config: RunConfig, choices: PlanChoices) -> tuple[SweepParameter, ...]:
    """A decade of the planned learning rate either way, and ranks around the planned one."""
    rate = choices.learning_rate
    parameters = [
        SweepParameter(name="learning_rate", kind="float", low=rate / _DECADE, high=min(1.0, rate * _DECADE), log=True)
    ]
    if config.finetuning_type == "lora":
        ranks = tuple(sorted({*DEFAULT_RANKS, choices.lora_r}))
        parameters.append(SweepParameter(name="lora_r", kind="choice", choices=ranks))
    return tuple(parameters)


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with some keys changed, validated again.

    Raises:
        ConfigError: With every problem at once.
    """
    return load_config(None, {**config.model_dump(mode="json", exclude_unset=True), **values})


def as_configured(
    config: RunConfig, choices: PlanChoices, space: Sequence[SweepParameter]
) -> dict[str, Setting] | None:
    """The configuration's own point of the space, `auto` as planned; None where it lies outside."""
    point: dict[str, Setting] = {}
    for parameter in space:
        given = getattr(config, parameter.name)
        planned = getattr(choices, parameter.name, given)
        inside = [value for value in (given, planned) if contains(parameter, value)]
        if not inside:
            return None
        point[parameter.name] = int(inside[0]) if parameter.kind == "int" else inside[0]
    return point


def contains(parameter: SweepParameter, value: Any) -> bool:
    """Whether a value may be proposed for a parameter."""
    if parameter.kind == "choice":
        return any(value == choice and type(value) is type(choice) for choice in parameter.choices)
    if not isinstance(value, int | float) or isinstance(value, bool) or parameter.low is None or parameter.high is None:
        return False
    return parameter.low <= value <= parameter.high and (parameter.kind == "float" or float(value).is_integer())


def combinations(space: Sequence[SweepParameter]) -> int | None:
    """How many different trials there are; None for infinitely many."""
    count = 1
    for parameter in space:
        if parameter.kind == "float":
            return None
        count *= len(parameter.choices) or int(parameter.high or 0) - int(parameter.low or 0) + 1
    return count


def describe(parameter: SweepParameter) -> str:
    """The parameter as it is written on the command line."""
    if parameter.kind == "choice":
        return f"{parameter.name}={','.join(setting(choice) for choice in parameter.choices)}"
    ends = f"{setting(parameter.low)}..{setting(parameter.high)}"
    return f"{parameter.name}={ends}{':log' * parameter.log}"


def _named(search: Search, problems: list[str]) -> Iterator[tuple[str, str | Sequence[Any]]]:
    pairs: Iterable[tuple[str, Any]]
    if isinstance(search, Mapping):
        pairs = search.items()
    else:
        split = [text.partition("=") for text in search]
        problems += [f"{name or text!r}: not NAME=VALUES" for name, text, _ in split if not text or not name.strip()]
        pairs = [(name, values) for name, equals, values in split if equals and name.strip()]
    for name, values in pairs:
        key = name.strip().replace("-", "_")
        yield ALIASES.get(key, key), values


def _refused_key(name: str) -> str | None:
    if name in SEARCHABLE:
        return None
    if name in RunConfig.model_fields:
        return (
            f"{name}: not searched, as it changes the data, the score's meaning or only the speed; searched are "
            f"{', '.join(SEARCHABLE)}"
        )
    try:
        load_config(None, {name: None})
    except ConfigError as error:
        return next((line for line in error.problems if line.startswith(f"{name}:")), f"{name}: unknown key")
    return f"{name}: unknown key"


def _parameter(name: str, given: str | Sequence[Any], config: RunConfig) -> SweepParameter:
    """Raises ValueError with one argument a problem."""
    if isinstance(given, str) and ".." in given:
        return _range(name, given, config)
    texts = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
    values = [_validated(name, parse_yaml(text) if isinstance(text, str) else text, config) for text in texts]
    if len(values) < 2:
        raise ValueError(f"one value is no choice; write {name}=A,B or LOW..HIGH, or give it as an override")
    if len({(type(value), value) for value in values}) < len(values):
        raise ValueError(f"a choice is given twice in {given!r:.80}")
    return SweepParameter(name=name, kind="choice", choices=tuple(values))


def _range(name: str, text: str, config: RunConfig) -> SweepParameter:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r:.80} is not LOW..HIGH or LOW..HIGH:log")
    log = match["log"] is not None
    try:
        low, high = float(match["low"]), float(match["high"])
    except ValueError:
        raise ValueError(f"the ends of {text!r:.80} must be numbers") from None
    if not low < high:
        raise ValueError(f"the range {text!r:.80} is empty: {low:g} is not below {high:g}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range must begin above 0, not at {low:g}")
    ends = [_validated(name, _whole(end), config) for end in (low, high)]
    if any(isinstance(end, bool | str) or end is None for end in ends):
        raise ValueError("takes no numbers; write its values as choices, A,B")
    as_whole = all(re.fullmatch(r"[+-]?\d+", match[end]) for end in ("low", "high"))
    if as_whole or all(isinstance(end, int) for end in ends):
        return SweepParameter(name=name, kind="int", low=int(low), high=int(high), log=log)
    return SweepParameter(name=name, kind="float", low=low, high=high, log=log)


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _validated(name: str, value: Any, config: RunConfig) -> Any:
    """The value as the configuration takes it; a problem that only other keys make is found later, by combinations."""
    try:
        taken = getattr(with_values(config, {name: value}), name)
    except ConfigError as error:
        own = [line for line in error.problems if line.startswith(f"{name}:")]
        if own:
            raise ValueError(*own) from None
        return value
    if not isinstance(taken, Setting):
        raise ValueError(f"takes single values only, not {value!r:.80}")
    return taken


def _combination_problems(space: Sequence[SweepParameter], config: RunConfig) -> list[str]:
    """Problems of ends and choices together, each once."""
    values = [parameter.choices or (parameter.low, parameter.high) for parameter in space]
    found: dict[str, None] = {}
    for combination in itertools.islice(itertools.product(*values), _MAX_COMBINATIONS):
        point = {parameter.name: value for parameter, value in zip(space, combination, strict=True)}
        try:
            with_values(config, point)
        except ConfigError as error:
            shown = " ".join(f"{name}={setting(value)}" for name, value in point.items())
            found |= {f"{shown}: {line}": None for line in error.problems}
    return list(found)
