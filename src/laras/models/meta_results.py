"""Results of operations on meta tensors, made anew from what the same operation gave before.

PyTorch finds most shapes by rules in Python, which take a tenth of a millisecond, and the layers of a decoder ask for
the same ones over and over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides in elements, type


class MetaResults:
    """Runs operations; those that were seen with arguments of the same shapes are answered without."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[bool, list[_Layout]] | None] = {}  # whether it gives one tensor, and their layouts
        self._makes_new: dict[Any, bool] = {}  # of operations: they neither write their arguments nor show parts of one

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operation returns."""
        makes_new = self._makes_new.get(func)
        if makes_new is None:
            makes_new = self._makes_new[func] = not (func.is_view or func._schema.is_mutable)
        if not makes_new:
            return func(*args, **kwargs)
        key = func, _description(args), _description(tuple(kwargs.items()))
        known = self._known.get(key)
        if known is not None:
            is_one, layouts = known
            made = [_empty(layout) for layout in layouts]
            return made[0] if is_one else tuple(made)
        out = func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = _layouts(out, args)
        return out


def _description(value: Any) -> Any:
    """All of an argument that the layout of a result can depend on; of a number its type, too."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_description, value))
    return type(value), value


def _layouts(out: Any, args: tuple[Any, ...]) -> tuple[bool, list[_Layout]] | None:
    """Layouts of the results; None where `_empty` would not make tensors like them, as of one that shares memory."""
    is_one = isinstance(out, Tensor)
    results = [out] if is_one else list(out) if isinstance(out, tuple) else []
    if not results or not all(type(one) is Tensor and one.is_meta for one in results):
        return None
    layouts: list[_Layout] = [(one.shape, one.stride(), one.dtype) for one in results]
    storages = [one.untyped_storage() for one in results]
    given = {one.untyped_storage()._cdata for one in tree_leaves(args) if isinstance(one, Tensor)}
    is_new = len(given | {one._cdata for one in storages}) == len(given) + len(storages)
    same_bytes = all(
        _empty(layout).untyped_storage().nbytes() == one.nbytes() for layout, one in zip(layouts, storages, strict=True)
    )
    return (is_one, layouts) if is_new and same_bytes else None


def _empty(layout: _Layout) -> Tensor:
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
