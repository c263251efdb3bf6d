"""The score of a split during training, with smaller batches where memory runs out."""

from __future__ import annotations

import torch
from torch import nn

from laras.evaluation.evaluator import Rows, evaluate_split
from laras.evaluation.metrics import score_of
from laras.models.device_memory import DeviceOutOfMemory, free_caches
from laras.progress import Observer
from laras.records import SplitScore
from laras.training import oom
from laras.training.batches import TokenRows
from laras.training.gradients import Note
from laras.training.processes import highest
from laras.training.state import Counters


class Validation:
    """Scores splits.

    Args:
        model: On its device.
        counters: Hold how finely batches are cut.
        batch_rows: Planned rows of a batch.
        pad_token_id: Of the tokenizer.
        device: Of this process.
        processes: How many there are.
        seed: Of the interval.
        note: Told of every new cut.
    """

    def __init__(
        self,
        model: nn.Module,
        counters: Counters,
        *,
        batch_rows: int,
        pad_token_id: int | None,
        device: torch.device,
        processes: int,
        seed: int,
        note: Note,
    ) -> None:
        self._model, self._counters, self._note = model, counters, note
        self._planned_rows, self._pad_token_id = batch_rows, pad_token_id
        self._device, self._processes, self._seed = device, processes, seed

    def score(self, rows: Rows, observer: Observer) -> SplitScore:
        """Exact loss, perplexity and token accuracy.

        Raises:
            OutOfMemoryError: When a single row does not fit.
        """
        while True:
            batch_rows = self._rows_at(self._counters.eval_split_level)
            try:
                sums = evaluate_split(
                    self._model, rows, batch_size=batch_rows, pad_token_id=self._pad_token_id, device=self._device,
                    observer=observer, shared_rows=self._planned_rows,
                )  # fmt: skip
                break
            except DeviceOutOfMemory as error:
                text = str(error).partition("\n")[0]
            if batch_rows == 1:
                split = TokenRows(rows)
                longest = int(split.lengths.argmax())
                raise oom.does_not_fit(int(split.sources[longest]), int(split.lengths[longest]), "validation of")
            free_caches()
            self._cut_finer(self._counters.eval_split_level + 1, text)
        if self._processes > 1:  # the smallest batch of any process is that of all, and of a resume
            level = highest(self._counters.eval_split_level, self._device)
            if level > self._counters.eval_split_level:
                self._cut_finer(level, "as another process needs it")
        return score_of(sums, seed=self._seed)

    def _rows_at(self, level: int) -> int:
        return max(1, self._planned_rows >> level)

    def _cut_finer(self, level: int, reason: str) -> None:
        before = self._rows_at(self._counters.eval_split_level)
        self._counters.eval_split_level = level
        self._note("out_of_memory", f"evaluation batch {before} -> {self._rows_at(level)} rows: {reason}")
