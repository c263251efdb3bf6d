"""What the site holds beside the written pages: the reference, made from the code, and formulas without a script.

The configuration comes from its schema, the command line from its parser, so neither can differ from what runs.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Lists every decision; a new one needs no entry."""
    folder = Path(config.docs_dir) / "decisions"
    config.nav.append({"Decisions": [f"decisions/{path.name}" for path in sorted(folder.glob("*.md"))]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for name, text in (("reference/config.md", config_page()), ("reference/cli.md", cli_page())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers draw by themselves: no script, no network."""
    from latex2mathml.converter import convert

    def drawn(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return _FORMULA.sub(drawn, content)


def config_page() -> str:
    """Every key of the configuration."""
    from laras.config import PROFILES
    from laras.config_file import FOREIGN_KEYS
    from laras.schema import SCHEMA_URL, config_schema

    schema = config_schema()
    keys = {name: value for name, value in schema["properties"].items() if not value.get("deprecated")}
    aliases = {name: value for name, value in schema["properties"].items() if value.get("deprecated")}
    lines = [
        "# Configuration",
        "",
        "One YAML file, every key with a default. `auto` means that planning decides; a value is respected. On the "
        "command line every key can be overridden: `learning_rate=1e-4` or `--learning-rate 1e-4`, "
        "`split.test=0.2` inside a section. An unknown key is an error that names the key most like it.",
        "",
        f"Editors with a YAML language server complete and check the file by [its schema]({SCHEMA_URL}), which the "
        "first line of what `laras init` writes names.",
        "",
        *_key_table(keys, schema["$defs"]),
    ]
    for title, name in (("split", "SplitConfig"), ("dataset", "DatasetFiles")):
        section = schema["$defs"][name]
        lines += ["", f"## Keys of `{title}`", "", section["description"], ""]
        lines += _key_table(section["properties"], schema["$defs"], section.get("required", ()))
    lines += ["", "## Profiles", "", f"`profile` is one of {', '.join(f'`{name}`' for name in PROFILES)}.", ""]
    lines += list(_profiles(PROFILES))
    lines += ["", "## Names of other tools", "", "Accepted, since each means exactly one key.", ""]
    lines += ["| name | note |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(value['description'])} |" for name, value in aliases.items()]
    lines += ["", "Refused, with what to write instead.", "", "| name | instead |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(text)} |" for name, text in FOREIGN_KEYS.items()]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Every verb with its arguments and options."""
    from typer.main import get_command

    from laras.cli.main import app

    group: Any = get_command(app)
    lines = ["# Command line", "", "Data goes to stdout, everything else to stderr; `NO_COLOR` is respected.", ""]
    lines += ["| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in _exit_codes()]
    for name, command in group.commands.items():
        usage = " ".join(["laras", name, *(_usage(p) for p in command.params if p.param_type_name == "argument")])
        lines += ["", f"## laras {name}", "", command.help or "", "", "```text", usage + " [OPTIONS]", "```", ""]
        if command.epilog:
            lines += ["```sh", *command.epilog.splitlines()[1:], "```", ""]
        lines += ["| argument or option | meaning | default |", "|---|---|---|"]
        lines += [_parameter_row(parameter) for parameter in command.params]
    lines += ["", "## Completion", "", "`laras --install-completion` sets it up for the shell in use.", ""]
    return "\n".join(lines)


def _key_table(keys: Mapping[str, Any], sections: Mapping[str, Any], required: Sequence[str] = ()) -> list[str]:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, value in keys.items():
        default = f"`{_yaml(value.get('default', {}))}`"
        if name in required:
            default = "required"
        elif "$ref" in value:
            default = "see below"
        rows.append(
            f"| `{name}` | {_cell(_values(value, sections))} | {_cell(default)} | {_cell(value['description'])} |"
        )
    return rows


def _values(value: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """What a key takes, in words."""
    if "anyOf" in value:
        return ", ".join(dict.fromkeys(_values(one, sections) for one in value["anyOf"]))
    if "$ref" in value:
        return "section"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    kind = value.get("type", "anything")
    words = {"boolean": "true, false", "string": "text", "null": "`null`", "object": "mapping", "array": "list"}
    text = words.get(kind, kind)
    bounds = [
        f"{sign} {value[key]:,}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in value
    ]
    return f"{text} {' and '.join(bounds)}".strip()


def _profiles(names: tuple[str, ...]) -> Iterator[str]:
    from importlib import resources

    for name in names:
        text = resources.files("laras.resources.profiles").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        yield f"`{name}`:\n\n```yaml\n{text.strip()}\n```\n"


def _exit_codes() -> Iterator[tuple[int, str]]:
    from laras.errors import ExitCode

    meanings = {
        ExitCode.DONE: "done",
        ExitCode.USAGE: "usage or configuration",
        ExitCode.DATA: "data",
        ExitCode.PLAN: "the plan does not fit",
        ExitCode.INTERRUPTED: "interrupted and saved; `laras resume` goes on",
        ExitCode.ABORTED: "training aborted: numbers that do not train, or memory that no split cures",
        ExitCode.RUN_STATE: "the run is in use, or its state refuses the request",
    }
    for code in ExitCode:
        yield int(code), meanings[code]


def _usage(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _parameter_row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        name = ", ".join(f"`{option}`" for option in parameter.opts)
        if isinstance(parameter.default, Enum):
            name += ": " + ", ".join(f"`{choice.value}`" for choice in type(parameter.default))
    default = getattr(parameter.default, "value", parameter.default)
    shown = "" if default is None or default is False or callable(default) else f"`{default}`"
    return f"| {_cell(name)} | {_cell(parameter.help or '')} | {shown} |"


def _yaml(value: Any) -> str:
    import json

    return json.dumps(value) if not isinstance(value, str) else value


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
