"""The base and the tuned model of a finished run, scored on the same rows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from laras.errors import OutOfMemoryError
from laras.evaluation.evaluator import Rows, evaluate_split
from laras.evaluation.metrics import ExampleSums, loss_improvement_ci95, score_of
from laras.models.device_memory import DeviceOutOfMemory, free_caches, with_fewer_rows
from laras.models.finished import FinishedModels
from laras.progress import Observer
from laras.records import SplitScore


@dataclass(frozen=True)
class Comparison:
    """Scores of both models, and the fall of the loss from base to tuned (nats a token) as a 95% interval."""

    base: SplitScore
    tuned: SplitScore
    loss_improvement_ci95: tuple[float, float]


def compare_models(
    models: FinishedModels, rows: Rows, *, batch_size: int, device: torch.device, seed: int, observer: Observer
) -> Comparison:
    """Scores both models on every row; where memory runs out, with fewer rows at a time, which changes no score.

    Args:
        models: The two, on `device`.
        rows: The tokenised test set.
        batch_size: Rows a forward pass, to begin with.
        device: Where to compute.
        seed: Of the bootstrap behind the intervals.
        observer: Is told what happens.

    Raises:
        OutOfMemoryError: One row alone does not fit the device.
    """
    sums = {}
    for name, model in (("base", models.base), ("tuned", models.tuned)):
        observer.stage_started(f"scoring the {name} model on the test set")
        with model() as scored:
            sums[name] = _sums(scored, rows, batch_size, models.tokenizer.pad_token_id, device, observer)
    base, tuned = sums["base"], sums["tuned"]
    return Comparison(
        score_of(base, seed=seed), score_of(tuned, seed=seed), loss_improvement_ci95(base, tuned, seed=seed)
    )


def _sums(
    model: nn.Module,
    rows: Rows,
    batch_size: int,
    pad_token_id: int | None,
    device: torch.device,
    observer: Observer,
) -> ExampleSums:
    def score(batch_rows: int) -> ExampleSums:
        return evaluate_split(
            model, rows, batch_size=batch_rows, pad_token_id=pad_token_id, device=device, observer=observer
        )

    def tell(old: int, new: int, why: str) -> None:
        observer.warning(f"memory ran out, {new} rows at a time instead of {old}, which changes no score: {why}")

    with suppress(DeviceOutOfMemory):
        return with_fewer_rows(score, batch_size, tell)
    free_caches()
    raise OutOfMemoryError(
        "the longest row of the test set does not fit the device's memory",
        hint="use a larger GPU, or set CUDA_VISIBLE_DEVICES= to score on the CPU",
    )
