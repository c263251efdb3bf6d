"""Laras fine-tunes language models: a file of examples in, a tuned model with an honest score out.

The public surface is `__all__`; everything else may change. It is loaded on first use, so that `import laras` is free.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laras.api import configure, export, inspect, plan, report, resume, sweep, test, train
    from laras.config import RunConfig
    from laras.errors import LarasError
    from laras.progress import Observer
    from laras.progress_bar import ProgressBar

__version__ = "0.1.0"
__all__ = [
    "LarasError",
    "Observer",
    "ProgressBar",
    "RunConfig",
    "__version__",
    "configure",
    "export",
    "inspect",
    "plan",
    "report",
    "resume",
    "sweep",
    "test",
    "train",
]
_HOMES = {
    "LarasError": "laras.errors",
    "Observer": "laras.progress",
    "ProgressBar": "laras.progress_bar",
    "RunConfig": "laras.config",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'laras' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "laras.api")), name)
