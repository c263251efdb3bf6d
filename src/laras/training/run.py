"""One training run: from a resolved plan, a model and two splits to checkpoints, the best model and a result."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig

from laras.config import RunConfig
from laras.data.collate import PadCollator
from laras.progress import Observer
from laras.records import BestCheckpoint, Measured, RunResult, TrainPlan
from laras.training.checkpoints import seal_folder, verify_checkpoint
from laras.training.trainer import LarasTrainer


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
) -> RunResult:
    """Trains, validates, keeps the best, and writes `final/` and the result record.

    Args:
        config: What the user wants; the optimization is taken from here.
        plan: What planning decided; the execution is taken from here.
        model: The base with its adapter attached, or the whole model.
        tokenizer: Saved beside the weights.
        train_rows: Tokenised rows with `input_ids` and `labels`.
        validation_rows: The same.
        run_dir: The run's directory.
        observer: Is told what happens.
        callbacks: Further callbacks: metrics, trackers.
        resume_from: A checkpoint to go on from.

    Raises:
        CheckpointError: When `resume_from` is damaged.
    """
    if resume_from is not None:
        verify_checkpoint(resume_from)
    stopping = []
    if config.early_stopping_patience is not None:
        stopping.append(EarlyStoppingCallback(config.early_stopping_patience, config.early_stopping_min_delta))
    trainer = LarasTrainer(
        checkpoints=run_dir / "checkpoints",
        observer=observer,
        model=model,
        args=sft_config(config, plan, run_dir),
        data_collator=PadCollator(tokenizer.pad_token_id),
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        callbacks=[*stopping, *callbacks],
    )
    observer.training_started(plan, 0)
    started = time.monotonic()
    output = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    elapsed_s = time.monotonic() - started
    state = trainer.state
    if trainer.is_world_process_zero():
        _write_model(trainer, run_dir)
    best = None
    if state.best_metric is not None:
        best = BestCheckpoint(step=state.best_global_step, eval_loss=state.best_metric)
    on_gpu = torch.cuda.is_available() and trainer.args.device.type == "cuda"
    resident_bytes = psutil.Process().memory_info().rss
    result = RunResult(
        parent_digest=plan.digest(),
        status="finished",
        steps=state.global_step,
        epochs=float(state.epoch or 0),
        train_loss=output.training_loss,
        best=best,
        stopped_early=state.global_step < state.max_steps,
        measured=Measured(
            peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_gpu else resident_bytes,
            peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else resident_bytes,
            tokens_per_s=plan.time.tokens_per_s if elapsed_s == 0 else _trained_tokens(trainer) / elapsed_s,
            elapsed_s=elapsed_s,
        ),
    )
    if trainer.is_world_process_zero():
        result.save(run_dir)
    observer.training_finished(result.status)
    return result


def sft_config(config: RunConfig, plan: TrainPlan, run_dir: Path) -> SFTConfig:
    """The arguments of TRL's trainer: optimization from the configuration, execution from the plan."""
    choices = plan.choices
    return SFTConfig(
        output_dir=str(run_dir / "checkpoints"),
        per_device_train_batch_size=choices.per_device_train_batch_size,
        per_device_eval_batch_size=choices.per_device_eval_batch_size,
        gradient_accumulation_steps=choices.gradient_accumulation_steps,
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
        eval_strategy="steps",
        eval_steps=choices.eval_steps,
        save_strategy="steps",
        save_steps=choices.save_steps,
        save_total_limit=config.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=plan.hardware.kind == "cuda",
        disable_tqdm=True,
        report_to="none",
    )


def _write_model(trainer: LarasTrainer, run_dir: Path) -> None:
    """`final/`: the weights of the best step (upstream has loaded them) and the tokenizer; whole or absent."""
    aside, final = run_dir / ".final.partial", run_dir / "final"
    shutil.rmtree(aside, ignore_errors=True)
    trainer.save_model(str(aside), _internal_call=True)
    (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle that no loader of the model needs
    seal_folder(aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)


def _trained_tokens(trainer: LarasTrainer) -> float:
    """Tokens, padding excluded, of the optimizer steps done."""
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    return float(sum(lengths)) * float(trainer.state.epoch or 0)
