"""The fixed text that a chat template writes around the contents of one sequence of roles.

Deriving an answer's span renders the conversation several times. Most templates put the same text around any
contents, so the derivation is done once for each sequence of roles, on made-up contents, and its outcome is used for
every conversation whose rendering is, character for character, that fixed text with its own contents in between.
Whatever a template does beyond that shows as another rendering, and the conversation is derived by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from laras.data.masks import Message, Render, Span, SpecialTokens, UnverifiedSpanError, derived_spans

_PLAIN_KEYS = {"role", "content"}


@dataclass(frozen=True)
class Skeleton:
    """What stands around the contents of a conversation.

    Attributes:
        pieces: Text before each message's content and after the last: one more than there are messages.
        marks: For each answer: index of its message, characters before and after the content that belong to it.
    """

    pieces: tuple[str, ...]
    marks: tuple[tuple[int, int, int], ...]

    def spans(self, text: str, contents: Sequence[str]) -> list[Span] | None:
        """Spans of the answers, or None when `text` is anything but the pieces with the contents in between.

        Contents count as they are, or without their outer whitespace, which many templates cut.
        """
        for candidate in (contents, [content.strip() for content in contents]):
            if "".join(chain.from_iterable(zip_longest(self.pieces, candidate, fillvalue=""))) == text:
                return self._spans(candidate)
        return None

    def _spans(self, contents: Sequence[str]) -> list[Span]:
        starts, position = [], 0
        for piece, content in zip(self.pieces, contents, strict=False):
            position += len(piece)
            starts.append(position)
            position += len(content)
        return [(starts[i] - before, starts[i] + len(contents[i]) + after) for i, before, after in self.marks]


def build_skeleton(roles: Sequence[str], render: Render, special: SpecialTokens) -> Skeleton | None:
    """The skeleton of a sequence of roles; None when the template shows none."""
    contents = [f"Content{number}x7q" for number in range(len(roles))]
    messages: list[Message] = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]
    text = render(messages, False)
    pieces, position = [], 0
    for content in contents:
        start = text.find(content, position)
        if start < 0 or text.count(content) != 1:
            return None
        pieces.append(text[position:start])
        position = start + len(content)
    pieces.append(text[position:])
    try:
        spans = derived_spans(text, messages, render, special)
    except UnverifiedSpanError:
        return None
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    marks = []
    for index, (start, end) in zip(answers, spans, strict=True):
        content_start = text.find(contents[index])
        before, after = content_start - start, end - content_start - len(contents[index])
        if not (0 <= before <= len(pieces[index]) and 0 <= after <= len(pieces[index + 1])):
            return None
        marks.append((index, before, after))
    return Skeleton(tuple(pieces), tuple(marks))


def is_plain(messages: Sequence[Message]) -> bool:
    """Whether the messages have roles and text contents only, no tool calls or names."""
    return all(message.keys() == _PLAIN_KEYS and isinstance(message["content"], str) for message in messages)
