"""Which characters of a rendered example, and which of its tokens, carry loss.

Spans are half-open character ranges of the rendered text. They are found in the text and not in the token ids,
because padding, end-of-text and end-of-turn may be one and the same token.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding

IGNORE_INDEX = -100  # Source: torch.nn.CrossEntropyLoss, default of `ignore_index`

Message = Mapping[str, str]
Span = tuple[int, int]
Render = Callable[[Sequence[Message], bool], str]  # the messages, and whether a generation prompt follows them


class UnverifiedSpanError(Exception):
    """The assistant's part of a rendering cannot be told from the rest; the text says why."""


class SpecialTokens:
    """The special tokens of a tokenizer, as they stand in rendered text.

    Args:
        tokens: Their text; empty strings are left out.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        # The longest first: one token may be the beginning of another.
        by_length = sorted({token for token in tokens if token}, key=len, reverse=True)
        # A pattern that never matches stands for an empty set.
        self.pattern = "|".join(map(re.escape, by_length)) or r"(?!)"
        self._at = re.compile(self.pattern)
        self._last = re.compile(rf"(?:{self.pattern})(?=\s*\Z)")

    def closing(self, content: str, text: str, start: int) -> tuple[int, list[str]] | None:
        """Where `content`, looked for from `start` on, ends, and the special tokens that close it; None without any.

        The content's own outer whitespace does not count, since many templates trim it; the first token may stand
        after whitespace, the others follow directly.
        """
        found = re.search(rf"{re.escape(content.strip())}\s*((?:{self.pattern})+)", text[start:])
        return (start + found.start(1), self._at.findall(found[1])) if found else None

    def close(self, text: str, span: Span) -> Span:
        """The span up to its end-of-turn token: whitespace after it is cut, a token that follows directly is added."""
        start, end = span
        if last := self._last.search(text[start:end]):
            return start, start + last.end()
        if following := self._at.match(text, end):
            return start, following.end()
        return span


def marked_spans(text: str, marks: Sequence[Span], special: SpecialTokens) -> list[Span]:
    """Spans that a template marks with `{% generation %}`, each with its end-of-turn token.

    Raises:
        UnverifiedSpanError: When the template marked nothing.
    """
    if not marks:
        raise UnverifiedSpanError("the chat template's {% generation %} block marks nothing in this conversation")
    return [special.close(text, mark) for mark in marks]


def derived_spans(text: str, messages: Sequence[Message], render: Render, special: SpecialTokens) -> list[Span]:
    """Spans of the assistant's turns for a template without markers, each checked against the rendering.

    A turn begins where the rendering of the messages before it, generation prompt included, ends: what the model is
    given when it answers. It ends with the special token that closes its content.

    Args:
        text: The rendering of all messages.
        messages: The conversation.
        render: Renders the first messages of a conversation, with the generation prompt or without.
        special: The tokenizer's special tokens.

    Raises:
        UnverifiedSpanError: When a turn's prompt is not a prefix of the rendering, its content is not in the
            rendering, or no special token closes it.
    """
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _answer_start(text, messages[:index], render)
        if spans and start < spans[-1][1]:
            raise UnverifiedSpanError(f"message {index + 1}: the answer before it is not told from what follows")
        # Cut after the answer, the rendering has to hold it still: otherwise a later turn repeats or closes it.
        until = text if index + 1 == len(messages) else render(messages[: index + 1], False)
        whole = special.closing(message["content"], text, start)
        alone = special.closing(message["content"], until, start)
        if whole is None or alone is None or whole[1][0] != alone[1][0]:
            raise UnverifiedSpanError(
                f"message {index + 1}: the rendering does not hold the answer and an end-of-turn special token after it"
            )
        # Tokens that follow only when another turn does are that turn's.
        closing = takewhile(lambda pair: pair[0] == pair[1], zip(whole[1], alone[1], strict=False))
        spans.append((start, whole[0] + sum(len(token) for token, _ in closing)))
    return spans


def _answer_start(text: str, before: Sequence[Message], render: Render) -> int:
    """Where the answer to the messages `before` begins: what follows the generation prompt as far as it is rendered.

    A reasoning template's prompt may open a thought that the rendering of an answer without one leaves out.
    """
    prompt = render(before, True)
    if text.startswith(prompt):
        return len(prompt)
    history = render(before, False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
    if not text.startswith(history) or shared <= len(history):
        raise UnverifiedSpanError(f"message {len(before) + 1}: the chat template renders the messages before it anew")
    return shared


def token_range(encoding: Encoding, span: Span, text_length: int) -> tuple[int, int]:
    """First and past-the-last index of the tokens with a character inside the span.

    Asks the encoding for the two edges, which spares the offsets of all its tokens; where an edge is not that of one
    token (bytes of one character, characters that the tokenizer drops) the offsets decide.

    Args:
        encoding: Of the text, with offsets in characters.
        span: Character range, not empty.
        text_length: Characters of the text.
    """
    start, end = span
    first = encoding.char_to_token(start)
    stop = len(encoding) if end >= text_length else encoding.char_to_token(end)
    if first is not None and stop is not None:
        before = encoding.token_to_chars(stop - 1) if stop else None
        after = encoding.token_to_chars(stop) if stop < len(encoding) else (end, end)
        if before is not None and before[0] < end and after is not None and after[0] >= end:
            return first, stop
    return range_by_offsets(encoding.offsets, span)


def range_by_offsets(offsets: Sequence[Span], span: Span) -> tuple[int, int]:
    """The same from the character range of each token, ascending; bytes of one character share its range."""
    start, end = span
    return bisect_right([stop for _, stop in offsets], start), bisect_left([begin for begin, _ in offsets], end)
