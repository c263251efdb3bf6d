"""TRL's trainer and its arguments as their files define them, whatever another library has made of them.

Unsloth rebinds `trl.SFTTrainer` and replaces methods of `transformers.Trainer` when it is imported: batching, loss and
loop would be its own. In a process that has it, the five modules that make up the trainer are imported once more,
beside the changed ones and seen by nobody else, so that Laras' trainer stays the same on every backend.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer

# In the order of their imports. Source: transformers 5.17 and TRL 1.15.
_MODULES = (
    "transformers.trainer",
    "trl.trainer.base_config",
    "trl.trainer.sft_config",
    "trl.trainer.base_trainer",
    "trl.trainer.sft_trainer",
)
# What those modules import from a package that hands on what one of them defines.
_HANDED_ON = {"transformers": {"Trainer": "transformers.trainer"}}


def _trainer_classes() -> tuple[Any, Any]:
    if "unsloth" not in sys.modules:
        trl = import_module("trl")
        return trl.SFTConfig, trl.SFTTrainer
    copies = load_copies(_MODULES)
    return copies["trl.trainer.sft_config"].SFTConfig, copies["trl.trainer.sft_trainer"].SFTTrainer


def load_copies(names: Sequence[str]) -> dict[str, ModuleType]:
    """Imports modules once more from their files; `sys.modules` and the modules that are there stay as they are.

    Args:
        names: In the order of their imports; each copy sees the copies before it in place of the modules.
    """
    copies: dict[str, ModuleType] = {}
    for name in names:
        spec: Any = importlib.util.find_spec(name)
        copy = importlib.util.module_from_spec(spec)
        copy.__dict__["__builtins__"] = {**vars(builtins), "__import__": _importer(copies)}
        spec.loader.exec_module(copy)
        copies[name] = copy
    return copies


def _importer(copies: Mapping[str, ModuleType]) -> Any:
    """`__import__` that gives the copies where there are some."""

    def find(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        package = str((globals or {}).get("__package__"))
        absolute = importlib.util.resolve_name("." * level + name, package) if level else name
        if fromlist and absolute in copies:
            return copies[absolute]
        found = builtins.__import__(name, globals, locals, fromlist or (), level)
        handed_on = _HANDED_ON.get(absolute, {})
        replaced = {one: getattr(copies[home], one) for one, home in handed_on.items() if home in copies}
        return _View(found, replaced) if fromlist and replaced else found

    return find


class _View:
    """A module with other values for some of its names."""

    def __init__(self, module: Any, replaced: Mapping[str, Any]) -> None:
        self._module, self._replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._module, name)


if not TYPE_CHECKING:
    SFTConfig, SFTTrainer = _trainer_classes()

__all__ = ["SFTConfig", "SFTTrainer"]
