"""TRL's SFTTrainer with Laras' loss, evaluation and checkpoints.

Three methods differ from upstream: the loss is the summed loss of the shared step over the target tokens of the whole
optimizer step; evaluation is exact, whatever its batch size; and a checkpoint is saved whole or not at all.

Source: trl 1.15.0 `SFTTrainer` and transformers 5.17.0 `Trainer`, whose `_save_checkpoint` is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl
from trl import SFTTrainer

from laras.evaluation.evaluator import evaluate_split
from laras.evaluation.metrics import score_of
from laras.models.step import summed_loss
from laras.progress import Observer
from laras.training.checkpoints import remove_old_checkpoints, save_checkpoint


class LarasTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains on tokenised rows (`input_ids`, `labels`).

    Args:
        checkpoints: The folder for `step-N`.
        observer: Is told what happens.
        sft_arguments: Those of SFTTrainer.
    """

    def __init__(self, *, checkpoints: Path, observer: Observer, **sft_arguments: Any) -> None:
        super().__init__(**sft_arguments)
        self.model_accepts_loss_kwargs = True  # the loss is normalised here: no division by accumulation steps
        self._checkpoints = checkpoints
        self._observer = observer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Loss of a micro-batch: its summed NLL over the target tokens of the whole optimizer step, a scalar.

        With several processes, whose gradients are averaged, the loss is multiplied by their number, so that the
        average is the gradient of the sum.
        """
        if return_outputs or num_items_in_batch is None:
            raise NotImplementedError("the loss is for training; evaluation goes through `evaluate`")
        loss: Tensor = summed_loss(model, inputs) / num_items_in_batch
        return loss * int(self.accelerator.num_processes)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Target tokens of the optimizer step over all processes; the first token of a row is predicted by nothing."""
        count = sum(((batch["labels"][:, 1:] != -100).sum() for batch in batch_samples), torch.tensor(0))
        everywhere: Tensor = self.accelerator.gather(count.to(device))
        return everywhere.sum()

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Exact loss, perplexity and token accuracy on the validation split."""
        sums = evaluate_split(
            self.model,
            self.eval_dataset if eval_dataset is None else eval_dataset,
            batch_size=self.args.per_device_eval_batch_size,
            pad_token_id=self.processing_class.pad_token_id,
            device=self.args.device,
            observer=self._observer,
        )
        score = score_of(sums, seed=self.args.seed)
        metrics = {
            f"{metric_key_prefix}_loss": score.loss,
            f"{metric_key_prefix}_perplexity": score.perplexity,
            f"{metric_key_prefix}_token_accuracy": score.token_accuracy,
        }
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        best_step = self.state.best_global_step
        if best_step:
            self.state.best_model_checkpoint = str(self._checkpoints / f"step-{best_step}")
        if self.is_world_process_zero():
            save_checkpoint(self._checkpoints, self.state.global_step, self._write_checkpoint)
            remove_old_checkpoints(self._checkpoints, self.args.save_total_limit, best_step or None)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks[type(part).__name__] = part.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
