"""A new run that starts from the weights of another: which they are, whether they fit, and where they came from.

The new run keeps a copy of them in `start/`, so that it depends on nothing outside its directory, and a record of the
other run. Optimizer, schedule and counters begin afresh. What the other run has learned must not be what this one is
scored on, so every row has to keep its split (`laras.data.members`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from laras.config import RunConfig
from laras.data.members import joined_members, members_digest, split_conflicts
from laras.data.store import read_tokens
from laras.errors import CheckpointError, RunStateError
from laras.records import ParentRun, RunResult, SplitManifest, TrainPlan
from laras.rundir import RunDir, is_held, read_holder
from laras.training.checkpoints import choose_checkpoint, list_checkpoints
from laras.training.drift import weights_digest
from laras.training.state import ADAPTER_NAME, MODEL_NAME, publish_model, read_state
from laras.whole_folder import MANIFEST_NAME, folder_problems, require_whole

if TYPE_CHECKING:
    import pyarrow as pa

    from laras.data.prepare import PreparedData
    from laras.progress import Observer

_SHAPE = ("lora_r", "lora_alpha", "use_rslora", "use_dora")


@dataclass(frozen=True)
class Start:
    """Weights to start from.

    Attributes:
        run: The run that they are of.
        weights: A sealed folder: `best`, `final` or a checkpoint.
        record: For the new run.
        plan: Of the other run.
        members: What that run, and those before it, had in which split.
    """

    run: RunDir
    weights: Path
    record: ParentRun
    plan: TrainPlan
    members: pa.Table

    def chained(self, prepared: PreparedData) -> PreparedData:
        """The data of the new run, its records linked to the other run, its members joined with those before."""
        profile = prepared.profile.model_copy(update={"parent_digest": self.record.digest()})
        members = joined_members(prepared.members, self.members)
        added = {"parent_digest": profile.digest(), "members_sha256": members_digest(members)}
        manifest = prepared.manifest.model_copy(update=added)
        return replace(prepared, profile=profile, manifest=manifest, members=members)

    def require_fit(self, config: RunConfig, plan: TrainPlan, prepared: PreparedData) -> None:
        """Refuses a run that these weights are not for.

        Args:
            config: Of the new run.
            plan: Of the new run.
            prepared: Of the new run, before `chained`.

        Raises:
            RunStateError: With every reason at once.
        """
        misfits, moved = _misfits(self, config, plan), _moved(self, prepared)
        if misfits or moved:
            hints = []
            if misfits:
                hints.append(f"take the model and the adapter's shape from {self.run.config}")
            if moved:
                hints.append(f"take `seed` and `split` from {self.run.config}, leave these rows out, or train anew")
            raise RunStateError(
                f"this run cannot start from {self.run.path}", problems=[*misfits, *moved], hint="; ".join(hints)
            )

    def copy_to(self, run: RunDir) -> None:
        """Leaves the weights and the record in the new run.

        Raises:
            CheckpointError: When they have changed since they were found.
        """
        publish_model(self.weights, run.start)
        self.record.save(run.path)
        _require_recorded(run, self.record)


def find_start(run_dir: Path | str, checkpoint: int | None, observer: Observer) -> Start:
    """The best model of a run (the last one where nothing was validated), or one of its checkpoints.

    Raises:
        RunStateError: This is no run, it is in use, or it does not say which rows were in which split.
        CheckpointError: It has no such weights, or they are damaged.
    """
    run = RunDir(Path(run_dir))
    run.load_config()
    if is_held(run):
        holder = read_holder(run)
        who = f" by process {holder.pid} on {holder.host} since {holder.since}" if holder else ""
        raise RunStateError(f"{run.path} is in use{who}", hint="wait for it to end, or stop that process first")
    plan, manifest = TrainPlan.load(run.path), SplitManifest.load(run.path)
    weights = _weights_of(run, checkpoint, observer)
    step, eval_loss = _step_of(run, weights)
    record = ParentRun(
        parent_digest=plan.digest(),
        run=run.path.resolve().name,
        model=weights.name,
        step=step,
        eval_loss=eval_loss,
        weights_sha256=_weights_sha256(weights),
    )
    return Start(run, weights, record, plan, _members_of(run, manifest))


def start_weights(run_dir: Path) -> tuple[Path, str] | None:
    """Folder and digest of the weights that a run began with; None where it began with those of the base model.

    Raises:
        CheckpointError: When they are damaged.
    """
    run = RunDir(run_dir)
    if not (run_dir / "records" / f"{ParentRun.name}.json").exists():
        return None
    record = ParentRun.load(run_dir)
    _require_recorded(run, record)
    return run.start, record.weights_sha256


def _weights_of(run: RunDir, checkpoint: int | None, observer: Observer) -> Path:
    if checkpoint is not None:
        chosen = choose_checkpoint(run.checkpoints, checkpoint, observer)
        assert chosen is not None  # a named one is there, or it was raised
        return chosen
    for folder in (run.best, run.final):
        if folder.is_dir():
            require_whole(folder, "name one of its checkpoints with --checkpoint N")
            return folder
    for _, folder in reversed(list_checkpoints(run.checkpoints)):  # not ours: a damaged one stays where it is
        if not folder_problems(folder):
            return folder
    raise CheckpointError(f"{run.path} holds no weights yet", hint="start from a run that has saved a checkpoint")


def _step_of(run: RunDir, weights: Path) -> tuple[int | None, float | None]:
    """Step and validation loss of the weights, as far as they are known."""
    try:
        result = RunResult.load(run.path)
    except RunStateError:  # killed before it left one
        result = None
    best = result.best if result else None
    if weights == run.final and best is None and result is not None:
        return result.steps, None
    if weights.parent == run.checkpoints:
        step = int(weights.name.removeprefix("step-"))
        return step, best.eval_loss if best is not None and best.step == step else None
    return (best.step, best.eval_loss) if best is not None else (None, None)


def _members_of(run: RunDir, manifest: SplitManifest) -> pa.Table:
    if manifest.members_sha256 is None:
        raise RunStateError(
            f"{run.path} does not say which rows were in which split: it is of an older version of Laras",
            hint="its test rows could not be kept apart; train anew",
        )
    members = read_tokens(run.members)
    try:
        found = members_digest(members)
    except KeyError:  # another table
        found = ""
    if found != manifest.members_sha256:
        raise RunStateError(f"{run.members} was altered", hint="restore the file, or train anew")
    return members


def _weights_sha256(folder: Path) -> str:
    digests: dict[str, str] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    found = digests.get(ADAPTER_NAME) or digests.get(MODEL_NAME)
    if found is None:
        raise CheckpointError(f"{folder} holds neither {ADAPTER_NAME} nor {MODEL_NAME}", hint="start from another run")
    return found


def _require_recorded(run: RunDir, record: ParentRun) -> None:
    problems = folder_problems(run.start)
    if not problems and _weights_sha256(run.start) != record.weights_sha256:
        problems = ["the weights are not those of the record"]
    if problems:
        raise CheckpointError(
            f"{run.start} is damaged", problems=problems, hint=f"start a new run from {record.run} with `laras train`"
        )


def _misfits(start: Start, config: RunConfig, plan: TrainPlan) -> list[str]:
    """How the new run's model differs from the one that the weights are of."""
    old, new = start.plan.choices, plan.choices
    pairs: list[tuple[str, object, object]] = [("finetuning_type", old.finetuning_type, new.finetuning_type)]
    if old.finetuning_type == new.finetuning_type == "lora":
        pairs += [(name, getattr(old, name), getattr(new, name)) for name in _SHAPE]
        pairs.append(("target_modules", sorted(old.target_modules), sorted(new.target_modules)))
    pairs.append(("architecture", start.plan.model.architecture, plan.model.architecture))
    before, now = _base_digest(start), weights_digest(plan.model.source, config.model_revision)
    if before is not None and now is not None:
        pairs.append(("weights of the base model", f"{before[:12]}…", f"{now[:12]}…"))
    else:
        pairs.append(("model_name_or_path", start.plan.model.source, plan.model.source))
    return [f"{name}: {then} there, {here} here" for name, then, here in pairs if then != here]


def _base_digest(start: Start) -> str | None:
    """Digest of the base model's weights as some checkpoint of the run holds it."""
    for _, folder in reversed(list_checkpoints(start.run.checkpoints)):
        try:
            digest = read_state(folder)["identity"]["model_weights"]
        except (CheckpointError, KeyError, TypeError):
            continue
        return str(digest) if digest is not None else None
    return None


def _moved(start: Start, prepared: PreparedData) -> list[str]:
    """Rows that have left the split they were in."""
    conflicts = split_conflicts(prepared.members, start.members)
    return [
        f"{count:,} rows of this run's {now} set were in the {before} set there"
        for (now, before), count in sorted(conflicts.items())
    ]
