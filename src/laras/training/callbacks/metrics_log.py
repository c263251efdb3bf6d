"""`logs/metrics.jsonl`: every metric of a run, one JSON object a line, whatever other trackers do."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from laras.progress import Observer
from laras.record_base import write_atomically


class MetricsLog(TrainerCallback):
    """Appends what the trainer logs as `step`, `epoch`, `time_s` and the metrics under the trainer's names.

    `time_s` is the training time of the run in seconds, resumes added up. A value that is not finite is written as
    null, as JSON has no other word for it. When a run resumes from step N, the lines after N are cut off first, so
    that no step appears twice; so is a line that a crash left unfinished. A file that cannot be written is announced
    once and stops no training.

    Args:
        run_dir: The run's folder.
        observer: Told when the file cannot be written.
    """

    def __init__(self, run_dir: Path, observer: Observer) -> None:
        self.path = run_dir / "logs" / "metrics.jsonl"
        self._observer = observer
        self._announced = False
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cuts the file back to the step that training goes on from."""
        if not state.is_world_process_zero:
            return
        earlier_s = 0.0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = lines_until(self.path, state.global_step)
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            earlier_s = float(kept[-1].get("time_s") or 0.0) if kept else 0.0
        except OSError as error:
            self._announce(error)
        self._started = time.monotonic() - earlier_s

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends one line, which is in the file when this returns."""
        if not state.is_world_process_zero or not logs:
            return
        elapsed_s = round(time.monotonic() - self._started, 3)
        line = {**logs, "step": state.global_step, "epoch": state.epoch, "time_s": elapsed_s}
        order = ("step", "epoch", "time_s", *logs)
        text = json.dumps({key: _json_value(line[key]) for key in order}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            self._announce(error)

    def _announce(self, error: OSError) -> None:
        if not self._announced:
            self._observer.warning(f"metrics are not written: {self.path.name}: {error.strerror or error}")
            self._announced = True


def lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole lines of the file up to and with `step`; none at step 0, where a run starts afresh."""
    if step == 0 or not path.exists():
        return []
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # a crash in the middle of a write
            continue
        if isinstance(line, dict) and line.get("step", math.inf) <= step:
            kept.append(line)
    return kept


def _json_value(value: Any) -> Any:
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str | bool | None) else str(value)
