"""A model of an architecture that the planner has no table for is planned, trained and scored like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import laras
import tiny_models


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}),  # no sdpa, no rotations, names of its own
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),  # a layer that reaches over neighbours
    ],
)
def test_an_architecture_without_a_table_trains_and_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, sizes: dict[str, object]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tiny_models.base_model(model_type, tmp_path / "model", **sizes)
    rows = [{"prompt": f"what is {n}?", "completion": f"{word} {n * 7}"} for n in range(20) for word in ("sea", "sun")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = laras.train(
        model_name_or_path=str(base), dataset=str(tmp_path / "rows.jsonl"), max_steps=2, report_to=[],
        output_dir=str(tmp_path / "runs"), split={"near_duplicate_threshold": 1},
    )  # fmt: skip
    assert outcome.plan.choices.target_modules == ("all-linear",)
    assert outcome.plan.model.is_counted
    score = laras.test(outcome.run_dir)
    assert score.tuned.loss < score.base.loss
