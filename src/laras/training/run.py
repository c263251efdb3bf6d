"""One training run: from a resolved plan, a model and two splits to checkpoints, the best model and a result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from laras.config import RunConfig
from laras.data.store import tokens_digest
from laras.errors import LarasError, TrainingAborted, TrainingInterrupted
from laras.models.graphs import train_step
from laras.models.step import TrainStep, path_of
from laras.progress import Observer
from laras.records import BestCheckpoint, Measured, RunEvent, RunResult, RunStatus, TrainPlan
from laras.training.batches import TokenRows, TrainBatches
from laras.training.callbacks.memory import MemoryMonitor
from laras.training.callbacks.metrics_log import MetricsLog
from laras.training.checkpoints import damaged_checkpoints, set_later_aside, unwritable
from laras.training.drift import check_resume, identity_of
from laras.training.numbers import Stopping
from laras.training.revision import Revisions
from laras.training.signals import StopRequest, stop_on_signals
from laras.training.state import Counters, load_weights, publish_model, read_state, write_model
from laras.training.trackers import Trackers, build_trackers
from laras.training.trainer import LarasTrainer
from laras.training.upstream import SFTConfig
from laras.whole_folder import WRITE_ERRORS, folder_problems, require_whole, write_whole


def run_training(
    config: RunConfig,
    plan: TrainPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_rows: Dataset,
    validation_rows: Dataset,
    run_dir: Path,
    observer: Observer,
    callbacks: tuple[TrainerCallback, ...] = (),
    resume_from: Path | None = None,
    start: tuple[Path, str] | None = None,
    make_step: Callable[[nn.Module], TrainStep] | None = None,
    rehearse: bool | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Trains, validates, keeps the best, and writes `best/`, `final/` and the result record.

    Args:
        config: What the user wants; the optimization is taken from here.
        plan: What planning decided; the execution is taken from here.
        model: The base with its adapter attached, or the whole model.
        tokenizer: Saved beside the weights.
        train_rows: Tokenised rows with `input_ids` and `labels`.
        validation_rows: The same; where there is none, the last model is the final one.
        run_dir: The run's directory, which this process owns.
        observer: Is told what happens.
        callbacks: Further callbacks.
        resume_from: A checkpoint to go on from (`laras.training.resume.choose_checkpoint`).
        start: Folder and digest of weights that the run begins with (`laras.training.start.start_weights`); None: those
            that the model has.
        make_step: Makes the training step of the model on its device; None: as the plan says.
        rehearse: Try the largest batch before the first step; None: on a GPU.
        stop: Through which others than signals may ask the run to stop.

    Raises:
        CheckpointError: When `resume_from` is damaged.
        RunStateError: When the run has changed since `resume_from`; names every change.
        TrainingInterrupted: A signal asked to stop; the state is saved.
        TrainingAborted: Numbers that do not train, memory that no split cures, or a disk that is full.
    """
    if resume_from is not None:
        require_whole(resume_from, "resume from an earlier checkpoint")
    rows = TokenRows(train_rows)
    identity = identity_of(
        config, plan, tokenizer,
        train_sha256=tokens_digest(rows.table), validation_sha256=tokens_digest(TokenRows(validation_rows).table),
        start_sha256=start[1] if start else None,
    )  # fmt: skip
    counters = Counters(Stopping(config.early_stopping_patience, config.early_stopping_min_delta))
    if resume_from is not None:
        check_resume(resume_from, identity)
        counters = Counters.from_json(read_state(resume_from)["counters"])
    elif start is not None:
        load_weights(model, start[0])
    if resume_from is None and config.backend not in ("auto", plan.choices.backend):
        event = RunEvent(step=0, kind="backend_fallback", detail=plan.reasons["backend"])
        counters.events.append(event.model_dump())
    revisions = Revisions(run_dir, plan, observer)
    revisions.apply(counters)
    with stop_on_signals(stop) as request:
        run = _Run(config, plan, tokenizer, run_dir, observer, revisions)
        first_step = _step_of(resume_from)
        trainer = run.build_trainer(
            model=model, rows=rows, validation_rows=validation_rows, counters=counters, identity=identity, stop=request,
            make_step=make_step or (lambda model: train_step(model, plan.choices, observer)),
            rehearse=plan.hardware.kind == "cuda" if rehearse is None else rehearse,
        )  # fmt: skip
        trackers = Trackers([], observer)
        if trainer.is_world_process_zero():
            trackers = build_trackers(config, plan, run_dir, first_step, observer)
        for callback in (MetricsLog(run_dir, observer), trackers, *callbacks):
            trainer.add_callback(callback)
        trackers.start()
        try:
            return run.train(trainer, request, resume_from)
        finally:
            trackers.finish()


class _Run:
    """What the parts of one run share."""

    def __init__(
        self,
        config: RunConfig,
        plan: TrainPlan,
        tokenizer: PreTrainedTokenizerBase,
        run_dir: Path,
        observer: Observer,
        revisions: Revisions,
    ) -> None:
        self._config, self._plan, self._tokenizer = config, plan, tokenizer
        self._run_dir, self._observer, self._revisions = run_dir, observer, revisions
        self._started = time.monotonic()

    def build_trainer(
        self,
        *,
        model: PreTrainedModel,
        rows: TokenRows,
        validation_rows: Dataset,
        counters: Counters,
        identity: dict[str, Any],
        stop: StopRequest,
        make_step: Callable[[nn.Module], TrainStep],
        rehearse: bool,
    ) -> LarasTrainer:
        """The trainer of this run."""
        choices = self._plan.choices
        args = sft_config(self._config, self._plan, self._run_dir, validates=len(validation_rows) > 0)
        args._n_gpu = min(1, args.n_gpu)  # a process has one GPU; upstream would refuse to see several
        if path_of(model).checkpoints_itself:
            args.gradient_checkpointing = False
        batches = TrainBatches(
            rows,
            micro_rows=choices.per_device_train_batch_size,
            micro_batches=choices.gradient_accumulation_steps,
            max_length=max(choices.max_length, int(rows.lengths.max(initial=1))),
            bin_tokens=choices.packed_tokens,
            seed=self._config.seed,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return LarasTrainer(
            checkpoints=self._run_dir / "checkpoints",
            observer=self._observer,
            batches=batches,
            make_step=make_step,
            counters=counters,
            identity=identity,
            memory=MemoryMonitor(args.device, self._plan.memory.train_peak_allocated_bytes, self._observer),
            stop=stop,
            max_skipped_steps=self._config.max_skipped_steps,
            rehearse=rehearse,
            on_new_size=lambda event: self._revisions.note(event, counters, batches),
            on_best=self._publish_best,
            model=model,
            args=args,
            data_collator=_no_collator,
            train_dataset=Dataset(rows.table),
            eval_dataset=validation_rows,
            processing_class=self._tokenizer,
        )

    def train(self, trainer: LarasTrainer, stop: StopRequest, resume_from: Path | None) -> RunResult:
        """Trains to the end, or to what stops it; the record says which."""
        self._note_start(trainer, resume_from)
        self._write_result(trainer, "running")
        try:
            self._observer.training_started(self._plan, _step_of(resume_from))
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            done = trainer.state.global_step >= trainer.state.max_steps or trainer.counters.stopped
            if stop and not (done and not trainer.counters.evaluation_due):
                by = stop.signal_name or stop.reason or "another process"
                raise TrainingInterrupted(
                    f"stopped by {by} after step {trainer.state.global_step}; everything is saved",
                    hint=f"`laras resume {self._run_dir}` goes on from there",
                )
            if trainer.counters.skipped_in_a_row >= trainer.state.global_step > 0:
                raise TrainingAborted(
                    f"none of the {trainer.state.global_step} steps had a finite loss and gradient",
                    hint="see that the base model's own loss is finite, or set precision: bf16 or fp32 in a new run",
                )
            self._write_final(trainer)
        except BaseException as error:
            status: RunStatus = "interrupted" if isinstance(error, TrainingInterrupted) else "failed"
            if isinstance(error, LarasError) and status == "failed":
                trainer.note("failed", error.message)
            self._write_result(trainer, status)
            self._observer.training_finished(status)
            raise
        result = self._write_result(trainer, "finished")
        self._observer.training_finished("finished")
        return result

    def _publish_best(self, checkpoint: Path) -> None:
        try:
            publish_model(checkpoint, self._run_dir / "best")
        except WRITE_ERRORS as error:
            raise unwritable("best/", self._run_dir, error) from error

    def _note_start(self, trainer: LarasTrainer, resume_from: Path | None) -> None:
        known = {event["detail"] for event in trainer.counters.events}
        for step, reason in damaged_checkpoints(self._run_dir / "checkpoints"):
            if reason not in known:
                trainer.counters.events.append(
                    RunEvent(step=step, kind="damaged_checkpoint", detail=reason).model_dump()
                )
        if resume_from is not None:
            step = _step_of(resume_from)
            if trainer.is_world_process_zero():
                later = set_later_aside(resume_from.parent, step)
                if later:
                    self._observer.warning(f"later checkpoints are kept as {', '.join(path.name for path in later)}")
            event = RunEvent(step=step, kind="resume", detail=f"went on from {resume_from.name}")
            trainer.counters.events.append(event.model_dump())

    def _write_final(self, trainer: LarasTrainer) -> None:
        """`final/`: the best model, or the last one where there is no best; the model in memory is the same."""
        counters = trainer.counters
        best = self._run_dir / "checkpoints" / f"step-{counters.best_step}"
        if counters.best_step is not None and folder_problems(best):
            trainer.note("best_lost", f"{best.name} is damaged or missing; the last model is kept instead")
            counters.best_step = counters.best_loss = None
        if counters.best_step is not None:
            load_weights(trainer.model, best)
        if not trainer.is_world_process_zero():
            return
        try:
            if counters.best_step is not None:
                for name in ("best", "final"):  # after a way back, `best/` may be of the way that was left
                    publish_model(best, self._run_dir / name)
            else:
                write_whole(self._run_dir / "final", lambda aside: write_model(trainer.model, self._tokenizer, aside))
        except WRITE_ERRORS as error:
            raise unwritable("final/", self._run_dir, error) from error

    def _write_result(self, trainer: LarasTrainer, status: RunStatus) -> RunResult:
        counters, state = trainer.counters, trainer.state
        best = None
        if counters.best_step is not None and counters.best_loss is not None:
            best = BestCheckpoint(step=counters.best_step, eval_loss=counters.best_loss)
        loss = counters.loss_sum / counters.loss_steps if counters.loss_steps else math.nan
        on_gpu = trainer.args.device.type == "cuda"
        resident_bytes = psutil.Process().memory_info().rss
        result = RunResult(
            parent_digest=self._revisions.digest,
            status=status,
            steps=state.global_step,
            epochs=float(state.epoch or 0),
            train_loss=loss if math.isfinite(loss) else None,
            best=best,
            stopped_early=counters.stopped,
            measured=Measured(
                peak_allocated_bytes=torch.cuda.max_memory_allocated(trainer.args.device) if on_gpu else resident_bytes,
                peak_reserved_bytes=torch.cuda.max_memory_reserved(trainer.args.device) if on_gpu else resident_bytes,
                tokens_per_s=trainer.speed.tokens / trainer.speed.train_s if trainer.speed.train_s else 0.0,
                elapsed_s=time.monotonic() - self._started,
            ),
            events=tuple(RunEvent.model_validate(event) for event in counters.events),
        )
        if trainer.is_world_process_zero():
            try:
                result.save(self._run_dir)
            except OSError as error:
                if status == "finished":
                    raise unwritable("the result", self._run_dir, error) from error
                self._observer.warning(f"the result record is not written: {error.strerror or error}")
        return result


def sft_config(config: RunConfig, plan: TrainPlan, run_dir: Path, *, validates: bool) -> SFTConfig:
    """The arguments of TRL's trainer: optimization from the configuration, execution from the plan."""
    choices = plan.choices
    return SFTConfig(
        output_dir=str(run_dir / "checkpoints"),
        per_device_train_batch_size=choices.per_device_train_batch_size,
        per_device_eval_batch_size=choices.per_device_eval_batch_size,
        gradient_accumulation_steps=1,  # one batch of the trainer is a whole optimizer step
        gradient_checkpointing=choices.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=choices.max_length,
        bf16=choices.precision == "bf16",
        fp16=choices.precision == "fp16",
        use_cpu=plan.hardware.kind == "cpu",
        optim=choices.optim,
        learning_rate=choices.learning_rate,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,  # a value below 1 is a fraction of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        full_determinism=config.full_determinism,
        logging_steps=choices.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validates else "no",
        eval_steps=choices.eval_steps,
        save_strategy="steps",
        save_steps=choices.save_steps,
        save_total_limit=config.save_total_limit,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=plan.hardware.kind == "cuda",
        disable_tqdm=True,
        report_to="none",
    )


def _no_collator(rows: Any) -> Any:
    raise NotImplementedError("batches are collated by laras.training.batches")


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step-")) if checkpoint is not None else 0
