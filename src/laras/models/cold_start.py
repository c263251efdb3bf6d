"""The way to the simulation for whom has not loaded its libraries: a plan that the cache answers needs none of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any


def trace_step(*arguments: Any) -> Any:
    """`laras.models.simulation.trace_step`, loaded now: it brings torch, transformers and peft."""
    if "laras.models.simulation" not in sys.modules:
        with collector_at_rest(), suppress(Exception):  # what fails here fails again below, where it is told
            import_module("laras.models.simulation")
            import_module("laras.models.build")
    from laras.models import simulation

    return simulation.trace_step(*arguments)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """For imports: thousands of modules, which stay, and through which the collector would look again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
