"""Answers of the base beside those of the tuned model, to prompts of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from laras.data.store import prompt_length
from laras.evaluation.evaluator import Rows
from laras.evaluation.generate import GenerationSettings, answer_prompts, context_room
from laras.progress import Observer
from laras.records import Sample

# A prompt of plain text, where every token is learnt: so much of the row is shown, the rest is the reference.
_PLAIN_PROMPT_SHARE, _PLAIN_PROMPT_TOKENS = 0.25, 48


def generate_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    count: int,
    seed: int,
    max_new_tokens: int,
    *,
    base: Callable[[], AbstractContextManager[nn.Module]] | None = None,
    observer: Observer | None = None,
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
        observer: Is told how many answers have ended.

    Raises:
        OutOfMemoryError: When one answer alone does not fit the device.
    """
    observer = observer or Observer()
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=0.0)
    base = base or getattr(model, "disable_adapter", None)
    drawn = _draw(model, rows, count, seed, max_new_tokens)
    prompts = [row_ids[:start] for _, row_ids, start in drawn]
    done, total = 0, len(prompts) * (1 if base is None else 2)

    def answer(answering: nn.Module) -> list[str]:
        nonlocal done
        before = done
        answers = answer_prompts(
            answering,
            tokenizer,
            prompts,
            settings,
            lambda ended: observer.stage_progress(before + ended, total, "answers"),
            lambda old, new, why: observer.warning(f"memory ran out, {new} answers at a time instead of {old}: {why}"),
        )
        done = before + len(answers)
        return [answer.text for answer in answers]

    base_texts: Sequence[str | None] = [None] * len(prompts)
    if base is not None:
        with base() as other:
            base_texts = answer(other if isinstance(other, nn.Module) else model)
    tuned_texts = answer(model)
    return [
        Sample(
            row=row,
            prompt=str(tokenizer.decode(ids[:start])),
            reference=str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip(),
            base=base_text,
            tuned=tuned_text,
        )
        for (row, ids, start), base_text, tuned_text in zip(drawn, base_texts, tuned_texts, strict=True)
    ]


def _draw(model: nn.Module, rows: Rows, count: int, seed: int, max_new_tokens: int) -> list[tuple[int, list[int], int]]:
    """Index in the source, tokens, and length of the prompt of each row to answer."""
    drawn: list[tuple[int, list[int], int]] = []
    for index in np.random.default_rng(seed).permutation(len(rows)):
        if len(drawn) == count:
            break
        row = rows[int(index)]
        start = _prompt_length(row["labels"])
        if start > 0 and context_room(model, start) >= max_new_tokens:
            drawn.append((int(row.get("row", index)), list(row["input_ids"]), start))
    return drawn


def _prompt_length(labels: Sequence[int]) -> int:
    """Tokens before the first target; of plain text, where all are targets, a share of the row."""
    first = prompt_length(labels)
    if first == len(labels):
        return 0
    return first if first > 1 else min(_PLAIN_PROMPT_TOKENS, int(len(labels) * _PLAIN_PROMPT_SHARE))
