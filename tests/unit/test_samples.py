"""Samples pair what base and tuned model answer; both are scored on the same rows, whatever the memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import tiny_models
from laras.errors import OutOfMemoryError
from laras.evaluation import comparison
from laras.evaluation.comparison import compare_models
from laras.evaluation.generate import GenerationSettings, prompt_ids, stream_answer
from laras.evaluation.samples import generate_samples
from laras.models.finished import FinishedModels
from laras.progress import Observer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models.tuned_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def words():
    return tiny_models.tokenizer()


class Watcher(Observer):
    def __init__(self):
        self.progress, self.warnings = [], []

    def stage_progress(self, done, total, unit):
        self.progress.append((done, total, unit))

    def warning(self, text):
        self.warnings.append(text)


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
    whole = models.get_base_model()
    row = {"input_ids": words(tiny_models.TEXT[1])["input_ids"], "labels": words(tiny_models.TEXT[1])["input_ids"]}
    assert generate_samples(whole, words, [row], 1, seed=0, max_new_tokens=4)[0].base is None
    given = generate_samples(whole, words, [row], 1, seed=0, max_new_tokens=4, base=lambda: nullcontext(whole))
    assert given[0].base == given[0].tuned


def test_whoever_watches_sees_how_many_answers_have_ended(models, words):
    rows = [{"input_ids": words(text)["input_ids"], "labels": words(text)["input_ids"]} for text in tiny_models.TEXT]
    watcher = Watcher()
    generate_samples(models, words, rows, 4, seed=0, max_new_tokens=4, observer=watcher)
    done = [number for number, total, unit in watcher.progress if (total, unit) == (8, "answers")]
    assert len(done) == len(watcher.progress) and done == sorted(done) and 4 in done and done[-1] == 8


def test_memory_that_runs_out_while_scoring_changes_no_score(models, words, monkeypatch):
    rows = [{"input_ids": words(text)["input_ids"], "labels": words(text)["input_ids"]} for text in tiny_models.TEXT]
    pair = FinishedModels(words, models, None)
    scored = lambda watcher: compare_models(  # noqa: E731
        pair, rows, batch_size=4, device=torch.device("cpu"), seed=0, observer=watcher
    )
    expected = scored(Observer())
    assert expected.base.loss != expected.tuned.loss and expected.base.examples == 4
    real, fitting = comparison.evaluate_split, 1

    def short_of_memory(model, rows, *, batch_size, **given):
        if batch_size > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, rows, batch_size=batch_size, **given)

    monkeypatch.setattr(comparison, "evaluate_split", short_of_memory)
    watcher = Watcher()
    found = scored(watcher)
    assert found.tuned.loss == pytest.approx(expected.tuned.loss, rel=1e-6)
    assert found.base.token_accuracy == expected.base.token_accuracy
    assert len(watcher.warnings) == 4 and "2 rows at a time instead of 4" in watcher.warnings[0]
    fitting = 0
    with pytest.raises(OutOfMemoryError, match="test set"):
        scored(Observer())
