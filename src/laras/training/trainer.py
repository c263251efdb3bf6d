"""TRL's SFTTrainer with Laras' step, evaluation and checkpoints.

Upstream sets up model, optimizer, schedule and processes; the loop over optimizer steps is here, because what a batch
is differs: one item of it is a whole optimizer step over all processes, cut into micro-batches on the spot. So the
gradient depends neither on the cut nor on the number of processes, an out-of-memory step can be done again, and a
resume needs no position in a data loader.

Source: transformers 5.17.0 `Trainer`, whose `_run_epoch`, `_finalize_training`, and saving and loading are replaced.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import TrainOutput

from laras.errors import ConfigError, TrainingAborted
from laras.models.device_memory import required
from laras.models.loader import keep_4bit_exact
from laras.models.step import TrainStep
from laras.progress import Observer, StepReport, ValidationReport
from laras.records import RunEvent
from laras.training import state
from laras.training.batches import TokenRows, TrainBatches
from laras.training.callbacks.memory import MemoryMonitor
from laras.training.checkpoints import remove_old_checkpoints, save_checkpoint
from laras.training.drift import Identity
from laras.training.gradients import StepGradients
from laras.training.optimizers import create_states, inner_of, queue_steps
from laras.training.rehearsal import rehearse
from laras.training.signals import EvaluationStopped, StoppableProgress, StopRequest
from laras.training.speed import Speed
from laras.training.upstream import SFTTrainer
from laras.training.validation import Validation


class LarasTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains on tokenised rows (`input_ids`, `labels`).

    Args:
        checkpoints: The folder for `step-N`.
        observer: Is told what happens.
        batches: The rows of every step.
        make_step: Makes the training step of the model on its device.
        counters: Their values at the beginning of a run.
        identity: Saved with every checkpoint.
        memory: Measures.
        stop: Set when a signal asks to stop.
        max_skipped_steps: Bad steps in a row that end the run.
        on_best: Told the checkpoint of a new best model.
        on_new_size: Told when memory ran out and batches got smaller, by the first process.
        rehearse: Try the largest batches before the first step.
        sft_arguments: Those of SFTTrainer.
    """

    def __init__(
        self,
        *,
        checkpoints: Path,
        observer: Observer,
        batches: TrainBatches,
        make_step: Callable[[nn.Module], TrainStep],
        counters: state.Counters,
        identity: Identity,
        memory: MemoryMonitor,
        stop: StopRequest,
        max_skipped_steps: int,
        on_best: Callable[[Path], None],
        on_new_size: Callable[[RunEvent], None],
        rehearse: bool,
        **sft_arguments: Any,
    ) -> None:
        trained = {
            parameter: parameter.data for parameter in sft_arguments["model"].parameters() if parameter.requires_grad
        }
        super().__init__(**sft_arguments)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "gradients and checkpoints of FSDP and DeepSpeed are not handled yet",
                hint="launch without them: each process then holds the whole model (torchrun, accelerate launch)",
            )
        self.remove_callback(PrinterCallback)  # standard output is for data
        for parameter, data in trained.items():  # upstream rounds the adapters of a quantised model to bf16
            parameter.data = data.to(parameter.device)
        keep_4bit_exact(self.model)
        self._trained = list(trained)
        if self.args.world_size > 1:  # gradients are summed here; DDP would hold room for them a second time
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.counters, self.batches, self.memory = counters, batches, memory
        self._checkpoints, self._observer = checkpoints, observer
        self._identity, self._stop, self._max_skipped_steps = identity, stop, max_skipped_steps
        self._on_best, self._on_new_size, self._rehearses = on_best, on_new_size, rehearse
        self._begun = False
        self._saved_random_states: dict[str, Any] | None = None
        self._gradients = StepGradients(
            self.model, make_step(self.model), batches, counters, device=self.args.device,
            rank=self.args.process_index, processes=self.args.world_size, scaler=self.accelerator.scaler,
            note=self.note,
        )  # fmt: skip
        self._validation = Validation(
            self.model, counters, batch_rows=self.args.per_device_eval_batch_size,
            pad_token_id=self.processing_class.pad_token_id, device=self.args.device, processes=self.args.world_size,
            seed=self.args.seed, note=self.note,
        )  # fmt: skip
        self.speed = Speed()
        self.control: TrainerControl

    # ---------------------------------------------------------------- the loop

    def get_train_dataloader(self) -> TrainBatches:
        """One item is one optimizer step."""
        return self.batches

    def num_examples(self, dataloader: Any) -> int:
        """Rows of the training split."""
        return len(self.batches.rows)

    def _run_epoch(
        self,
        *,
        model: nn.Module,
        epoch: int,
        num_update_steps_per_epoch: int,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        **others: Any,
    ) -> None:
        first = steps_trained_in_current_epoch if epoch == epochs_trained else 0
        self._begin_once()
        for index in range(first, num_update_steps_per_epoch):
            if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
                return
            rows = self.batches.step(epoch, index)
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            started = time.monotonic()
            figures = self._gradients.compute(rows, bool(self._stop))
            norm = self._gradient_norm()
            if self.args.device.type == "cuda" and index + 1 < num_update_steps_per_epoch:
                self._gradients.prepare(self.batches.step(epoch, index + 1))
            # Waits for the device, once.
            *values, grad_norm = torch.cat([figures, norm.to(figures)[None]]).tolist()
            loss, stop = self._gradients.conclude(values)
            learned = self._accept(loss, grad_norm)
            self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
            self._optimizer_step(learned)
            learning_rate = self._get_learning_rate()
            if not self.accelerator.optimizer_step_was_skipped:
                self.lr_scheduler.step()
            self._forget_gradients()
            self.state.global_step += 1
            self.state.epoch = epoch + (index + 1) / num_update_steps_per_epoch
            self.counters.tokens += rows.tokens
            self.speed.step_done(time.monotonic() - started, rows.tokens)
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._after_step(loss, grad_norm, learning_rate, stop)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Upstream's; one in 8 bits does not wait for the device after every parameter."""
        return queue_steps(super().create_optimizer(model))

    def _begin_once(self) -> None:
        if self._begun:
            return
        self._begun = True
        if self._saved_random_states is not None:
            state.restore_random_states(self._saved_random_states)
        else:  # whatever trackers and callbacks have drawn
            set_seed(self.args.seed + self.args.process_index)
        create_states(inner_of(self.optimizer))
        if self._rehearses:
            self._rehearse()
        if self.counters.stopped:
            self.control.should_training_stop = True
        elif self.counters.evaluation_due:
            self.control.should_save = True  # the checkpoint of this step lacks the evaluation
            self._validate_and_save()

    def _gradient_norm(self) -> Tensor:
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        norm: Tensor = self.accelerator.clip_grad_norm_(self._trained, limit)
        return norm

    def _forget_gradients(self) -> None:
        """Those of the trained parameters alone: a walk through all modules takes longer than the optimizer."""
        for parameter in self._trained:
            parameter.grad = None

    def _accept(self, loss: float, grad_norm: float) -> bool:
        """Whether the step may reach the weights; counts it either way.

        Raises:
            TrainingAborted: After too many bad steps in a row.
        """
        counters, scaler = self.counters, self.accelerator.scaler
        step = self.state.global_step + 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            counters.skipped_in_a_row = 0
            if counters.losses.is_spike(loss):
                self.note("loss_spike", f"loss {loss:.3f}, recently {counters.losses.mean:.3f}", step)
        elif not (math.isfinite(loss) and scaler is not None and scaler.get_scale() > 1):  # fp16 looks for its scale
            counters.skipped_in_a_row += 1
            self.note("skipped_step", f"loss {loss}, gradient norm {grad_norm}: the weights were left alone", step)
        counters.window_loss += loss
        counters.window_steps += 1
        if math.isfinite(loss):
            counters.loss_sum += loss
            counters.loss_steps += 1
        if counters.skipped_in_a_row >= self._max_skipped_steps:
            raise TrainingAborted(
                f"loss or gradient was not finite in {counters.skipped_in_a_row} steps in a row, up to step {step}",
                hint="lower learning_rate, or set precision: bf16 or fp32; `laras resume` goes on from the last good "
                "checkpoint",
            )
        return math.isfinite(loss) and math.isfinite(grad_norm)

    def _optimizer_step(self, learned: bool) -> None:
        if not learned and self.accelerator.scaler is None:
            self._forget_gradients()  # an optimizer leaves a parameter without gradient alone
        with required("the optimizer's step"):
            self.optimizer.step()  # a gradient scaler skips bad steps itself, and has to see them

    def _after_step(self, loss: float, grad_norm: float, learning_rate: float, stop: bool) -> None:
        total = self.state.max_steps
        self._observer.step_finished(
            StepReport(
                step=self.state.global_step, total_steps=total, epoch=float(self.state.epoch), loss=loss,
                learning_rate=learning_rate, grad_norm=grad_norm, tokens_per_s=self.speed.tokens_per_s,
                eta_s=self.speed.eta_s(self.state.global_step, total, self.state.eval_steps),
                memory_bytes=self.memory.current_bytes(), memory_planned_bytes=self.memory.planned_bytes,
            )
        )  # fmt: skip
        if self.control.should_log:
            self._log_window(grad_norm, learning_rate)
        if stop or (self._stop and self.args.world_size == 1):  # several agree on it within a step
            self.counters.evaluation_due = bool(self.control.should_evaluate)
            self.control.should_training_stop = True
            self._save_checkpoint(self.model, None)
        elif self.control.should_evaluate:
            self._validate_and_save()
        elif self.control.should_save:
            self._save_checkpoint(self.model, None)

    def _log_window(self, grad_norm: float, learning_rate: float) -> None:
        counters = self.counters
        loss = counters.window_loss / max(1, counters.window_steps)
        counters.window_loss, counters.window_steps = 0.0, 0
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        self.log({**metrics, "tokens_per_s": self.speed.tokens_per_s, **self.memory.metrics()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hands metrics to the callbacks. Upstream also keeps them all in memory and in every checkpoint."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def note(self, kind: str, detail: str, step: int | None = None) -> None:
        """Records an event and tells the observer."""
        event = RunEvent(step=self.state.global_step if step is None else step, kind=kind, detail=detail)
        self.counters.events.append(event.model_dump())
        self._observer.warning(f"step {event.step}: {kind.replace('_', ' ')}: {detail}")
        if kind == "out_of_memory" and self.is_world_process_zero():
            self._on_new_size(event)

    def _finalize_training(self, trial: None, num_train_samples: int, start_time: float) -> TrainOutput:
        self._begin_once()  # a resume of a run that only its last evaluation is missing from
        counters = self.counters
        train_loss = counters.loss_sum / counters.loss_steps if counters.loss_steps else math.nan
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, train_loss, {})

    # ---------------------------------------------------------------- validation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Exact loss, perplexity and token accuracy on the validation split."""
        score = self._validation.score(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            StoppableProgress(self._observer, self._may_stop_evaluation),
        )
        metrics = {
            f"{metric_key_prefix}_loss": score.loss,
            f"{metric_key_prefix}_perplexity": score.perplexity,
            f"{metric_key_prefix}_token_accuracy": score.token_accuracy,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _may_stop_evaluation(self) -> None:
        if self._stop and self.args.world_size == 1 and self.is_in_train:  # several would wait for each other
            raise EvaluationStopped

    def _validate_and_save(self) -> None:
        """Evaluates, and saves when that is due or the model is the best so far, which is always kept."""
        counters, started = self.counters, time.monotonic()
        try:
            metrics = self.evaluate()
        except EvaluationStopped:
            counters.evaluation_due = True
            self.control.should_training_stop = True
            self._save_checkpoint(self.model, None)
            return
        counters.evaluation_due = False
        loss = metrics["eval_loss"]
        is_best = math.isfinite(loss) and (counters.best_loss is None or loss < counters.best_loss)
        if is_best:
            counters.best_loss, counters.best_step = loss, self.state.global_step
        if counters.stopping.should_stop(loss):
            counters.stopped = self.control.should_training_stop = True
        self._observer.validated(
            ValidationReport(
                step=self.state.global_step, loss=loss, perplexity=metrics["eval_perplexity"],
                token_accuracy=metrics["eval_token_accuracy"], is_best=is_best,
                evaluations_without_improvement=counters.stopping.without_improvement,
                patience=counters.stopping.patience,
            )
        )  # fmt: skip
        self.speed.evaluation_done(time.monotonic() - started)
        if self._stop and self.args.world_size == 1:  # whoever saw this loss may have asked
            self.control.should_training_stop = self.control.should_save = True
        if is_best or counters.stopped or self.control.should_save:
            saved = self._save_checkpoint(self.model, None)
            if is_best and self.is_world_process_zero():
                self._on_best(saved)

    def _rehearse(self) -> None:
        """The largest micro-batch through forward and backward, and one evaluation batch; leaves no trace."""
        largest, longest = self.batches.longest(), (-TokenRows(self.eval_dataset).lengths).argsort(kind="stable")
        sample = self.eval_dataset.select(longest[: self.args.per_device_eval_batch_size])
        steps: list[Callable[[], object]] = [lambda: self._gradients.rehearse(largest)]
        if len(sample):
            steps.append(lambda: self._validation.score(sample, Observer()))
        memory = self.memory
        rehearsal = rehearse(
            self.model, self.args.device, steps, peak_bytes=memory.current_bytes, planned_bytes=memory.planned_bytes
        )
        self._observer.message(f"rehearsal of the largest batch: {rehearsal}")
        event = RunEvent(step=self.state.global_step, kind="rehearsal", detail=str(rehearsal))
        self.counters.events.append(event.model_dump())
        self.log(rehearsal.metrics())

    # ---------------------------------------------------------------- saving and loading

    def _save_checkpoint(self, model: nn.Module, trial: None) -> Path:
        """Saves `step-N`, whole or not at all; every process takes part."""
        random_states = [state.random_states()]
        if self.args.world_size > 1:
            random_states *= self.args.world_size
            dist.all_gather_object(random_states, random_states[0])
        folder = self._checkpoints / f"step-{self.state.global_step}"
        if self.is_world_process_zero():
            save_checkpoint(
                self._checkpoints, self.state.global_step, lambda aside: self._write_checkpoint(aside, random_states)
            )
            remove_old_checkpoints(self._checkpoints, self.args.save_total_limit, self.counters.best_step)
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return folder

    def _write_checkpoint(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        state.write_model(self.model, self.processing_class, folder)
        optimizer = state.save_optimizer(self.optimizer, folder / state.OPTIMIZER_NAME)
        scaler = self.accelerator.scaler
        state.write_state(
            folder,
            {
                "identity": self._identity,
                "counters": self.counters.to_json(),
                "optimizer": optimizer,
                "schedule": self.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "random": random_states,
            },
        )
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved = state.read_state(Path(checkpoint))
        state.load_optimizer(self.optimizer, Path(checkpoint) / state.OPTIMIZER_NAME, saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["schedule"])
        if saved["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        rank = self.args.process_index
        self._saved_random_states = saved["random"][rank] if rank < len(saved["random"]) else None

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Loaded with the optimizer."""
