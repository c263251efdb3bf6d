"""Inputs of checkpointed layers in main memory between forward and backward, copied beside the computation.

A layer that keeps its input alone keeps T x D elements; over a PCIe bus their copy takes a fraction of the time in
which the layer computes, so that on the device only the inputs of two layers exist. Copies run on a stream of their
own: an input leaves while its layer runs forward, and comes back while the layer above runs backward. What comes back
is what left, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laras.progress import Observer


@dataclass
class Ticket:
    """What a layer holds instead of its input."""

    number: int  # of the layer
    step: int
    shape: torch.Size


@dataclass
class HostInputs:
    """The inputs of the layers of one step; the next one overwrites them.

    Attributes:
        layers: Number of layers; the last one's input stays on the device, since it is wanted at once.
        observer: Is told when main memory cannot be pinned.
    """

    layers: int
    observer: Observer = field(default_factory=Observer)
    _step: int = 0
    _keeps: bool = True
    _pins: bool = True
    _host: dict[int, Tensor] = field(default_factory=dict)
    _leaving: list[tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=list)
    _coming: dict[int, tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=dict)
    _stream: torch.cuda.Stream | None = None

    @property
    def host_bytes(self) -> int:
        """Main memory that is held."""
        return sum(room.numel() * room.element_size() for room in self._host.values())

    def begin(self, *, keeps: bool) -> None:
        """A forward pass starts.

        Args:
            keeps: A backward pass follows; without one nothing is stored.
        """
        self._step += 1
        self._keeps = keeps
        self._leaving += self._coming.values()  # of a step that ended early: memory that a copy may still write to
        self._coming.clear()
        self.let_go()

    def store(self, number: int, hidden_TD: Tensor) -> Tensor | Ticket:
        """Takes a layer's input before the layer runs; what is returned is for `load`."""
        if not self._keeps or number == self.layers - 1:
            return hidden_TD
        self._leaving.append((hidden_TD, self._copy(hidden_TD, number, leaves=True)))
        return Ticket(number, self._step, hidden_TD.shape)

    def let_go(self) -> None:
        """Gives an input back after its layer has run: what takes its memory waits until the copy has read it."""
        for _, event in self._leaving:
            if event is not None:
                torch.cuda.current_stream().wait_event(event)
        self._leaving.clear()

    def load(self, kept: Tensor | Ticket, like: Tensor) -> Tensor:
        """The input that `store` took, on the device of `like`, a tensor of its type.

        Raises:
            RuntimeError: A later forward pass has overwritten it.
        """
        if isinstance(kept, Tensor):
            self._fetch(Ticket(self.layers - 2, self._step, kept.shape), like)
            return kept
        if kept.step != self._step:
            raise RuntimeError("the input of a layer was overwritten: each forward pass needs its backward first")
        self._fetch(kept, like)
        hidden, event = self._coming.pop(kept.number)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        self._fetch(Ticket(kept.number - 1, kept.step, kept.shape), like)
        return hidden

    def _fetch(self, ticket: Ticket, like: Tensor) -> None:
        """Starts a copy back, unless it has started or there is none."""
        if ticket.number >= 0 and ticket.number not in self._coming:
            hidden = like.new_empty(ticket.shape)
            self._coming[ticket.number] = hidden, self._copy(hidden, ticket.number, leaves=False)

    def _copy(self, hidden: Tensor, number: int, *, leaves: bool) -> torch.cuda.Event | None:
        """Copies a layer's input to main memory or back; on a GPU the event says when that is done."""
        if hidden.is_meta:
            started(hidden)
            return None
        room = self._room(number, hidden) if leaves else self._host[number]
        host = room[: math.prod(hidden.shape)].view(hidden.shape)
        target, source = (host, hidden) if leaves else (hidden, host)
        if not hidden.is_cuda:
            target.copy_(source)
            return None
        side, event = self._side(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=self._pins)
            event.record(side)
        return event

    def _room(self, number: int, hidden: Tensor) -> Tensor:
        """Main memory for a layer's input: a power of two of elements, since torch pins no less."""
        room = self._host.get(number)
        if room is None or room.numel() < hidden.numel() or room.dtype != hidden.dtype:
            self._host.pop(number, None)
            size = 1 << (hidden.numel() - 1).bit_length()
            room = self._host[number] = self._pinned(size, hidden) if hidden.is_cuda else hidden.new_empty(size)
        return room

    def _pinned(self, size: int, like: Tensor) -> Tensor:
        if self._pins:
            try:
                return torch.empty(size, dtype=like.dtype, pin_memory=True)
            except RuntimeError as error:  # a container or WSL may allow little
                self._pins = False
                reason = str(error).strip().partition("\n")[0]
                self.observer.warning(f"main memory is not pinned, and steps that copy to it run slower: {reason:.200}")
        return torch.empty(size, dtype=like.dtype)

    def _side(self) -> torch.cuda.Stream:
        """The stream of the copies, behind everything that is queued now."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream


def started(hidden: Tensor) -> None:
    """A copy that a step on meta tensors would have started; planning counts them here."""
