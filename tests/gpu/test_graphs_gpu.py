"""A captured step gives the eager step's losses and weights over several optimizer steps."""

from __future__ import annotations

import pytest
import torch

from laras.data.pack import PackCollator
from laras.models.graphs import GraphedStep
from laras.models.step import eager_step
from laras.progress import Observer

from .test_fused_gpu import documents, folder, step  # noqa: F401 - `folder` is a fixture

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
