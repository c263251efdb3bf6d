"""Which of several processes this is, and what rank 0 does for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from laras.errors import LarasError

_T = TypeVar("_T")
_WAIT = timedelta(days=1)  # while rank 0 reads and tokenises; who dies is seen by the launcher, which ends the others


def own_rank() -> int:
    """This process' number, as `torchrun` and `accelerate launch` give it."""
    return int(os.environ.get("RANK", "0"))


def from_rank_zero(work: Callable[[], _T]) -> _T:
    """The result of `work`, done by rank 0 alone; its error, if any, is raised in every process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work()
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(timeout=_WAIT)  # joins the process group, with the backend that fits the device
    answer: list[Any] = [None, None]
    if own_rank() == 0:
        try:
            answer[0] = work()
        except LarasError as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    result: _T = answer[0]
    return result


def goes_on_alone() -> bool:
    """Ends what the processes do together; True in the one that does what is left: show, score, report."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    return own_rank() == 0
