"""First imports of torch, transformers and peft, and the simulation for whom has not loaded them.

A plan that the cache answers needs none of them. What is imported stays, and the garbage collector, which would look
through it again and again, is kept from it: half of the time of a cold plan.
"""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

_process = {"is_own": False}


def own_process() -> None:
    """Says that the process is Laras' own: what it imports is there to its end, and the collector forgets it.

    Where Laras is a guest, what others hold at the time of an import may become garbage later.
    """
    _process["is_own"] = True


def load(*modules: str) -> None:
    """Imports modules of this package that bring thousands of others, and does nothing where they are loaded.

    A module that cannot be imported is left to whoever imports it next, and can tell why.
    """
    if all(module in sys.modules for module in modules):
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with suppress(Exception):
            for module in modules:
                import_module(module)
    finally:
        if _process["is_own"]:
            gc.freeze()
        if was_enabled:
            gc.enable()


def trace_step(*arguments: Any) -> Any:
    """`laras.models.simulation.trace_step`, loaded now."""
    load("laras.models.simulation", "laras.models.build")
    from laras.models import simulation

    return simulation.trace_step(*arguments)
