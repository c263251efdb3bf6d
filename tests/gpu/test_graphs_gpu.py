"""A captured step gives the eager step's losses and weights over several optimizer steps."""

from __future__ import annotations

import pytest
import torch

import tiny_training as tiny
from laras.data.pack import PackCollator
from laras.models.build import build_model
from laras.models.graphs import GraphedStep, train_step
from laras.models.step import eager_step
from laras.progress import Observer

from .test_fused_gpu import documents, folder, step  # noqa: F401 - `folder` is a fixture

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kind", ["none", "full"])
def test_a_captured_step_trains_as_the_eager_one(folder, kind):  # noqa: F811
    batch = PackCollator(1536, 8, max_length=512, max_targets=1024)(documents())
    on_gpu = {key: value.cuda() for key, value in batch.items()}
    scale, results = torch.tensor(1e-3, device="cuda"), []
    for graphed in (False, True):
        model = step(folder, batch, gradient_checkpointing=kind != "none", checkpoint_kind=kind)[2]
        run = GraphedStep(model, Observer()) if graphed else eager_step(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
        for _ in range(6):
            optimizer.zero_grad(set_to_none=True)
            losses += [run(on_gpu, scale).item(), run(on_gpu, scale).item()]  # two micro-batches
            optimizer.step()
        if graphed:
            assert run.is_captured
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=2e-3)
    assert results[1][-1] < results[1][0]


@pytest.mark.parametrize("rehearse", [False, True])
def test_a_run_whose_step_is_replayed_learns_as_one_whose_step_is_issued(tmp_path, folder, rehearse):  # noqa: F811
    """Several micro-batches a step, validations between the steps, bins that are not full."""
    found = {}
    for graphed in (False, True):
        scenario = tiny.Scenario(
            micro=2, accumulation=2, train_rows=48, config={"num_train_epochs": 4, "model_name_or_path": folder},
            choices={
                "packing": True, "attention": "varlen", "precision": "bf16", "loss_kind": "chunked", "max_length": 64,
                "target_modules": ALL_LINEAR, "cuda_graph": graphed, "eval_steps": 2,
            },
        )  # fmt: skip
        plan = scenario.train_plan(folder)
        plan = plan.model_copy(update={"hardware": plan.hardware.model_copy(update={"kind": "cuda"})})
        model, made = build_model(scenario.run_config(), plan.choices, "cuda:0", Observer()), []

        def make_step(trained, choices=plan.choices, made=made):
            made.append(train_step(trained, choices, Observer()))
            return made[0]

        recorder = tiny.Recorder()
        result, _ = tiny.train(
            tmp_path / f"run-{graphed}", scenario, observer=recorder, plan=plan, model=model, make_step=make_step,
            rehearse=rehearse,
        )  # fmt: skip
        assert result.status == "finished"
        assert getattr(made[0], "is_captured", False) is graphed
        found[graphed] = [report.loss for report in recorder.steps] + [report.loss for report in recorder.validations]
    assert found[True] == pytest.approx(found[False], rel=1e-2)
    assert found[True][-1] < found[True][0]


def test_a_graph_that_gives_back_its_memory_is_captured_again_at_the_shapes_that_come_then(folder):  # noqa: F811
    model = step(folder, PackCollator(1536, 8, max_length=512, max_targets=1024)(documents()))[2]
    run, scale = GraphedStep(model, Observer()), torch.tensor(1e-3, device="cuda")
    for budget in (1536, 1280):
        batch = PackCollator(budget, 8, max_length=512, max_targets=1024)(documents())
        on_gpu = {key: value.cuda() for key, value in batch.items()}
        expected = eager_step(model)(on_gpu, scale).item()
        assert [run(on_gpu, scale).item() for _ in range(4)] == pytest.approx([expected] * 4, rel=2e-3)
        assert run.is_captured
        held = torch.cuda.memory_reserved()
        model.zero_grad()
        run.release()
        torch.cuda.empty_cache()
        assert not run.is_captured and torch.cuda.memory_reserved() < held
