"""For cards without bf16: layers in fp16, adapters in fp32, a scaled loss; a few steps learn, overflow is survived."""

from __future__ import annotations

import json
import math

import pytest
import torch

from laras.data.collate import PadCollator
from laras.models.build import build_model
from laras.models.step import eager_step
from laras.progress import Observer

from .test_fused_gpu import documents, folder, step  # noqa: F401 - `folder` is a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_layers_are_in_fp16_adapters_in_fp32_and_nothing_is_fused(folder):  # noqa: F811
    model = step(folder, PadCollator(0)(documents()), packing=False, precision="fp16")[2]
    assert model.laras_path.fused is None
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    assert {one.dtype for one in model.parameters() if not one.requires_grad} == {torch.float16}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_scaled_loss_learns_and_agrees_with_bf16(folder, checkpointed):  # noqa: F811
    batch = {key: value.cuda() for key, value in PadCollator(0)(documents()).items()}
    targets, curves = (batch["labels"][:, 1:] != -100).sum(), {}
    for precision in ("fp16", "bf16"):
        options = {"packing": False, "fused_layers": False, "gradient_checkpointing": checkpointed}
        model = step(folder, PadCollator(0)(documents()), precision=precision, **options)[2]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, run = torch.optim.AdamW(trained, lr=1e-3), eager_step(model)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**32, enabled=precision == "fp16")  # too high at first
        losses = []
        for _ in range(30):
            optimizer.zero_grad(set_to_none=True)
            losses.append((run(batch, scaler.scale(1.0 / targets)) / targets).item())
            scaler.step(optimizer)
            scaler.update()
        curves[precision] = losses
        assert precision == "bf16" or scaler.get_scale() < 2.0**32
    assert all(map(math.isfinite, curves["fp16"]))
    assert curves["fp16"][0] == pytest.approx(curves["bf16"][0], rel=1e-2)
    assert curves["fp16"][-1] < 0.95 * curves["fp16"][0]


def test_the_trainer_scales_and_keeps_the_scale_in_the_checkpoint(tmp_path):
    pytest.importorskip("trl")
    from tiny_training import Recorder, Scenario, save_base, train

    base = save_base(tmp_path / "base")
    scenario = Scenario(
        config={"num_train_epochs": 10, "model_name_or_path": str(base)},
        choices={"precision": "fp16", "target_modules": ALL_LINEAR},
    )
    plan = scenario.train_plan(str(base))
    plan = plan.model_copy(update={"hardware": plan.hardware.model_copy(update={"kind": "cuda"})})
    model = build_model(scenario.run_config(), plan.choices, "cuda:0", Observer())
    recorder = Recorder()
    result, _ = train(tmp_path / "run", scenario, observer=recorder, plan=plan, model=model)
    losses = [report.loss for report in recorder.steps]
    assert result.status == "finished"
    assert sum(losses[-3:]) < sum(losses[:3])
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
    assert json.loads((newest / "training.json").read_text())["scaler"]["scale"] > 1
