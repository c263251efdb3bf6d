"""YAML from strangers: read to plain values, or refused with one line that says why.

Beyond what a SafeLoader refuses: a key written twice, an alias of a list or mapping (nine of them nested are a billion
values), and values of a size that no configuration has.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import yaml

MAX_TEXT_CHARS = 2**20
MAX_STRING_CHARS = 4096  # the longest path of Linux
MAX_INTEGER = 2**63 - 1
MAX_VALUES = 10_000
MAX_DEPTH = 20
_SHOWN_KEY_CHARS = 80


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: As reading does.
        ValueError: It is not UTF-8, or longer than `MAX_TEXT_CHARS`.
    """
    with path.open(encoding="utf-8") as file:
        text = file.read(MAX_TEXT_CHARS + 1)  # `/dev/zero` has no end
    if len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"longer than {MAX_TEXT_CHARS:,} characters")
    return text


def parse_yaml(text: str) -> Any:
    """Plain values of one document.

    Raises:
        ValueError: In one line, what is wrong and where.
    """
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader
    # Explicit tags on unfit values (`!!bool abc`) and impossible escapes surface as Python's own errors.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:500] or type(error).__name__) from None


def unusable_values(values: Mapping[Any, Any]) -> list[str]:
    """What no configuration holds, a value a line: each with its key, what it is, and the limit."""
    problems: list[str] = []
    for count, (location, depth, value) in enumerate(_walk(values)):
        if count > MAX_VALUES:
            return [*problems, f"more than {MAX_VALUES:,} values"]
        if depth > MAX_DEPTH:
            return [*problems, f"{location}: nested deeper than {MAX_DEPTH} levels"]
        problem = _problem(value)
        if problem:
            problems.append(f"{location}: {problem}")
    return problems


def _walk(values: Mapping[Any, Any]) -> Iterator[tuple[str, int, Any]]:
    """Every key and value below a mapping, with the dotted key it stands under and its depth."""
    waiting: list[tuple[str, int, Any]] = [("", 0, values)]
    while waiting:
        location, depth, value = waiting.pop()
        if isinstance(value, Mapping):
            for key, item in value.items():
                shown = str(key) if isinstance(key, str | bool) or key is None else type(key).__name__
                shown = repr(shown[:_SHOWN_KEY_CHARS])[1:-1]
                below = f"{location}.{shown}" if location else shown
                yield below, depth, key
                waiting.append((below, depth + 1, item))
        elif isinstance(value, list | tuple | Set):
            waiting.extend((location, depth + 1, item) for item in value)
        if location:
            yield location, depth, value


def _problem(value: Any) -> str | None:
    if isinstance(value, bytes):
        return "binary data where a text or a number belongs"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"an integer of {value.bit_length():,} bits; the limit is 63"
    return _text_problem(value) if isinstance(value, str) else None


def _text_problem(value: str) -> str | None:
    if len(value) > MAX_STRING_CHARS:
        return f"a text of {len(value):,} characters; the limit is {MAX_STRING_CHARS:,}"
    if "\0" in value:
        return "a text with a null character"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "a text with half of a character (a lone surrogate)"
    return None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses doubled keys, which YAML would silently resolve to the last, and multiplying aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        if alias is not None and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(
                None, None, "an alias (*name) may repeat a plain value only, not a list or mapping", alias.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is written twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)
