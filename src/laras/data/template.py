"""Chat templates that end: rendering one conversation takes a bounded number of steps, time and memory.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from Python's objects and from ranges of
more than 100,000 numbers, not from loops in loops, macros that call themselves twice, powers of powers, or lists that
hold themselves again and again. What is bounded here are the rounds, the time, and the size of every value on the way.

Source: transformers 5.17.0 `chat_template_utils`, whose environment this is: same filters, functions and `generation`
    block, so that a template writes the same text; `lipsum` alone is left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # rounds of loops and calls; a conversation of 1,000 turns takes some thousands
MAX_TIME_S = 2.0  # of this thread on a processor
MAX_CHARACTERS = 64 * 2**20  # of a text, as a line of a file may have bytes
MAX_PARTS = 1_000_000  # of a list or a mapping with all that is in it
_MAX_BITS = 100_000  # of a product or a power of whole numbers
_MAX_WIDTH = 1_000_000  # asked of a filter or of a method of a text
_WIDE = re.compile(r"\d{7}")  # in a format
_COUNTED, _MODERATE = "laras_counted", "laras_moderate"  # names of our filters; no template knows them

Marks = list[tuple[int, int]]


class ChatTemplate:
    """One chat template, compiled.

    Args:
        source: Jinja.

    Raises:
        jinja2.TemplateError: It is no Jinja, or a constant of it is too large.
        Exception: Whatever its constant expressions raise.
    """

    def __init__(self, source: str) -> None:
        from transformers.utils.chat_template_utils import _cached_compile_jinja_template

        environment: Any = _cached_compile_jinja_template("").environment
        self._environment, self._plain_call = environment, environment.call
        self._steps, self._end_s, self._end_cpu_s = 0, 0.0, 0.0
        environment.filters = {name: _narrow(function) for name, function in environment.filters.items()}
        environment.filters |= {_COUNTED: self._counted, _MODERATE: _moderate}
        environment.globals |= {"namespace": _Namespace}
        del environment.globals["lipsum"]
        environment.intercepted_binops = frozenset({"+", "*", "**", "%"})
        environment.call_binop, environment.call = _operation, self._call
        tree = _Bounded().visit(environment.parse(source))
        self._template = environment.template_class.from_code(
            environment, environment.compile(tree), environment.make_globals(None)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] = (),
        add_generation_prompt: bool = False,
        marked: bool = False,
        **names: Any,
    ) -> tuple[str, Marks]:
        """The text of a conversation, and, where `marked`, the ranges inside `{% generation %}`.

        Raises:
            jinja2.TemplateError: The template refuses the conversation, or takes more than it may.
            Exception: Whatever its expressions raise.
        """
        self._steps = 0
        self._end_s, self._end_cpu_s = time.monotonic() + MAX_TIME_S, time.thread_time() + MAX_TIME_S
        given: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "tools": list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **names,
        }
        marks: Marks = []
        if marked:
            blocks: list[str] = []
            with self._environment.activate_tracker(blocks, marks):
                for block in self._template.generate(**given):
                    blocks.append(block)  # which the tracker reads
            text = "".join(blocks)
        else:
            text = self._template.render(**given)
        _require(len(text) <= MAX_CHARACTERS, f"it writes {len(text):,} characters; the limit is {MAX_CHARACTERS:,}")
        text.encode()  # half of a character, which Jinja can write, no tokenizer takes
        return text, marks

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _call(self, context: Any, function: Any, *args: Any, **keywords: Any) -> Any:
        self._step()
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            _require_narrow((*args, *keywords.values()))
            _require(function.__name__ != "format" or not _WIDE.search(owner), "the width in a format is too large")
        elif function is dict or function is _Namespace:
            _moderate([*args, keywords])
        return self._plain_call(context, function, *args, **keywords)

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps for one conversation")
        # A machine that sleeps or is busy elsewhere is no fault of the template; its clock is quicker to read.
        if time.monotonic() > self._end_s:
            _require(time.thread_time() <= self._end_cpu_s, f"it takes more than {MAX_TIME_S} s for one conversation")


class _Bounded(NodeTransformer):
    """Lets every loop count its rounds, and every list and mapping that a template makes its parts."""

    def visit_For(self, node: Any) -> Any:  # noqa: N802 - jinja's name
        """Puts a filter around what is looped over."""
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_List(self, node: Any) -> Any:  # noqa: N802
        """Puts a filter around a value that is made of others."""
        self.generic_visit(node)
        makes = getattr(node, "ctx", "load") == "load" and node.find((nodes.Name, nodes.Call)) is not None
        return _filtered(node, _MODERATE) if makes else node

    visit_Tuple = visit_Dict = visit_List


class _Namespace(Namespace):
    """One that does not write out what is in it, which may hold others."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SecurityError(otherwise)


def _moderate(value: Any) -> Any:
    """The value, unless it has too many parts: what writes or compares it goes through all of them."""
    parts, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        inside = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
        waiting.extend(inside)
        parts += len(inside)
        _require(parts <= MAX_PARTS, f"a value of more than {MAX_PARTS:,} parts is too large")
    return value


def _require_narrow(values: Iterable[Any]) -> None:
    for value in values:
        _require(not isinstance(value, int) or abs(value) <= _MAX_WIDTH, f"a width or count above {_MAX_WIDTH:,}")


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes no number with which it would make something huge."""

    @wraps(function)
    def narrow(*args: Any, **keywords: Any) -> Any:
        # The first is what is filtered, or, of some filters, what Jinja adds.
        _require_narrow((*args[1:], *keywords.values()))
        return function(*args, **keywords)

    return narrow


def _operation(context: Any, operator: str, left: Any, right: Any) -> Any:
    """Sums, products, powers and `%`, whose results can be far larger than what they are made of."""
    if operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            if len(left) + len(right) > MAX_CHARACTERS:  # spelled out, as it happens so often
                raise SecurityError(f"a text of more than {MAX_CHARACTERS:,} characters is too large")
            return left + right
        return _moderate(left + right)
    if operator == "%":
        wide = isinstance(left, str) and (_WIDE.search(left) or "*" in left)
        _require(not wide, "the width in a format is too large")
        return left % right
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        _require(bits <= _MAX_BITS, f"a number of {bits:,} bits is too large")
    elif operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(items, "__len__"):
                limit = MAX_CHARACTERS if isinstance(items, str) else MAX_PARTS
                _require(len(items) * times <= limit, f"{len(items) * times:,} repetitions are too many")
        return _moderate(left * right)
    return left**right if operator == "**" else left * right
