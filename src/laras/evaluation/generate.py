"""Text from a model: one answer streamed as it grows, or the answers of many prompts in batches.

Both go through `_generate`, so that what a report shows is what a conversation gives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from laras.errors import ConfigError, OutOfMemoryError
from laras.models.device_memory import DeviceOutOfMemory, free_caches, with_fewer_rows

Message = Mapping[str, str]
_PADDED_SHARE = 2  # a batch has at most so many times the tokens of its prompts; 1: no padding at all
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
        OutOfMemoryError: When it does not fit the device.
    """
    limit = _limit(model, len(ids), settings)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    produced: list[int] = []
    failures: list[Exception] = []
    stops = stop_token_ids(model, tokenizer)

    def work() -> None:
        try:
            until = _Until(stops, stop.is_set)
            produced.extend(_generate(model, tokenizer, [ids], settings, limit, until, streamer)[0])
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
        if not isinstance(failures[0], DeviceOutOfMemory):
            raise failures[0]
        failures.clear()  # its traceback holds what did not fit
        free_caches()
        raise _does_not_fit(len(ids))
    ended = bool(produced) and produced[-1] in stops
    stopped = "interrupted" if interrupted and not ended else "end" if ended else "length"
    return Answer("".join(pieces).strip(), len(produced), stopped)


def answer_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_ended: Callable[[int], None] = lambda _: None,
    on_smaller: Callable[[int, int, str], None] = lambda old, new, why: None,
) -> list[Answer]:
    """Answers of several prompts, a batch at a time: those of one by one, but for the rounding of the arithmetic.

    Args:
        model: As for `stream_answer`.
        tokenizer: Its tokenizer.
        prompts: The tokens of each.
        settings: How to choose tokens; a batch ends where its longest prompt leaves no more room.
        on_ended: Gets how many answers have ended so far, whenever more have.
        on_smaller: Gets the old and the new size of a batch, and why, when memory runs out.

    Raises:
        ConfigError: When a prompt leaves no room in the model's context.
        OutOfMemoryError: When one alone does not fit the device.
    """
    stops = stop_token_ids(model, tokenizer)
    pending = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: dict[int, Answer] = {}
    # The state of a recurrent model runs through padding, which not every family of transformers masks there.
    share = 1 if getattr(model, "_is_stateful", False) else _PADDED_SHARE

    def work(rows: int) -> None:
        while pending:
            batch = _of_like_length([(index, len(prompts[index])) for index in pending[:rows]], share)
            limit = _limit(model, len(prompts[batch[0]]), settings)
            until = _Until(stops, on_ended=lambda ended: on_ended(len(answers) + ended))
            produced = _generate(model, tokenizer, [prompts[index] for index in batch], settings, limit, until)
            for index, ids in zip(batch, produced, strict=True):
                text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                answers[index] = Answer(text, len(ids), "end" if ids and ids[-1] in stops else "length")
            del pending[: len(batch)]
            on_ended(len(answers))

    with suppress(DeviceOutOfMemory):
        with_fewer_rows(work, max(1, len(prompts)), on_smaller)
    if pending:
        free_caches()
        raise _does_not_fit(len(prompts[pending[0]]))
    return [answers[index] for index in range(len(prompts))]


class _Until(StoppingCriteria):
    """Ends every row when that is asked for, and tells how many have ended by themselves."""

    def __init__(
        self,
        stops: Sequence[int],
        is_asked: Callable[[], bool] = lambda: False,
        on_ended: Callable[[int], None] | None = None,
    ) -> None:
        self.stops, self._is_asked, self._on_ended = list(stops), is_asked, on_ended
        self._ended_B: torch.Tensor | None = None
        self._told = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        if self._on_ended is not None:
            last_B = torch.isin(input_ids[:, -1], torch.tensor(self.stops, device=input_ids.device))
            self._ended_B = last_B if self._ended_B is None else self._ended_B | last_B
            ended = int(self._ended_B.sum())
            if ended > self._told:
                self._told = ended
                self._on_ended(ended)
        return torch.full((input_ids.shape[0],), self._is_asked(), device=input_ids.device, dtype=torch.bool)


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    max_new_tokens: int,
    until: _Until,
    streamer: TextIteratorStreamer | None = None,
) -> list[list[int]]:
    """What follows each prompt, up to and with the first token that ends an answer."""
    chosen: dict[str, Any] = {}
    if settings.temperature is not None:
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        chosen = greedy if settings.temperature == 0 else {"do_sample": True, "temperature": settings.temperature}
    if settings.top_p is not None and chosen.get("do_sample", True):
        chosen |= {"do_sample": True, "top_p": settings.top_p}
    stops, longest = until.stops, max(map(len, prompts))
    device = next(model.parameters()).device
    # Padding repeats a token of the prompt itself: a penalty on repetition looks at masked tokens, too.
    input_ids_BT = torch.tensor([[ids[0]] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    attention_mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    with torch.inference_mode():
        output_BT = model.generate(
            input_ids=input_ids_BT,
            attention_mask=attention_mask_BT,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else None,
            stopping_criteria=StoppingCriteriaList([until]),
            streamer=streamer,
            use_cache=True,
            **chosen,
        )
    return [_up_to_end(ids, stops) for ids in output_BT[:, longest:].tolist()]


def _up_to_end(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids, start=1) if token in stops), len(ids))
    return ids[:end]


def _of_like_length(longest_first: Sequence[tuple[int, int]], share: int) -> list[int]:
    """As many prompts, given by index and length, as make a batch of at most `share` times their tokens."""
    batch: list[int] = []
    tokens, longest = 0, longest_first[0][1]
    for index, length in longest_first:
        tokens += length
        if (len(batch) + 1) * longest > share * tokens:
            break
        batch.append(index)
    return batch


def _limit(model: nn.Module, used_tokens: int, settings: GenerationSettings) -> int:
    if used_tokens == 0:
        raise ConfigError("the prompt is empty", hint="a model answers to at least one token")
    room = context_room(model, used_tokens)
    if room < 1:
        raise ConfigError(
            f"the conversation has {used_tokens} tokens and the model's context is full", hint="start anew with /reset"
        )
    return min(settings.max_new_tokens, room)


def _does_not_fit(tokens: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"answering one prompt of {tokens} tokens does not fit the device's memory",
        hint="use a shorter one, or set CUDA_VISIBLE_DEVICES= to answer on the CPU",
    )


def context_room(model: nn.Module, used_tokens: int) -> int:
    """How many more tokens the model's context takes."""
    config: Any = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    return (context if isinstance(context, int) else 1 << 30) - used_tokens


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
