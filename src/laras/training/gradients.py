"""The gradient of a whole optimizer step, whatever its cut, the number of processes, and the memory there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from laras.errors import LarasError
from laras.models.device_memory import DeviceOutOfMemory, free_caches
from laras.models.step import TrainStep, target_positions
from laras.training import oom
from laras.training.batches import MicroBatch, StepRows, TrainBatches
from laras.training.processes import raise_in_all, sum_gradients
from laras.training.state import Counters


class Note(Protocol):
    """Records an event."""

    def __call__(self, kind: str, detail: str) -> None:
        """One event of a kind."""


class StepGradients:
    """Runs micro-batches forward and backward.

    Args:
        model: On its device; not wrapped for several processes, since gradients are summed once a step.
        step: Of this model.
        batches: Cut and collated here.
        counters: Holds how finely micro-batches are cut.
        device: Of this process.
        rank: Of this process.
        processes: How many there are.
        scaler: Of the gradients, with fp16.
        note: Told of every new cut.
    """

    def __init__(
        self,
        model: nn.Module,
        step: TrainStep,
        batches: TrainBatches,
        counters: Counters,
        *,
        device: torch.device,
        rank: int,
        processes: int,
        scaler: Any,
        note: Note,
    ) -> None:
        self._model, self._step, self._batches, self._counters = model, step, batches, counters
        self._device, self._rank, self._processes = device, rank, processes
        self._scaler, self._note = scaler, note
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._error: LarasError | None = None
        self._piece: MicroBatch = []
        self._ready: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def compute(self, rows: StepRows, wants_stop: bool) -> Tensor:
        """Adds the gradient of a step to `.grad`, and does not wait for the device.

        Args:
            rows: Of the step, over all processes.
            wants_stop: Whether this process was asked to stop.

        Returns:
            Float64, for `conclude` once the device is done.

        Raises:
            OutOfMemoryError: When a single row does not fit; with several processes, `conclude` raises it in all.
        """
        mine = rows.micro_batches[self._rank :: self._processes]
        scale = 1.0 / max(1, rows.targets)
        try:
            loss = self._until_it_fits(lambda: self._accumulate(mine, scale))
        except LarasError as error:
            if self._processes == 1:
                raise
            self._error = error.with_traceback(None)  # whose frames hold tensors
            loss = torch.full((), torch.nan, dtype=torch.float64, device=self._device)
        if self._error is not None:  # the others wait in the sums below, which take room
            self._model.zero_grad()
            free_caches()
        figures = [loss * scale, torch.full_like(loss, float(wants_stop))]
        if self._processes == 1:
            return torch.stack(figures)
        level, failed = self._counters.split_level, self._error is not None
        levels = [level if rank == self._rank else 0 for rank in range(self._processes)]
        everything = torch.stack([*figures, *(torch.full_like(loss, float(value)) for value in (failed, *levels))])
        dist.all_reduce(everything)
        sum_gradients(self._trained)
        return everything

    def conclude(self, figures: list[float]) -> tuple[float, bool]:
        """What processes have to agree on after a step: the finest cut of any of them is that of all.

        Args:
            figures: Values of what `compute` returned.

        Returns:
            Mean loss over the step's target tokens, and whether a process was asked to stop.

        Raises:
            OutOfMemoryError: When a single row does not fit in one of several processes.
        """
        loss, stops, *shared = figures
        if shared:
            failed, *levels = shared
            if failed:
                raise_in_all(self._error)
            if max(levels) > self._counters.split_level:
                self._cut_finer(int(max(levels)), "as another process needs it")
        return loss, stops > 0

    def prepare(self, rows: StepRows) -> None:
        """Collates the batches of a later step now, while the device is busy."""
        self._ready.clear()
        for micro in rows.micro_batches[self._rank :: self._processes]:
            for piece in self._batches.cut(micro, self._counters.split_level):
                self._ready[tuple(piece)] = self._collate(piece)

    def rehearse(self, micro: MicroBatch) -> None:
        """One micro-batch forward and backward, as often as a step needs to be as it stays; gradients are left."""
        for _ in range(self._step.rehearsals):
            self._until_it_fits(lambda: self._accumulate((micro,), 1.0))

    def _accumulate(self, micro_batches: tuple[MicroBatch, ...], scale: float) -> Tensor:
        """Summed loss, a float64 scalar on the device."""
        scale_tensor = torch.full((), scale, device=self._device)
        if self._scaler is not None:
            scale_tensor = self._scaler.scale(scale_tensor)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        if not self._model.training:  # setting it walks through all modules, which takes milliseconds
            self._model.train()
        for micro in micro_batches:
            for piece in self._batches.cut(micro, self._counters.split_level):
                self._piece = piece
                total += self._step(self._on_device(piece), scale_tensor)
        return total

    def _collate(self, piece: MicroBatch) -> dict[str, Tensor]:
        """On CPU, with what the device would else be waited for to find out."""
        batch = self._batches.collate(piece, self._counters.split_level)
        if "target_positions" not in batch:
            batch["target_positions"] = target_positions(batch["labels"])
        return batch

    def _on_device(self, piece: MicroBatch) -> dict[str, Tensor]:
        batch = self._ready.pop(tuple(piece), None) or self._collate(piece)
        if self._device.type != "cuda":
            return batch
        return {name: value.pin_memory().to(self._device, non_blocking=True) for name, value in batch.items()}

    def _until_it_fits(self, work: Callable[[], Tensor]) -> Tensor:
        """The result of `work`, which starts again with smaller micro-batches as often as it runs out of memory.

        Doing the whole step again costs time in that one step only; a copy of the gradients would cost memory in all.
        """
        before = oom.device_random_state(self._device)
        while True:
            try:
                return work()
            except DeviceOutOfMemory as error:
                text = str(error).partition("\n")[0]
            rows, counters = self._batches.rows, self._counters
            if len(self._piece) <= 1:
                index = self._piece[0]
                raise oom.does_not_fit(int(rows.sources[index]), int(rows.lengths[index]), "training on")
            self._model.zero_grad()  # what this step had accumulated so far is computed again
            self._step.release()  # a graph keeps a whole step's memory, which smaller pieces would have to do without
            free_caches()
            oom.restore_device_random_state(before, self._device)
            self._cut_finer(counters.split_level + 1, text)

    def _cut_finer(self, level: int, reason: str) -> None:
        size = self._batches.size(self._counters.split_level)
        self._counters.split_level = level
        smaller = self._batches.size(level)
        self._note("out_of_memory", f"micro-batch {size} -> {smaller}, same gradient: {reason}")
