"""The configuration and the plan as trackers take them: flat mappings, and tables of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from laras.config import RunConfig
from laras.records import TrainPlan

Value = str | int | float | bool | None
PLAN_COLUMNS = ("choice", "value", "reason")
CONFIG_COLUMNS = ("key", "value")


def config_values(config: RunConfig) -> dict[str, Value]:
    """Every key of the configuration; those of a section as `split.test`."""
    return dict(_flat(config.model_dump(mode="json")))


def plan_values(plan: TrainPlan) -> dict[str, Value]:
    """What was planned: the choices, and what memory and time they should take."""
    parts = plan.model_dump(mode="json", include={"choices", "memory", "time", "total_steps"})
    gpu = {"gpu": plan.hardware.gpu_name, "gpu_count": plan.hardware.count}
    return dict(_flat({**parts.pop("choices"), **parts, **gpu}))


def config_rows(config: RunConfig) -> list[list[str]]:
    """Rows under `CONFIG_COLUMNS`."""
    return [[key, _text(value)] for key, value in config_values(config).items()]


def plan_rows(plan: TrainPlan) -> list[list[str]]:
    """Rows under `PLAN_COLUMNS`; the reason is empty where the plan gives none."""
    return [[key, _text(value), plan.reasons.get(key, "")] for key, value in plan_values(plan).items()]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple | Mapping):
            yield prefix + key, ", ".join(str(item) for item in value)
        else:
            yield prefix + key, value


def _text(value: Value) -> str:
    return "" if value is None else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
