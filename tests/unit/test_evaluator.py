"""The score of a split is one number, however it is computed."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from laras.evaluation.evaluator import evaluate_split
from laras.evaluation.metrics import score_of
from laras.progress import Observer

CPU = torch.device("cpu")


def tiny_model(dropout=0.0):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            max_position_embeddings=64,
            attention_dropout=dropout,
        )
    )


def some_rows(count=13):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = rng.integers(0, 128, rng.integers(2, 40)).tolist()
        prompt = int(rng.integers(0, len(ids) - 1))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    rows.insert(4, {"input_ids": [5, 6, 7], "labels": [-100] * 3})
    rows.append({"input_ids": [5, 6], "labels": [5, -100]})  # a first token is never a target
    return rows


def evaluate(model, rows, batch_size=4, observer=None):
    return evaluate_split(
        model, rows, batch_size=batch_size, pad_token_id=None, device=CPU, observer=observer or Observer()
    )


@torch.no_grad()
def token_by_token(model, row):
    """Feeds every prefix alone: no batch, no padding, no shift to get wrong."""
    nll = targets = correct = 0
    for position in range(1, len(row["input_ids"])):
        label = row["labels"][position]
        if label != -100:
            logits = model(torch.tensor([row["input_ids"][:position]])).logits[0, -1].double()
            nll += (logits.logsumexp(0) - logits[label]).item()
            targets += 1
            correct += int(logits.argmax().item() == label)
    return nll, targets, correct


def test_sums_equal_an_independent_token_by_token_computation():
    model, rows = tiny_model().eval(), some_rows()
    sums = evaluate(model, rows)
    expected = np.array([token_by_token(model, row) for row in rows]).T
    np.testing.assert_allclose(sums.nll, expected[0], atol=2e-5)
    np.testing.assert_array_equal(sums.targets, expected[1])
    np.testing.assert_array_equal(sums.correct, expected[2])
    assert score_of(sums).loss == pytest.approx(expected[0].sum() / expected[1].sum(), abs=1e-6)


@pytest.mark.parametrize("batch_size", [2, 8, 100])
def test_every_batch_size_gives_the_same_score(batch_size):
    model, rows = tiny_model(), some_rows()
    one, many = score_of(evaluate(model, rows, 1)), score_of(evaluate(model, rows, batch_size))
    assert many.loss == pytest.approx(one.loss, abs=1e-6)
    assert (many.token_accuracy, many.target_tokens) == (one.token_accuracy, one.target_tokens)


def test_rows_without_targets_are_examples_without_tokens():
    rows = some_rows()
    sums = evaluate(tiny_model(), rows)
    assert np.flatnonzero(sums.targets == 0).tolist() == [4, len(rows) - 1]
    assert sums.nll[4] == 0
    score = score_of(sums)
    assert score.examples == len(rows)
    assert score.target_tokens == sum(label != -100 for row in rows for label in row["labels"][1:])


def test_a_split_of_rows_without_targets_runs_no_model():
    sums = evaluate(torch.nn.Identity(), [{"input_ids": [1, 2], "labels": [-100, -100]}])
    assert sums.targets.tolist() == [0]


def test_modes_are_restored_and_dropout_is_off_meanwhile():
    model, rows = tiny_model(dropout=0.5).train(), some_rows()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    first, second = evaluate(model, rows), evaluate(model, rows)
    assert [module.training for module in model.modules()] == before
    assert first.nll.tolist() == second.nll.tolist()


def test_modes_are_restored_when_scoring_fails():
    model = tiny_model().train()
    with pytest.raises(IndexError):
        evaluate(model, [{"input_ids": [1, 999], "labels": [1, 999]}])
    assert all(module.training for module in model.modules())


def test_the_observer_sees_every_scored_row():
    class Recorder(Observer):
        def __init__(self):
            self.seen = []

        def stage_progress(self, done, total, unit):
            self.seen.append((done, total, unit))

    recorder = Recorder()
    evaluate(tiny_model(), some_rows(5), 2, recorder)
    assert recorder.seen == [(2, 5, "rows"), (4, 5, "rows"), (5, 5, "rows")]


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(tiny_model(), [], 0)


def score_in_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    sums = evaluate(tiny_model(), some_rows())
    np.save(f"{folder}/{rank}.npy", np.stack([sums.nll, sums.targets, sums.correct]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_return_the_sums_of_one(tmp_path):
    mp.spawn(score_in_process, args=(str(tmp_path),), nprocs=2)
    sums = evaluate(tiny_model(), some_rows())
    expected = np.stack([sums.nll, sums.targets, sums.correct])
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected, atol=1e-5)
