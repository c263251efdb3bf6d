"""Chat templates that end: rendering one conversation takes a bounded number of steps, time and memory.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from Python's objects and from ranges of
more than 100,000 numbers, not from loops in loops, macros that call themselves twice, or powers of powers.

Source: transformers 5.17.0 `chat_template_utils`, whose environment this is: same filters, functions and `generation`
    block, so that a template writes the same text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # rounds of loops and calls; a conversation of 1,000 turns takes some thousands
MAX_TIME_S = 5.0
MAX_CHARACTERS = 64 * 2**20  # of the rendered text, as a line of a file may have bytes
_MAX_FACTOR_BITS = 100_000  # of a product or a power of whole numbers
_MAX_REPEATED = 2**24  # characters or items of a product with a text or a list
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")
_COUNTED = "laras_counted"  # the name of our filter; no template knows it

Marks = list[tuple[int, int]]


class ChatTemplate:
    """One chat template, compiled.

    Args:
        source: Jinja.

    Raises:
        jinja2.TemplateError: It is no Jinja.
        MemoryError: A constant of it is too large.
    """

    def __init__(self, source: str) -> None:
        from transformers.utils.chat_template_utils import _cached_compile_jinja_template

        self._environment: Any = _cached_compile_jinja_template("").environment
        self._environment.intercepted_binops = frozenset({"*", "**", "%"})
        self._environment.call_binop = _bounded_operation
        self._environment.filters[_COUNTED] = self._counted
        self._plain_call = self._environment.call
        self._environment.call = self._call
        self._steps, self._end_s = 0, 0.0
        tree = _CountedLoops().visit(self._environment.parse(source))
        code = self._environment.compile(tree)
        self._template = self._environment.template_class.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        marked: bool = False,
        **names: Any,
    ) -> tuple[str, Marks]:
        """The text of a conversation, and, where `marked`, the ranges inside `{% generation %}`.

        Raises:
            jinja2.TemplateError: The template refuses the conversation, or takes too many steps or too long.
            Exception: Whatever its expressions raise.
        """
        self._steps, self._end_s = 0, time.monotonic() + MAX_TIME_S
        given: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "tools": [],
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
        if len(text) > MAX_CHARACTERS:
            raise SecurityError(f"it writes {len(text):,} characters; the limit is {MAX_CHARACTERS:,}")
        return text, marks

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _call(self, context: Any, function: Any, *args: Any, **keywords: Any) -> Any:
        self._step()
        return self._plain_call(context, function, *args, **keywords)

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps for one conversation")
        if time.monotonic() > self._end_s:
            raise SecurityError(f"it takes more than {MAX_TIME_S:.0f} s for one conversation")


class _CountedLoops(NodeTransformer):
    """Lets every loop count its rounds."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja's name
        """Puts our filter around what is looped over."""
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _COUNTED, [], [], None, None, lineno=node.lineno)
        return node


def _bounded_operation(context: Any, operator: str, left: Any, right: Any) -> Any:
    """Products, powers and `%`, whose results can be far larger than what they are made of."""
    if operator == "%":
        if isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError(f"the width in the format {left!r:.80} is too large")
        return left % right
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_FACTOR_BITS:
            raise SecurityError(f"a number of {bits:,} bits is too large")
    elif operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(items, "__len__") and len(items) * times > _MAX_REPEATED:
                raise SecurityError(f"{len(items) * times:,} repetitions are too many")
    return left**right if operator == "**" else left * right
