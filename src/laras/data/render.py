"""From validated examples to token ids and labels.

The text that the model sees is rendered first, then tokenised in one batch, and the characters that carry loss are
turned into tokens last: see `laras.data.masks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from laras.data.limits import memory_limit
from laras.data.masks import (
    IGNORE_INDEX,
    Message,
    Span,
    SpecialTokens,
    UnverifiedSpanError,
    derived_spans,
    marked_spans,
    token_range,
)
from laras.data.skeleton import Skeleton, build_skeleton, is_plain
from laras.errors import DataError
from laras.records import Format

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from laras.data.template import ChatTemplate

MaskSource = Literal["generation-markers", "derived", "boundary", "all-tokens"]

CHAT_FORMATS: tuple[Format, ...] = ("messages", "sharegpt", "alpaca")
_MOST_SKELETONS = 10_000
_DECODED_BYTES = 4 * 2**30  # that rendering a batch may take
# What a template's own expressions may raise.
_PROGRAM_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_HINT = "name a Jinja file that does with `chat_template: file.jinja`"
_QUESTION = {"role": "user", "content": "First question?"}
_ANSWER = {"role": "assistant", "content": "First answer."}
# The template has to pass one. The second is for templates that know single turns only.
_PROBES: tuple[list[Message], ...] = (
    [
        _QUESTION,
        _ANSWER,
        {"role": "user", "content": "Second question?"},
        {"role": "assistant", "content": "Second answer."},
    ],
    [_QUESTION, _ANSWER],
)


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it.

    Attributes:
        input_ids: Token ids, shape (T,).
        labels: The id where the token carries loss, -100 elsewhere; shape (T,), not shifted.
        text: What `input_ids` stand for, special tokens included.
    """

    input_ids: list[int]
    labels: list[int]
    text: str


@dataclass(frozen=True)
class RenderProblem:
    """One example that cannot be rendered, or whose loss cannot be placed."""

    reason: str


@dataclass(frozen=True)
class _Draft:
    """A rendered example before tokenisation. `spans` is None where every token carries loss."""

    text: str
    spans: list[Span] | None


class Renderer:
    """Renders and tokenises examples of one format. Made by `build_renderer`.

    Attributes:
        mask_source: What tells the tokens that carry loss, as `DatasetProfile` records it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_source: MaskSource, chat_template: str | None) -> None:
        self.mask_source: MaskSource = mask_source
        self._tokenizer = tokenizer
        self._chat_template = _compiled(chat_template) if chat_template is not None else None
        self._special = SpecialTokens(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._bos = _bos_of(tokenizer)
        self._eos = str(tokenizer.eos_token or "")
        self._special_names: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> list[Encoded | RenderProblem]:
        """Renders and tokenises a batch; the results stand in the order of the examples."""
        (results,) = self.encode_batches([examples])
        return results

    def encode_batches(self, batches: Iterable[Sequence[Mapping[str, Any]]]) -> Iterator[list[Encoded | RenderProblem]]:
        """Renders and tokenises batch after batch; tokenising one runs beside reading and rendering the next.

        The tokenizer works outside Python's lock, on as many cores as it finds, so that a thread is enough to keep
        them busy; processes would first have to import and load everything anew.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = None
            for batch in batches:
                with memory_limit(_DECODED_BYTES):
                    results = [self._draft(example) for example in batch]
                drafts = [result for result in results if isinstance(result, _Draft)]
                submitted = (results, drafts, pool.submit(self._tokenise, drafts))
                if waiting is not None:
                    yield self._labelled(waiting[0], waiting[1], waiting[2].result())
                waiting = submitted
            if waiting is not None:
                yield self._labelled(waiting[0], waiting[1], waiting[2].result())

    def _labelled(
        self, results: Sequence[_Draft | RenderProblem], drafts: Sequence[_Draft], encodings: Sequence[Encoding]
    ) -> list[Encoded | RenderProblem]:
        labelled = (self._label(draft, encoding) for draft, encoding in zip(drafts, encodings, strict=True))
        return [next(labelled) if isinstance(result, _Draft) else result for result in results]

    def _draft(self, example: Mapping[str, Any]) -> _Draft | RenderProblem:
        if "messages" in example:
            return self._draft_chat(example)
        if "text" in example:
            return _Draft(self._with_eos(example["text"]), None)
        prompt = example["prompt"]
        text = prompt + self._with_eos(example["completion"])
        return _Draft(text, None if self.mask_source == "all-tokens" else [(len(prompt), len(text))])

    def _draft_chat(self, example: Mapping[str, Any]) -> _Draft | RenderProblem:
        from jinja2 import TemplateError

        messages, tools = example["messages"], example.get("tools", ())
        if self.mask_source != "all-tokens" and all(message["role"] != "assistant" for message in messages):
            return RenderProblem("the conversation has no assistant turn to learn from")
        try:
            text, marks = self._render(messages, tools=tools)
            spans = None
            if self.mask_source == "generation-markers":
                spans = marked_spans(text, marks, self._special)
            elif self.mask_source == "derived":
                spans = self._derived_spans(text, messages, tools)
            if without_loss := example.get("without_loss"):
                spans = _without(without_loss, spans, messages)
            return _Draft(text, spans)
        except UnverifiedSpanError as error:
            return RenderProblem(str(error))
        # A template is a program: besides raising on purpose it may add None to text, ask for a missing key, divide
        # by zero, or call itself without end.
        except (TemplateError, *_PROGRAM_ERRORS) as error:
            detail = str(error) or type(error).__name__
            return RenderProblem(f"the chat template refuses the conversation: {detail}")

    def _derived_spans(self, text: str, messages: Sequence[Message], tools: Sequence[Any]) -> list[Span]:
        """From what the template writes around any contents of these roles, else from this conversation alone."""
        if is_plain(messages) and not tools:
            roles = tuple(message["role"] for message in messages)
            if roles not in self._skeletons and len(self._skeletons) < _MOST_SKELETONS:
                self._skeletons[roles] = self._build_skeleton(roles)
            skeleton = self._skeletons.get(roles)
            spans = skeleton.spans(text, [message["content"] for message in messages]) if skeleton else None
            if spans is not None:
                return spans
        return derived_spans(text, messages, partial(self._render_part, tools=tools), self._special)

    def _build_skeleton(self, roles: Sequence[str]) -> Skeleton | None:
        from jinja2 import TemplateError

        try:
            return build_skeleton(roles, self._render_part, self._special)
        except (TemplateError, *_PROGRAM_ERRORS):
            return None  # the template asks for something that made-up contents do not have

    def _render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] = (), generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the ranges that the template marks."""
        assert self._chat_template is not None
        return self._chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=generation_prompt,
            marked=self.mask_source == "generation-markers",
            **self._special_names,
        )

    def _render_part(self, messages: Sequence[Message], generation_prompt: bool, tools: Sequence[Any] = ()) -> str:
        return self._render(messages, tools=tools, generation_prompt=generation_prompt)[0]

    def _with_eos(self, text: str) -> str:
        return text if self._eos and text.endswith(self._eos) else text + self._eos

    def _tokenise(self, drafts: Sequence[_Draft]) -> list[Encoding]:
        if not drafts:
            return []
        batch = self._tokenizer(
            [draft.text for draft in drafts],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(batch.encodings or ())

    def _label(self, draft: _Draft, encoding: Encoding) -> Encoded | RenderProblem:
        input_ids, text = encoding.ids, draft.text
        if draft.spans is None:
            labels = list(input_ids)
        else:
            labels = [IGNORE_INDEX] * len(input_ids)
            for span in draft.spans:
                first, stop = token_range(encoding, span, len(text))
                labels[first:stop] = input_ids[first:stop]
        # Chat templates write their own first token. By id, not by text: some tokenizers treat the first word
        # differently after a written token.
        if self._chat_template is None and self._bos and input_ids[:1] != [self._bos[0]]:
            bos_id, bos_text = self._bos
            first_label = bos_id if draft.spans is None else IGNORE_INDEX
            input_ids, labels, text = [bos_id, *input_ids], [first_label, *labels], bos_text + text
        if not target_count(labels):
            return RenderProblem("no token of the example carries loss")
        return Encoded(input_ids, labels, text)


def _without(numbers: Sequence[int], spans: list[Span] | None, messages: Sequence[Message]) -> list[Span]:
    """The spans of the answers less those of the given numbers, where each answer has one.

    Raises:
        UnverifiedSpanError: It cannot be told which span is whose.
    """
    answers = sum(message["role"] == "assistant" for message in messages)
    if spans is None:
        raise UnverifiedSpanError("an answer is to carry no loss; `completion_only_loss: false` puts it on all tokens")
    if len(spans) != answers:
        raise UnverifiedSpanError(
            f"an answer is to carry no loss, and the chat template marks {len(spans)} ranges for {answers} answers"
        )
    return [span for number, span in enumerate(spans) if number not in numbers]


def target_count(labels: Sequence[int]) -> int:
    """Tokens that carry loss. The first token is predicted by nothing, so its label never counts."""
    return max(0, len(labels) - 1 - labels[1:].count(IGNORE_INDEX))


def build_renderer(
    tokenizer: PreTrainedTokenizerBase,
    format: Format,
    completion_only_loss: bool,
    chat_template: str | None = None,
) -> Renderer:
    """A renderer for the examples of one dataset.

    Args:
        tokenizer: A fast tokenizer.
        format: The dataset's format. Examples reach the renderer as `messages` for the chat formats, as
            `prompt` and `completion`, or as `text`.
        completion_only_loss: Loss on assistant turns and completions only; False puts it on every token.
        chat_template: Jinja source that replaces the tokenizer's template; None keeps it.

    Raises:
        DataError: When the tokenizer gives no character offsets, chat data meets no chat template, or the template
            does not tell the assistant's turns from the rest.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets",
            hint="use a model whose repository has a tokenizer.json",
        )
    if format not in CHAT_FORMATS:
        boundary = completion_only_loss and format != "text"
        return Renderer(tokenizer, "boundary" if boundary else "all-tokens", None)
    if chat_template is None and not tokenizer.chat_template:
        raise DataError(
            f"the data are conversations and the tokenizer {tokenizer.name_or_path or ''} has no chat template",
            hint="name a Jinja file with `chat_template: file.jinja`, or use the template of the model's chat version",
        )
    template = chat_template if chat_template is not None else tokenizer.get_chat_template()
    if not isinstance(template, str):
        raise DataError(
            f"the chat template is a {type(template).__name__}, not a text",
            hint="name a Jinja file with `chat_template: file.jinja`",
        )
    renderer = Renderer(tokenizer, _chat_mask_source(template, completion_only_loss), template)
    _verify_template(renderer)
    return renderer


def _chat_mask_source(template: str, completion_only_loss: bool) -> MaskSource:
    if not completion_only_loss:
        return "all-tokens"
    return "generation-markers" if _GENERATION_BLOCK.search(template) else "derived"


def _compiled(source: str) -> ChatTemplate:
    from jinja2 import TemplateError

    from laras.data.template import ChatTemplate

    try:
        with memory_limit(_DECODED_BYTES):
            return ChatTemplate(source)
    except (TemplateError, SyntaxError, *_PROGRAM_ERRORS) as error:  # `{% continue %}` outside a loop is the second
        detail = str(error) or type(error).__name__
        raise DataError(
            f"the chat template is no Jinja that can be compiled: {detail:.300}", hint=_TEMPLATE_HINT
        ) from None


def _verify_template(renderer: Renderer) -> None:
    results = renderer.encode([{"messages": probe} for probe in _PROBES])
    reasons = [result.reason for result in results if isinstance(result, RenderProblem)]
    if len(reasons) == len(results):
        raise DataError(
            "the chat template does not show which tokens are the assistant's",
            problems=list(dict.fromkeys(reasons)),
            hint="close each turn with a special token or mark the assistant's text with {% generation %}: "
            + _TEMPLATE_HINT,
        )


def _bos_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str] | None:
    """Id and text of the token that the tokenizer itself puts in front of plain text; None where it puts none."""
    bos_id = tokenizer.bos_token_id
    if bos_id is None or tokenizer("a")["input_ids"][:1] != [bos_id]:
        return None
    return bos_id, str(tokenizer.bos_token)
