"""What is predicted for published cases does not move unseen."""

import json
from pathlib import Path

import pytest

from laras.config import RunConfig
from laras.models.simulation import trace_step
from laras.planning.catalogue import find_gpu
from laras.planning.simulated import summary_of
from laras.records import PlanChoices

H100 = find_gpu("h100").to_hardware()
FIXTURE = Path(__file__).parents[1] / "fixtures/golden_predictions.jsonl"
GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "fixtures/golden_predictions.jsonl").open(encoding="utf-8")
]


def test_golden_predictions_cover_every_make():
    assert len(GOLDEN) >= 20
    assert len({row["config"]["model_type"] for row in GOLDEN}) >= 6


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["key"])
def test_a_published_case_is_predicted_as_before(row, tmp_path):
    """Where a change is meant to move them: `python benchmarks/memory.py golden`, and look at the difference."""
    (tmp_path / "config.json").write_text(json.dumps(row["config"]))
    layers = row["config"]["num_hidden_layers"]
    trace = trace_step(
        RunConfig(model_name_or_path=str(tmp_path)), PlanChoices(**row["choices"]), layers, H100, row["documents"]
    )
    assert summary_of(trace, layers) == row["predicted"]
