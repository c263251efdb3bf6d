"""Answers end where they should, samples pair base and tuned model, Ctrl-C ends an answer and nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny_models
from laras.errors import ConfigError
from laras.evaluation import generate
from laras.evaluation.generate import GenerationSettings, generate_samples, prompt_ids, stop_token_ids, stream_answer

GREEDY = GenerationSettings(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = tiny_models.base_model("llama", folder / "base")
    run = tiny_models.finished_run(folder / "run", base)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "final").eval()


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


def test_samples_pair_what_base_and_tuned_model_answer(models, words):
    prompt = prompt_ids(words, [{"role": "user", "content": "salt"}])
    answer = words("a tree")["input_ids"]
    chat = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "row": 7}
    plain = {"input_ids": words(tiny_models.TEXT[0])["input_ids"], "labels": words(tiny_models.TEXT[0])["input_ids"]}
    empty = {"input_ids": answer, "labels": [-100] * len(answer)}
    too_long = {"input_ids": [5] * 300, "labels": [-100] * 299 + [5]}
    samples = generate_samples(models, words, [chat, plain, empty, too_long], 4, seed=0, max_new_tokens=8)
    assert samples == generate_samples(models, words, [chat, plain, empty, too_long], 4, seed=0, max_new_tokens=8)
    assert {sample.row for sample in samples} == {7, 1}
    found = next(sample for sample in samples if sample.row == 7)
    assert (found.prompt, found.reference) == (words.decode(prompt), "a tree")
    settings = GenerationSettings(8, 0.0)
    assert found.tuned == stream_answer(models, words, prompt, settings).text
    with models.disable_adapter():
        assert found.base == stream_answer(models, words, prompt, settings).text
    assert found.base != found.tuned
    assert len(generate_samples(models, words, [chat, plain], 1, seed=0, max_new_tokens=8)) == 1


def test_whole_weights_are_paired_with_a_base_that_is_given_or_with_none(models, words):
    from contextlib import nullcontext

    whole = models.get_base_model()
    row = {"input_ids": words(tiny_models.TEXT[1])["input_ids"], "labels": words(tiny_models.TEXT[1])["input_ids"]}
    assert generate_samples(whole, words, [row], 1, seed=0, max_new_tokens=4)[0].base is None
    given = generate_samples(whole, words, [row], 1, seed=0, max_new_tokens=4, base=lambda: nullcontext(whole))
    assert given[0].base == given[0].tuned


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
