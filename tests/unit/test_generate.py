"""Answers end where they should, batches change none of them, Ctrl-C ends an answer and nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from laras.errors import ConfigError, OutOfMemoryError
from laras.evaluation import generate
from laras.evaluation.generate import GenerationSettings, answer_prompts, prompt_ids, stop_token_ids, stream_answer

GREEDY = GenerationSettings(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models.tuned_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def words():
    return tiny_models.tokenizer()


def test_the_stream_is_what_the_model_generates(models, words):
    ids = prompt_ids(words, [{"role": "user", "content": "sea"}])
    assert words.decode(ids) == "<|im_start|>user\nsea<|im_end|>\n<|im_start|>assistant\n"
    pieces = []
    answer = stream_answer(models, words, ids, GREEDY, pieces.append)
    with torch.inference_mode():
        expected = models.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )
    text = words.decode(expected[0, len(ids) :], skip_special_tokens=True)
    assert "".join(pieces) == text
    assert answer.text == text.strip()


def test_an_answer_ends_at_every_token_that_ends_a_turn(models, words, monkeypatch):
    ids = prompt_ids(words, [{"role": "user", "content": "sea"}])
    first = models.generate(input_ids=torch.tensor([ids]), max_new_tokens=1, do_sample=False)[0, -1].item()
    monkeypatch.setattr(models.generation_config, "eos_token_id", [1, first])
    answer = stream_answer(models, words, ids, GREEDY)
    assert (answer.tokens, answer.stopped) == (1, "end")
    assert {1, first, words.eos_token_id} <= set(stop_token_ids(models, words))


def test_the_end_of_a_turn_is_found_in_the_template(models, monkeypatch):
    other = tiny_models.tokenizer()
    other.eos_token = "<|endoftext|>"
    monkeypatch.setattr(models.generation_config, "eos_token_id", None)
    assert set(stop_token_ids(models, other)) == {other.eos_token_id, other.convert_tokens_to_ids("<|im_end|>")}
    other.chat_template = "{{ raise_exception('no') }}"
    assert stop_token_ids(models, other) == [other.eos_token_id]
    other.chat_template = None
    assert stop_token_ids(models, other) == [other.eos_token_id]
    assert prompt_ids(other, [{"role": "user", "content": "sea"}]) == other("sea")["input_ids"]


def test_sampling_follows_its_seed(models, words):
    ids = prompt_ids(words, [{"role": "user", "content": "sun"}])
    ask = lambda seed: stream_answer(models, words, ids, GenerationSettings(12, 5.0, 1.0, seed)).text  # noqa: E731
    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def prompts_of(words, *texts):
    return [prompt_ids(words, [{"role": "user", "content": text}]) for text in texts]


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {}), ("gemma2", {}), ("qwen3", {}),
        ("recurrent_gemma", {"lru_width": 64, "num_hidden_layers": 3}),  # padding is in its state
    ],
)  # fmt: skip
def test_answers_in_batches_are_those_of_one_by_one(tmp_path, words, family, changed):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.base_model(family, tmp_path, **changed)).eval()
    model.generation_config.repetition_penalty = 1.3  # it looks at padding, too
    prompts = prompts_of(words, "sea", "what is salt and what does it do", "a tree " * 9, "sun", "number 7")
    together = answer_prompts(model, words, prompts, GREEDY)
    assert together == [stream_answer(model, words, ids, GREEDY) for ids in prompts]
    assert len({answer.text for answer in together}) > 1


def test_an_answer_of_a_batch_ends_at_its_own_end(models, words, monkeypatch):
    prompts = prompts_of(words, "sea", "what does salt do")
    said = [
        models.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    end = next(token for token in said[0] if token not in said[1])
    monkeypatch.setattr(models.generation_config, "eos_token_id", [1, end])
    ended = []
    first, second = answer_prompts(models, words, prompts, GREEDY, ended.append)
    assert (first.tokens, first.stopped) == (said[0].index(end) + 1, "end")
    assert (second.tokens, second.stopped) == (12, "length")
    assert [first, second] == [stream_answer(models, words, ids, GREEDY) for ids in prompts]
    assert ended == [1, 2]


def test_prompts_of_unlike_length_do_not_pad_each_other(models, words, monkeypatch):
    shapes = []
    real = models.generate
    monkeypatch.setattr(models, "generate", lambda **given: shapes.append(given["input_ids"].shape) or real(**given))
    prompts = [[5] * 9, [5] * 200, [6] * 8, [7] * 10, [8] * 190, [9] * 12]
    assert all(answer.tokens for answer in answer_prompts(models, words, prompts, GREEDY))
    assert [tuple(shape) for shape in shapes] == [(4, 200), (2, 9)]  # at least half of a batch are prompts
    assert answer_prompts(models, words, [], GREEDY) == []


def test_memory_that_runs_out_makes_batches_smaller_and_changes_no_answer(models, words, monkeypatch):
    prompts = prompts_of(words, "sea", "what is salt", "a tree", "sun")
    expected = answer_prompts(models, words, prompts, GREEDY)
    real, fitting = models.generate, 2

    def short_of_memory(**given):
        if len(given["input_ids"]) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore words")
        return real(**given)

    monkeypatch.setattr(models, "generate", short_of_memory)
    told = []
    assert answer_prompts(models, words, prompts, GREEDY, on_smaller=lambda *what: told.append(what)) == expected
    assert told == [(4, 2, "CUDA out of memory. Tried to allocate 2.00 GiB")]
    fitting = 0
    for ask in (lambda: answer_prompts(models, words, prompts, GREEDY),
                lambda: stream_answer(models, words, prompts[1], GREEDY)):  # fmt: skip
        with pytest.raises(OutOfMemoryError, match=f"prompt of {len(prompts[1])} tokens"):
            ask()


def test_an_empty_prompt_is_a_clear_error(models, words):
    with pytest.raises(ConfigError, match="empty"):
        stream_answer(models, words, [], GREEDY)


def test_a_full_context_is_a_clear_error(models, words):
    with pytest.raises(ConfigError, match="context is full"):
        stream_answer(models, words, [5] * 256, GREEDY)


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(models, words, monkeypatch):
    real = generate.TextIteratorStreamer

    class Interrupted(real):
        count = 0

        def __next__(self):
            piece = super().__next__()
            Interrupted.count += 1
            if Interrupted.count == 2:
                raise KeyboardInterrupt
            return piece

    before = threading.active_count()
    monkeypatch.setattr(generate, "TextIteratorStreamer", Interrupted)
    monkeypatch.setattr(generate, "stop_token_ids", lambda model, tokenizer: [])
    ids = prompt_ids(words, [{"role": "user", "content": "sea"}])
    answer = stream_answer(models, words, ids, GenerationSettings(200, 0.0))
    assert answer.stopped == "interrupted"
    assert 0 < answer.tokens <= 200
    assert threading.active_count() <= before


def test_an_error_of_the_model_reaches_the_caller(models, words):
    with pytest.raises(IndexError):
        stream_answer(models, words, [10_000], GREEDY)
