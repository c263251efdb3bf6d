"""A sweep's folder as it stands after five trials, made from records: what its report and the tests of that read."""

from __future__ import annotations

import json
import math
from pathlib import Path

from example_run import write_example_run
from laras.records import EvalResult, Opening, RunResult, SplitManifest
from laras.sweep_record import SweepParameter, SweepRecord, SweepTrial, trial_dir

SPACE = (
    SweepParameter(name="learning_rate", kind="float", low=1e-5, high=1e-3, log=True),
    SweepParameter(name="lora_r", kind="choice", choices=(8, 16, 32)),
    SweepParameter(name="num_train_epochs", kind="int", low=1, high=3),
    SweepParameter(name="use_rslora", kind="choice", choices=(True, False)),
)
_TRIALS = (  # status, validation loss, learning rate, rank, epochs
    ("finished", 1.31, 2e-4, 16, 3),
    ("finished", 1.12, 6e-4, 32, 2),
    ("pruned", 1.48, 1e-5, 8, 1),
    ("failed", None, 9e-4, 32, 3),
    ("finished", 1.18, 4e-4, 8, 2),
)


def write_example_sweep(
    path: Path, *, ended: bool = True, evaluated: bool = False, hostile: str = "", unfinished: bool = False
) -> Path:
    """Writes record, split, trials with their metrics, and the ledger where the final model was scored."""
    trials = []
    for number, (status, loss, rate, rank, epochs) in enumerate(_TRIALS):
        run = trial_dir(path, number)
        finished = status == "finished"
        write_example_run(run, steps=24, seed=0, finished=finished, evaluated=False)
        lines = [
            json.dumps({"step": step, "epoch": 1, "time_s": 1.0, "eval_loss": (loss or 2) + math.exp(-step / 8)})
            for step in range(3, 25 if finished else 9, 3)
        ]
        (run / "logs" / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if finished:
            (run / "report.html").write_text("page", encoding="utf-8")
        trials.append(
            SweepTrial(
                number=number, status=status, eval_loss=loss, best_step=24 if finished else None, steps=24,
                values={"learning_rate": rate, "lora_r": rank, "num_train_epochs": epochs, "use_rslora": rank > 8},
                reason=f"above the median{hostile}" if status in ("pruned", "failed") else None, result_digest=None,
            )
        )  # fmt: skip
    if unfinished:
        trials = [trials[0].model_copy(update={"status": "running", "eval_loss": None, "best_step": None})]
    split = SplitManifest.load(trial_dir(path, 0))
    split.save(path)
    SweepRecord(
        parent_digest=split.digest(), config_digest="0", space=SPACE, seed=0, wanted_trials=5,
        status="finished" if ended else "running", trials=tuple(trials), best=None if unfinished else 1,
        final=1 if ended else None,
    ).save(path)  # fmt: skip
    if ended:
        (path / "laras.yaml").write_text(f"learning_rate: 0.0006  # {hostile}\n", encoding="utf-8")
    if evaluated:
        _score(trial_dir(path, 1), hostile)
    return path


def _score(final: Path, hostile: str) -> None:
    other = write_example_run(final.parent.parent / "scored", steps=24)
    evaluation = EvalResult.load(other)
    evaluation.model_copy(update={"parent_digest": RunResult.load(final).digest()}).save(final)
    ledger = final / "splits" / "sealed" / "openings.jsonl"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    opening = Opening(
        opened_at="2026-11-24T10:00:00+00:00", purpose=f"laras test{hostile}", max_samples=None, laras_version="0.1.0",
        validation_trials=5,
    )  # fmt: skip
    ledger.write_text(opening.model_dump_json() + "\n", encoding="utf-8")
