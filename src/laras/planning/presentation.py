"""A plan as programs read it; field names are stable."""

from __future__ import annotations

from typing import Any

from laras.records import TrainPlan


def plan_json(plan: TrainPlan) -> dict[str, Any]:
    """What `laras plan --json` prints (docs: "What programs can rely on")."""
    memory = plan.memory.model_dump(mode="json")
    return {
        "gpu": plan.hardware.gpu_name,
        "fits": plan.fits,
        "choices": plan.choices.model_dump(mode="json"),
        "reasons": dict(plan.reasons),
        "memory": memory,
        "time": {"tokens_per_s": plan.time.tokens_per_s, "steps": plan.time.steps, "total_s": plan.time.total_s},
        "alternatives": [one.model_dump(mode="json") for one in plan.alternatives],
        "remedies": list(plan.remedies),
        "warnings": list(plan.warnings),
        "model": plan.model.model_dump(mode="json"),
        "hardware": plan.hardware.model_dump(mode="json"),
    }
