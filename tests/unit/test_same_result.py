"""A short real run learns the same on every fast path: its validation loss is within 1% of the plain padded path's."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from laras.data.collate import PadCollator
from laras.data.pack import PackCollator
from laras.models.build import build_model
from laras.models.step import eager_step, target_losses
from laras.progress import Observer
from tiny_training import Recorder, Scenario, save_base, train

STEPS, DOCUMENTS = 40, 16  # of a step
CHOICES = {
    "max_length": 32, "target_modules": ("all-linear",), "lora_r": 8, "loss_kind": "chunked", "mlp_chunk_tokens": 64,
    "loss_chunk_tokens": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Knows other walks than those that the runs teach it."""
    folder = save_base(tmp_path_factory.mktemp("base") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=1e-2), documents(STEPS * DOCUMENTS, 0, follows=11)
    for number in range(STEPS):
        batch = PadCollator(0)(rows[number * DOCUMENTS : (number + 1) * DOCUMENTS])
        optimizer.zero_grad()
        target_losses(model, batch).nll_N.mean().backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def documents(count, seed, follows=7):
    """Walks in which each token decides the next."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 28, (), generator=generator))
        ids = [10 + int(torch.randint(0, 54, (), generator=generator))]
        while len(ids) < length:
            ids.append(10 + (follows * (ids[-1] - 10) + 5) % 54)
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return made


def scenario(**changes):
    return Scenario(DOCUMENTS, 1, choices={**CHOICES, "learning_rate": 1e-2, **changes})


def built(base, **changes):
    plan = scenario(**changes).train_plan(str(base))
    config = Scenario(config={"model_name_or_path": str(base)}).run_config()
    return build_model(config, plan.choices, "cpu", Observer())


def validation_loss(model):
    model.eval()
    with torch.no_grad():
        loss = target_losses(model, PadCollator(0)(documents(64, 99))).nll_N.mean().item()
    model.train()
    return loss


def trained(base, packing, **changes):
    """The same documents in the same steps, whatever the shape of their batch."""
    model = built(base, packing=packing, **changes)
    collate = PackCollator(640, DOCUMENTS + 20, 32, 640) if packing else PadCollator(0)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    step, rows = eager_step(model), documents(STEPS * DOCUMENTS, 1)
    for number in range(STEPS):
        batch = collate(rows[number * DOCUMENTS : (number + 1) * DOCUMENTS])
        optimizer.zero_grad()
        step(batch, 1.0 / (batch["labels"] != -100).sum())
        optimizer.step()
    return validation_loss(model), model


@pytest.fixture(scope="module")
def plain(base):
    before = validation_loss(built(base, fused_layers=False, loss_kind="full"))
    after, model = trained(base, False, fused_layers=False, loss_kind="full")
    assert model.laras_path.fused is None
    assert after < 0.5 * before  # it has learnt
    return after


@pytest.mark.parametrize(("kind", "packing"), [("none", False), ("selective", True), ("full", True)])
def test_fused_layers_learn_what_the_plain_padded_path_learns(base, plain, kind, packing):
    found, model = trained(base, packing, gradient_checkpointing=kind != "none", checkpoint_kind=kind)
    assert model.laras_path.fused is not None
    assert found == pytest.approx(plain, rel=0.01)


def test_a_whole_run_of_the_trainer_ends_where_the_plain_one_ends(base, tmp_path):
    ends = {}
    for name, changes in (
        ("plain", {"fused_layers": False, "loss_kind": "full"}),
        ("fused", {"gradient_checkpointing": True, "checkpoint_kind": "full"}),
    ):
        run = scenario(eval_steps=8, save_steps=8, **changes)
        model = built(base, **changes)
        assert (model.laras_path.fused is not None) == (name == "fused")
        recorder = Recorder()
        options = {
            "model": model,
            "train_rows": Dataset.from_list(documents(24 * DOCUMENTS, 1)),
            "validation_rows": Dataset.from_list(documents(32, 99)),
        }
        result, _ = train(tmp_path / name, run, observer=recorder, **options)
        assert result.status == "finished"
        ends[name] = [report.loss for report in recorder.validations]
    assert ends["fused"][-1] == pytest.approx(ends["plain"][-1], rel=0.01)
    assert ends["plain"][-1] < 0.9 * ends["plain"][0]
