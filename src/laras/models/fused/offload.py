"""Inputs of checkpointed layers in host memory between forward and backward, copied beside the computation.

A layer that keeps its input alone keeps T x D elements; over a PCIe bus their copy takes a fraction of the time in
which the layer computes, so that on the device only the inputs of two layers exist. Copies run on a stream of their
own: an input leaves while the next layer runs, and comes back while the layer above runs backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    """

    layers: int
    _step: int = 0
    _host: dict[int, Tensor] = field(default_factory=dict)
    _leaving: list[tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=list)
    _coming: dict[int, tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=dict)
    _stream: torch.cuda.Stream | None = None

    def begin(self) -> None:
        """A forward pass starts."""
        self._step += 1
        self._coming.clear()
        self._let_go()

    def store(self, number: int, hidden_TD: Tensor) -> Tensor | Ticket:
        """Takes a layer's input; what is returned is for `load`."""
        if number == self.layers - 1:
            self._let_go()
            return hidden_TD
        ticket = Ticket(number, self._step, hidden_TD.shape)
        if hidden_TD.is_meta:
            self._let_go()
            self._leaving.append((hidden_TD, None))
            return ticket
        count = hidden_TD.numel()
        host = self._host.get(number)
        if host is None or host.numel() < count or host.dtype != hidden_TD.dtype:
            host = self._host[number] = torch.empty(count, dtype=hidden_TD.dtype, pin_memory=hidden_TD.is_cuda)
        target = host[:count].view(hidden_TD.shape)
        if not hidden_TD.is_cuda:
            target.copy_(hidden_TD)
            return ticket
        self._let_go()
        side, event = self._side(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            target.copy_(hidden_TD, non_blocking=True)
            event.record(side)
        self._leaving.append((hidden_TD, event))  # its memory is not free before the copy has read it
        return ticket

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
        if ticket.number < 0 or ticket.number in self._coming:
            return
        hidden, event = like.new_empty(ticket.shape), None
        if not like.is_meta:
            source = self._host[ticket.number][: math.prod(ticket.shape)].view(ticket.shape)
            if like.is_cuda:
                side, event = self._side(), torch.cuda.Event()  # type: ignore[no-untyped-call]
                with torch.cuda.stream(side):
                    hidden.copy_(source, non_blocking=True)
                    event.record(side)
            else:
                hidden.copy_(source)
        self._coming[ticket.number] = (hidden, event)

    def _let_go(self) -> None:
        """Gives inputs back whose copy is queued; what takes their memory waits for it."""
        for _, event in self._leaving:
            if event is not None:
                torch.cuda.current_stream().wait_event(event)
        self._leaving.clear()

    def _side(self) -> torch.cuda.Stream:
        """The stream of the copies, behind everything that is queued now."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream
