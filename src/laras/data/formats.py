"""Five formats of training data, found by their columns and brought to three kinds of example.

text                text                                   → {"text"}
prompt-completion   prompt, completion                     → {"prompt", "completion"}
messages            messages: [{role, content}], tools?    → {"messages"}
sharegpt            conversations: [{from, value}], tools? → {"messages"}
alpaca              instruction, input?, output, system?   → {"messages"}

Beside its messages an example has `tools`, where there are any for the template, and `without_loss`, where some of its
answers carry none: their message says `weight: 0` (OpenAI) or `train: false` (Axolotl).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from laras.errors import DataError
from laras.records import Format

Example = dict[str, Any]  # {"messages": [{"role", "content", …}]}, {"prompt": str, "completion": str} or {"text": str}

# In the order in which they are looked for: a column of conversations says more than a `text` beside it.
REQUIRED_FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL_FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
    "prompt-completion": (),
    "text": (),
}
# Names seen in the field for our fields. Only ever suggested: a column is used when the user says so.
_LIKELY_MEANING = {
    "question": "prompt",
    "query": "prompt",
    "answer": "completion",
    "response": "completion",
    "chosen": "completion",
    "conversation": "messages",
    "dialogue": "messages",
    "dialog": "messages",
    "chat": "messages",
    "content": "text",
    "document": "text",
    "body": "text",
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
# What may come before a turn of each role, None being the start of the conversation.
_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_PLAIN_KEYS = {"role", "content"}
_LOSS_KEYS = ("weight", "train", "training")  # of an answer: whether it carries loss
_WITHOUT_LOSS = "without_loss"
_KEPT_KEYS = ("tool_calls", "tool_call_id", "name")


@dataclass(frozen=True)
class Layout:
    """Where the fields of a format are."""

    format: Format
    columns: Mapping[str, str]  # field → column; optional fields only where the data has them
    unused: tuple[str, ...] = ()  # columns that say nothing to the format


def detect_layout(
    column_names: Iterable[str], wanted: Literal["auto"] | Format = "auto", columns: Mapping[str, str] | None = None
) -> Layout:
    """Finds the format by the columns that the rows have between them.

    Args:
        column_names: Union of the keys of all rows.
        wanted: A format to use whatever else the columns would fit.
        columns: Our field name → column of the data.

    Raises:
        DataError: Names every field that is missing or wrongly mapped, with the column most like it.
    """
    present = list(dict.fromkeys(column_names))
    mapping = dict(columns or {})
    problems = _mapping_problems(present, wanted, mapping)
    if problems:
        raise DataError("`columns` does not fit the data", problems=problems, hint=_columns_hint(present))
    # A column that is given to one field is not found again under its own name.
    found = {name: name for name in present if name not in mapping.values()} | mapping
    candidates: Sequence[Format] = tuple(REQUIRED_FIELDS) if wanted == "auto" else (wanted,)
    for candidate in candidates:
        if all(field in found for field in REQUIRED_FIELDS[candidate]):
            fields = (*REQUIRED_FIELDS[candidate], *OPTIONAL_FIELDS[candidate])
            return Layout(candidate, {field: found[field] for field in fields if field in found})
    missing = [field for candidate in candidates for field in REQUIRED_FIELDS[candidate] if field not in found]
    guesses = _likely_columns(missing, [name for name in present if name not in mapping.values()])
    message = (
        "no known format has these columns" if wanted == "auto" else f"format {wanted} needs {_quoted(missing)}"
    ) + f"; the data has {_quoted(present)}"
    if guesses:
        pairs = ", ".join(
            f"{field}: {column if column.isidentifier() else json.dumps(column)}" for field, column in guesses.items()
        )
        did_you_mean = "; ".join(f"did you mean {field!r} by {column!r}?" for field, column in guesses.items())
        raise DataError(f"{message}; {did_you_mean}", hint=f"rename the columns, or write `columns: {{{pairs}}}`")
    raise DataError(message, hint=_formats_hint())


def normalize_row(row: Any, layout: Layout) -> Example | str:
    """The example that a row holds, or the reason why it holds none."""
    if not isinstance(row, Mapping):
        return f"not an object but {_kind(row)}"
    fields = {field: row.get(column) for field, column in layout.columns.items()}
    missing = [layout.columns[field] for field in REQUIRED_FIELDS[layout.format] if fields[field] is None]
    if missing:
        return f"missing field {_quoted(missing)}"
    if layout.format in ("messages", "sharegpt"):
        field = REQUIRED_FIELDS[layout.format][0]
        example = _conversation(fields[field], fields.get("system"), layout.columns[field])
        return example if isinstance(example, str) else _with_tools(example, fields.get("tools"))
    return _plain_texts(fields, layout)


def _with_tools(example: Example, given: Any) -> Example | str:
    """The example with what its template is told about tools: a list of objects, or the JSON text of one."""
    tools = given or []
    if isinstance(given, str) and given.strip():
        try:
            tools = json.loads(given)
        except (ValueError, RecursionError):
            return "field 'tools' is a text that is no JSON"
    elif isinstance(given, str):
        tools = []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return f"field 'tools' is {_kind(tools)}, not a list of objects"
    return {**example, "tools": tools} if tools else example


def _plain_texts(fields: Mapping[str, Any], layout: Layout) -> Example | str:
    """The formats whose fields are texts, no conversation."""
    for field, value in fields.items():
        if value is not None and not isinstance(value, str):
            return f"field {layout.columns[field]!r} is {_kind(value)}, not text"
    texts = {field: cast(str, value) for field, value in fields.items() if value is not None and value.strip()}
    empty = [layout.columns[field] for field in REQUIRED_FIELDS[layout.format] if field not in texts]
    # An Alpaca row may put the whole request into `input`.
    if empty and not (layout.format == "alpaca" and {"input", "output"} <= texts.keys()):
        return f"empty text in {_quoted(empty)}"
    if layout.format == "alpaca":
        request = "\n\n".join(texts[field] for field in ("instruction", "input") if field in texts)
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": texts["output"]}]
        return {"messages": [*_system_turn(texts.get("system")), *turns]}
    return {field: texts[field] for field in REQUIRED_FIELDS[layout.format]}


def _conversation(turns: Any, system: Any, column: str) -> Example | str:
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
        return f"field {column!r} is {_kind(turns)}, not a list of messages"
    if not turns:
        return f"empty conversation in {column!r}"
    messages: list[dict[str, Any]] = _system_turn(system)
    for number, turn in enumerate(turns, start=1):
        message = _plain_message(turn) or _message(turn)
        if isinstance(message, str):
            return f"message {number}: {message}"
        if message["role"] == "system" and not message["content"].strip():
            continue  # an empty system prompt says the same as none, and some templates would render it
        before = messages[-1]["role"] if messages else None
        if before not in _MAY_FOLLOW[message["role"]]:
            where = f"after {before!r}" if before else "at the start"
            return f"message {number}: wrong role order, {message['role']!r} {where}"
        messages.append(message)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        return "no assistant turn"
    without_loss = [number for number, answer in enumerate(answers) if answer.pop(_WITHOUT_LOSS, False)]
    return {"messages": messages, "without_loss": without_loss} if without_loss else {"messages": messages}


def _role(given: Mapping[str, Any]) -> tuple[str, str | None]:
    """Our name of the role, and what is wrong with it."""
    role = given.get("role", given.get("from"))
    if role is None:
        return "", "missing field 'role'"
    name = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if name is None:
        close = difflib.get_close_matches(str(role).lower(), list(_ROLES), n=1)
        return "", f"unknown role {role!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    return name, None


def _plain_message(turn: Any) -> dict[str, Any] | None:
    """A turn of a known role and some text and nothing else; None for any other, which is checked the long way.

    Nearly all turns are so, and checking them the long way would take a tenth of the whole stage.
    """
    if type(turn) is dict and turn.keys() == _PLAIN_KEYS:
        role, content = turn["role"], turn["content"]
        if type(role) is str and type(content) is str and role in _ROLES and content and not content.isspace():
            return {"role": _ROLES[role], "content": content}
    return None


def _message(turn: Any) -> dict[str, Any] | str:
    """One turn of either naming: role and content, or from and value."""
    if not isinstance(turn, Mapping):
        return f"not an object but {_kind(turn)}"
    # Arrow tables give every key to every message, with None where a message has none.
    given = {key: value for key, value in turn.items() if value is not None}
    name, problem = _role(given)
    weights = {key: given[key] for key in _LOSS_KEYS if key in given and name == "assistant"}
    if unknown := [f"{key} is {value!r:.40}, neither 0 nor 1" for key, value in weights.items() if value not in (0, 1)]:
        problem = unknown[0]
    if problem:
        return problem
    kept = {key: given[key] for key in _KEPT_KEYS if given.get(key)}
    if not all(weights.values()):
        kept[_WITHOUT_LOSS] = True
    content = given.get("content", given.get("value", "" if "tool_calls" in kept else None))
    if content is None:
        return "missing field 'content'"
    text = _text_of(content)
    if text is None:
        return f"content is {_kind(content)}, not text"
    may_be_empty = name in ("system", "tool") or "tool_calls" in kept
    if not text.strip() and not may_be_empty:
        return f"empty text in the {name} turn"
    return {"role": name, "content": text, **kept}


def _text_of(content: Any) -> str | None:
    """Text, or a list of parts that are all text; None for anything else."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return "".join(cast(list[str], texts)) if all(isinstance(text, str) for text in texts) else None
    return None


def _system_turn(system: Any) -> list[dict[str, Any]]:
    if isinstance(system, str) and system.strip():
        return [{"role": "system", "content": system}]
    return []


def _mapping_problems(
    present: Sequence[str], wanted: Literal["auto"] | Format, mapping: Mapping[str, str]
) -> list[str]:
    formats: Sequence[Format] = tuple(REQUIRED_FIELDS) if wanted == "auto" else (wanted,)
    known = list(dict.fromkeys(f for name in formats for f in (*REQUIRED_FIELDS[name], *OPTIONAL_FIELDS[name])))
    problems = []
    for field, column in mapping.items():
        if field not in known:
            problems.append(
                f"{field}: no field of {'any format' if wanted == 'auto' else wanted}{_guess(field, known)}"
            )
        if column not in present:
            problems.append(f"{field}: the data has no column {column!r}{_guess(column, present)}")
    return problems


def _guess(name: str, among: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, among, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {_quoted(among)}"


def _likely_columns(missing: Sequence[str], present: Sequence[str]) -> dict[str, str]:
    """Missing field → the column that probably means it."""
    guesses: dict[str, str] = {}
    for column in present:
        meaning = _LIKELY_MEANING.get(column.lower())
        if column.lower() == "chosen" and "prompt" in missing:  # of a pair without a prompt beside it: a conversation
            meaning = "messages"
        close = difflib.get_close_matches(column.lower(), missing, n=1, cutoff=0.75)
        field = close[0] if close else meaning
        if field is not None and field in missing and field not in guesses:
            guesses[field] = column
    return guesses


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({value})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    kinds = ((str, "a text"), (bytes, "binary"), (Mapping, "an object"), (Sequence, "a list"))
    return next((words for kind, words in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"


def _columns_hint(present: Sequence[str]) -> str:
    return f"`columns` maps our field names to columns; the data has {_quoted(present)}"


def _formats_hint() -> str:
    formats = "; ".join(f"{name}: {' and '.join(fields)}" for name, fields in REQUIRED_FIELDS.items())
    return f"formats and their columns are {formats}; `columns: {{prompt: your_column}}` maps other names"
