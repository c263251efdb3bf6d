"""Where a resume begins."""

from __future__ import annotations

from pathlib import Path

from laras.errors import RunStateError
from laras.progress import Observer
from laras.records import RunResult
from laras.training import checkpoints


def choose_checkpoint(run_dir: Path, step: int | None, observer: Observer) -> Path | None:
    """The checkpoint that a resume of a run goes on from.

    Args:
        run_dir: The run's directory.
        step: The step to go on from; None for the newest good checkpoint.
        observer: Is told of damaged checkpoints, which are set aside.

    Returns:
        None when there is no good checkpoint, so that the run starts again and takes the same way.

    Raises:
        RunStateError: The run has finished.
        CheckpointError: There is no checkpoint of this step, or it is damaged.
    """
    try:
        finished = RunResult.load(run_dir).status == "finished"
    except RunStateError:  # killed before it left a result, or in the middle of a write by another version
        finished = False
    if finished and step is None:
        raise RunStateError(
            f"{run_dir} has finished; there is nothing to resume",
            hint=f"`laras test {run_dir}` scores it, `laras report {run_dir}` writes its page; to go back, name a step "
            "with --checkpoint N",
        )
    return checkpoints.choose_checkpoint(run_dir / "checkpoints", step, observer)
