"""Scores are exact, and a function of the set of examples alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laras.errors import DataError
from laras.evaluation.metrics import ExampleSums, loss_improvement_ci95, perplexity_of, score_of

TOKENS = st.lists(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=6), min_size=1, max_size=12).filter(any)


def sums_of(examples):
    return ExampleSums(
        np.array([sum(nll for nll, _ in tokens) for tokens in examples], dtype=np.float64),
        np.array([len(tokens) for tokens in examples], dtype=np.int64),
        np.array([sum(correct for _, correct in tokens) for tokens in examples], dtype=np.int64),
    )


@settings(max_examples=25, deadline=None)
@given(TOKENS)
def test_score_equals_a_direct_computation_over_all_tokens(examples):
    tokens = [token for example in examples for token in example]
    loss = math.fsum(nll for nll, _ in tokens) / len(tokens)
    score = score_of(sums_of(examples))
    assert score.loss == pytest.approx(loss, abs=1e-9)
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-9)
    assert score.token_accuracy == pytest.approx(sum(correct for _, correct in tokens) / len(tokens))
    assert (score.target_tokens, score.examples) == (len(tokens), len(examples))


@settings(max_examples=25, deadline=None)
@given(TOKENS, st.randoms())
def test_order_of_examples_changes_nothing(examples, random):
    shuffled = list(examples)
    random.shuffle(shuffled)
    assert score_of(sums_of(shuffled)) == score_of(sums_of(examples))


@settings(max_examples=15, deadline=None)
@given(TOKENS, st.randoms())
def test_order_of_pairs_does_not_change_the_paired_interval(examples, random):
    base = sums_of(examples)
    tuned = ExampleSums(base.nll * 0.5, base.targets, base.correct)
    order = list(range(len(examples)))
    random.shuffle(order)
    reordered = [ExampleSums(s.nll[order], s.targets[order], s.correct[order]) for s in (base, tuned)]
    assert loss_improvement_ci95(*reordered) == loss_improvement_ci95(base, tuned)


def test_the_loss_weighs_tokens_not_examples():
    score = score_of(sums_of([[(4.0, False)], [(0.0, True)] * 3]))
    assert (score.loss, score.token_accuracy) == (1.0, 0.75)


def test_examples_without_targets_are_counted_but_move_no_interval():
    full = [[(1.0, True)], [(3.0, False), (2.0, True)], [(0.5, True)]]
    with_empty = score_of(sums_of([*full, [], []]))
    assert with_empty.examples == 5
    assert with_empty.model_copy(update={"examples": 3}) == score_of(sums_of(full))


def test_the_interval_covers_the_true_loss_about_95_times_in_100():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(100):
        targets = rng.integers(1, 20, 150)
        sums = ExampleSums(rng.gamma(targets * 2.0, 1.0), targets, np.zeros_like(targets))
        low, high = score_of(sums).loss_ci95
        covered += low <= 2.0 <= high
    assert 88 <= covered <= 100


def test_pairing_finds_an_improvement_that_separate_intervals_hide():
    rng = np.random.default_rng(3)
    targets = rng.integers(5, 50, 80)
    base = ExampleSums(rng.gamma(2.0, 1.0, 80) * targets, targets, np.zeros_like(targets))
    tuned = ExampleSums(base.nll - 0.1 * targets, targets, np.zeros_like(targets))
    low, high = loss_improvement_ci95(base, tuned)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    assert score_of(tuned).loss_ci95[1] > score_of(base).loss_ci95[0]


def test_equal_seeds_repeat_and_other_seeds_differ():
    rng = np.random.default_rng(1)
    targets = np.full(30, 4)
    sums = ExampleSums(rng.gamma(2.0, 1.0, 30), targets, targets)
    assert score_of(sums, seed=5) == score_of(sums, seed=5)
    assert score_of(sums, seed=5).loss_ci95 != score_of(sums, seed=6).loss_ci95


def test_a_split_without_targets_is_an_error_not_a_zero():
    with pytest.raises(DataError, match="no target tokens in its 2 examples"):
        score_of(ExampleSums.zeros(2))
    with pytest.raises(DataError):
        loss_improvement_ci95(ExampleSums.zeros(2), ExampleSums.zeros(2))


def test_sums_of_different_examples_are_refused():
    with pytest.raises(ValueError, match="different examples"):
        loss_improvement_ci95(sums_of([[(1.0, True)]]), sums_of([[(1.0, True)] * 2]))
    with pytest.raises(ValueError, match="one length"):
        ExampleSums(np.zeros(2), np.zeros(1, dtype=np.int64), np.zeros(2, dtype=np.int64))


def test_a_diverged_loss_gives_infinite_perplexity():
    assert perplexity_of(1000.0) == math.inf
    assert perplexity_of(0.0) == 1.0
