"""Out of memory is not the end of a run: the step is done again with smaller micro-batches and the same gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from laras.errors import OutOfMemoryError


def device_random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The random states that a forward pass draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore_device_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """The inverse of `device_random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def does_not_fit(row: int, tokens: int, doing: str) -> OutOfMemoryError:
    """The error of a single example that no split makes smaller."""
    return OutOfMemoryError(
        f"{doing} row {row} alone ({tokens} tokens) does not fit the device's memory",
        hint=f"set max_length below {tokens}, gradient_checkpointing: true or load_in_4bit: true, or use a larger GPU",
    )
