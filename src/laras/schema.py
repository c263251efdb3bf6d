"""JSON Schema of the configuration file, for editors: `python -m laras.schema > src/laras/resources/laras.schema.json`.

It describes the file as a person writes it; what depends on several keys at once is checked by `laras.config` alone.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from laras.config import RunConfig
from laras.config_file import ALIASES

SCHEMA_URL = "https://raw.githubusercontent.com/laras-tune/laras/main/src/laras/resources/laras.schema.json"


def config_schema() -> dict[str, Any]:
    """The schema; the accepted names of other tools are listed as deprecated, each saying which key it means."""
    schema = RunConfig.model_json_schema()
    report_to = schema["properties"]["report_to"]
    one_tracker = {**report_to["items"]}
    report_to["anyOf"] = [one_tracker, {"type": report_to.pop("type"), "items": report_to.pop("items")}]
    for alias, name in ALIASES.items():
        schema["properties"][alias] = {"deprecated": True, "description": f"Another tool's name; means `{name}`."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_URL,
        **schema,
        "title": "Laras run",
    }


def schema_text() -> str:
    """The schema as the shipped file holds it."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
