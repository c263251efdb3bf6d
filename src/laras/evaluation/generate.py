"""Text from a model: streamed answers for a conversation, and answers of base and tuned model side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from laras.data.store import prompt_length
from laras.errors import ConfigError
from laras.evaluation.evaluator import Rows
from laras.records import Sample

Message = Mapping[str, str]
# A prompt of plain text, where every token is learnt: so much of the row is shown, the rest is the reference.
_PLAIN_PROMPT_SHARE, _PLAIN_PROMPT_TOKENS = 0.25, 48
_CONTENT_MARK = "laras-content-mark"


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens. None leaves a value to the model's own generation configuration.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token every time.
        top_p: Nucleus of the sampling, in (0, 1].
        seed: Of the sampling.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: Without the tokens that end a turn.
        tokens: Tokens generated.
        stopped: `end` at an end-of-turn token, `length` at the limit, `interrupted` by the user.
    """

    text: str
    tokens: int
    stopped: str


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: of the generation configuration, the tokenizer, and the chat template."""
    generation: Any = getattr(model, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list | tuple) else [configured]) | {tokenizer.eos_token_id}
    ids.add(_turn_end_id(tokenizer))
    return sorted(int(i) for i in ids if i is not None)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation that waits for an answer; without a chat template, the last message as it is."""
    if tokenizer.chat_template is None:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    rendered = tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def stream_answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    settings: GenerationSettings,
    on_text: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Generates one answer and hands on its text as it grows; Ctrl-C ends the answer, not the program.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        ids: The prompt's tokens.
        settings: How to choose tokens.
        on_text: Gets each new piece of text.

    Raises:
        ConfigError: When the prompt leaves no room in the model's context.
    """
    room = _room(model, len(ids))
    if room < 1:
        raise ConfigError(
            f"the conversation has {len(ids)} tokens and the model's context is full", hint="start anew with /reset"
        )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    produced: list[int] = []
    failures: list[Exception] = []
    stops = stop_token_ids(model, tokenizer)

    def work() -> None:
        try:
            limit = min(settings.max_new_tokens, room)
            produced.extend(
                _generate(
                    model, tokenizer, ids, settings, max_new_tokens=limit, stops=stops, stop=stop, streamer=streamer
                )
            )
        except Exception as error:  # noqa: BLE001 - handed to the caller's thread and raised there
            failures.append(error)
            streamer.end()  # type: ignore[no-untyped-call]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    pieces: list[str] = []
    interrupted = False
    stream: Iterator[str] = iter(streamer)
    while True:
        try:
            piece = next(stream)
        except StopIteration:
            break
        except KeyboardInterrupt:
            interrupted = True
            stop.set()
            continue
        pieces.append(piece)
        on_text(piece)
    thread.join()
    if failures:
        raise failures[0]
    ended = bool(produced) and produced[-1] in stops
    stopped = "interrupted" if interrupted and not ended else "end" if ended else "length"
    return Answer("".join(pieces).strip(), len(produced), stopped)


def generate_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    count: int,
    seed: int,
    max_new_tokens: int,
    *,
    base: Callable[[], AbstractContextManager[nn.Module]] | None = None,
) -> list[Sample]:
    """Answers of base and tuned model to the prompts of some rows, by greedy decoding.

    Args:
        model: The tuned model. With an adapter, the base is the same model with the adapter switched off.
        tokenizer: Its tokenizer.
        rows: Tokenised rows (`input_ids`, `labels`, and `row` where known); the prompt of a row is what comes before
            its first target token.
        count: So many rows at most, drawn by `seed`; rows whose prompt leaves no room for an answer are passed over.
        seed: Of the draw.
        max_new_tokens: Longest answer.
        base: Gives the base model where it cannot be had by switching off an adapter (full fine-tuning).
    """
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=0.0)
    base = base or getattr(model, "disable_adapter", None)
    samples: list[Sample] = []
    for index in np.random.default_rng(seed).permutation(len(rows)):
        if len(samples) == count:
            break
        row = rows[int(index)]
        ids, start = list(row["input_ids"]), _prompt_length(row["labels"])
        if start == 0 or _room(model, start) < max_new_tokens:
            continue
        base_text = None
        if base is not None:
            with base() as other:
                base_text = stream_answer(
                    other if isinstance(other, nn.Module) else model, tokenizer, ids[:start], settings
                ).text
        samples.append(
            Sample(
                row=int(row.get("row", index)),
                prompt=str(tokenizer.decode(ids[:start])),
                reference=str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip(),
                base=base_text,
                tuned=stream_answer(model, tokenizer, ids[:start], settings).text,
            )
        )
    return samples


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    settings: GenerationSettings,
    *,
    max_new_tokens: int,
    stops: list[int],
    stop: threading.Event,
    streamer: TextIteratorStreamer,
) -> list[int]:
    chosen: dict[str, Any] = {}
    if settings.temperature is not None:
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        chosen = greedy if settings.temperature == 0 else {"do_sample": True, "temperature": settings.temperature}
    if settings.top_p is not None and chosen.get("do_sample", True):
        chosen |= {"do_sample": True, "top_p": settings.top_p}
    input_ids_BT = torch.tensor([list(ids)], device=next(model.parameters()).device)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    with torch.inference_mode():
        output_BT = model.generate(
            input_ids=input_ids_BT,
            attention_mask=torch.ones_like(input_ids_BT),
            max_new_tokens=max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else None,
            stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
            streamer=streamer,
            use_cache=True,
            **chosen,
        )
    result: list[int] = output_BT[0, len(ids) :].tolist()
    return result


def _room(model: nn.Module, used_tokens: int) -> int:
    config: Any = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    return (context if isinstance(context, int) else 1 << 30) - used_tokens


def _prompt_length(labels: Sequence[int]) -> int:
    """Tokens before the first target; of plain text, where all are targets, a share of the row."""
    first = prompt_length(labels)
    if first == len(labels):
        return 0
    return first if first > 1 else min(_PLAIN_PROMPT_TOKENS, int(len(labels) * _PLAIN_PROMPT_SHARE))


def _turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts right behind an assistant's words."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _CONTENT_MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # noqa: BLE001 - a template is a program of somebody else; it may refuse this conversation
        return None
    after = tokenizer(text.rpartition(_CONTENT_MARK)[2].lstrip(), add_special_tokens=False)["input_ids"]
    known = tokenizer.added_tokens_decoder.get(after[0]) if after else None
    return int(after[0]) if known is not None and known.special else None
