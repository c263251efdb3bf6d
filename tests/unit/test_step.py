"""The shared step gives the loss of the definition: shifted by one, over target tokens, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from laras.data.masks import IGNORE_INDEX
from laras.models.step import EVALUATION_CHUNK, model_inputs, shifted_labels, summed_loss, target_losses


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def row(length: int, prompt: int, seed: int) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 40, (1, length), generator=torch.Generator().manual_seed(seed))
    labels = input_ids.clone()
    labels[:, :prompt] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


def padded(rows: list[dict[str, torch.Tensor]], length: int) -> dict[str, torch.Tensor]:
    def fill(key: str, value: int) -> torch.Tensor:
        pads = [torch.nn.functional.pad(one[key], (0, length - one[key].shape[1]), value=value) for one in rows]
        return torch.cat(pads)

    mask = torch.stack([(torch.arange(length) < one["input_ids"].shape[1]).long() for one in rows])
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", IGNORE_INDEX), "attention_mask": mask}


ROWS = [row(11, 4, 1), row(16, 0, 2), row(5, 4, 3)]


@pytest.mark.parametrize("one", ROWS)
def test_the_loss_is_the_one_of_transformers(model, one):
    losses = target_losses(model, one)
    torch.testing.assert_close(losses.nll_N.mean(), model(**one).loss, rtol=1e-6, atol=1e-6)


def test_a_padded_batch_equals_its_rows(model):
    together = target_losses(model, padded(ROWS, 16))
    alone = [target_losses(model, one) for one in ROWS]
    torch.testing.assert_close(together.nll_N, torch.cat([one.nll_N for one in alone]), rtol=1e-5, atol=1e-5)
    assert torch.equal(together.correct_N, torch.cat([one.correct_N for one in alone]))
    # The first token of a row that is all target has nothing before it to be predicted from.
    assert torch.bincount(together.row_N).tolist() == [7, 15, 1]


def test_correct_means_the_label_is_the_most_likely_token(model):
    (input_ids,) = (ROWS[1]["input_ids"],)
    with torch.no_grad():
        likely = model(input_ids).logits.argmax(-1)
    labels = torch.cat([input_ids[:, :1], likely[:, :-1]], dim=1)
    assert target_losses(model, {"input_ids": input_ids, "labels": labels}).correct_N.all()


def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients(model):
    def gradient(batches):
        model.zero_grad()
        for batch in batches:
            summed_loss(model, batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.testing.assert_close(gradient([padded(ROWS, 16)]), gradient(ROWS), rtol=1e-4, atol=1e-5)


def test_scoring_holds_logits_of_a_thousand_tokens_at_most(model):
    batch = padded([row(48, 0, seed) for seed in range(50)], 48)  # 2,350 targets
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(len(logits)))
    try:
        with torch.inference_mode():
            losses = target_losses(model, batch)
    finally:
        hook.remove()
    assert sum(seen) == len(losses.nll_N) == 50 * 47
    assert max(seen) <= EVALUATION_CHUNK


def test_labels_move_one_to_the_left():
    assert shifted_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORE_INDEX]]


def test_labels_do_not_reach_the_forward():
    assert set(model_inputs(padded(ROWS, 16))) == {"input_ids", "attention_mask"}
