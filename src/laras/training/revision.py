"""The plan's sizes that no longer hold since memory ran out, kept as a record beside the plan.

A checkpoint holds them too. But a run that is killed after memory ran out, and before its next checkpoint, would else
begin with the size that did not fit.
"""

from __future__ import annotations

from pathlib import Path

from laras.progress import Observer
from laras.records import PlanChange, PlanRevision, RunEvent, TrainPlan
from laras.training.batches import TrainBatches
from laras.training.state import Counters


class Revisions:
    """The revision of a run's plan, if there is one.

    Args:
        run_dir: The run's directory.
        plan: Of the run; stays as it is.
        observer: Is told when the record cannot be written.

    Raises:
        RunStateError: The record is damaged.
    """

    def __init__(self, run_dir: Path, plan: TrainPlan, observer: Observer) -> None:
        self._run_dir, self._plan, self._observer = run_dir, plan, observer
        self._revision: PlanRevision | None = None
        if (run_dir / "records" / f"{PlanRevision.name}.json").exists():
            found = PlanRevision.load(run_dir)
            self._revision = found if found.parent_digest == plan.digest() else None

    @property
    def digest(self) -> str:
        """Of the plan as it is in force: of its revision, or of itself."""
        return (self._revision or self._plan).digest()

    def apply(self, counters: Counters) -> None:
        """Lets a session begin with the sizes that were found to fit."""
        if self._revision is not None:
            counters.split_level = max(counters.split_level, self._revision.train_split_level)
            counters.eval_split_level = max(counters.eval_split_level, self._revision.eval_split_level)

    def note(self, event: RunEvent, counters: Counters, batches: TrainBatches) -> None:
        """Records new sizes at once; a disk that takes no more is announced, and costs the record alone."""
        change = PlanChange(
            step=event.step,
            reason=event.detail,
            train_split_level=counters.split_level,
            eval_split_level=counters.eval_split_level,
        )
        earlier = self._revision.changes if self._revision is not None else ()
        self._revision = PlanRevision(
            parent_digest=self._plan.digest(),
            train_split_level=counters.split_level,
            eval_split_level=counters.eval_split_level,
            micro_batch=batches.size(counters.split_level),
            per_device_eval_batch_size=max(
                1, self._plan.choices.per_device_eval_batch_size >> counters.eval_split_level
            ),
            changes=(*earlier, change),
        )
        try:
            self._revision.save(self._run_dir)
        except OSError as error:
            self._observer.warning(f"the new size is not recorded: {error.strerror or error}")
