"""Which decoder layers of a model are alike: by modules, shapes and settings, and by what the configuration lists."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import nn

_Place = tuple[str, str]  # path of a module within its layer, and what is said of it
_SETTINGS = (bool, int, float, str, tuple, list)
DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # of the setting that says how many there are


def decoder_layers(model: nn.Module, layers: int) -> list[nn.Module]:
    """The list of layers that repeats; the one with most parameters where several have that length."""
    found = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == layers]

    def size(part: Any) -> int:
        return sum(int(parameter.numel()) for parameter in part.parameters())

    return list(max(found, key=size)) if found else []


def kinds_of_layers(model: Any, layers: int) -> tuple[Hashable, ...]:
    """Of every layer all that decides what it does, its number apart; layers of one kind are equal.

    Args:
        model: As transformers builds it.
        layers: Its depth.

    Returns:
        Nothing where the model has no list of so many layers.
    """
    said = [_said_of(layer) for layer in decoder_layers(model, layers)]
    for name, values in model.config.get_text_config().to_dict().items():
        if isinstance(values, list) and len(values) == len(said):
            for of_layer, value in zip(said, values, strict=True):
                of_layer["config", name] = _plain(value)
    numbered = {place for place in set().union(*said) if _is_number(place, said)}
    return tuple(
        tuple(sorted((place, repr(value)) for place, value in of_layer.items() if place not in numbered))
        for of_layer in said
    )


def _said_of(layer: nn.Module) -> dict[_Place, Any]:
    """What the modules of a layer are, hold and are set to."""
    found: dict[_Place, Any] = {}
    for path, module in layer.named_modules():
        found[path, "class"] = type(module).__qualname__
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[path, name] = tensor.shape, tensor.dtype
        for name, value in vars(module).items():
            if isinstance(value, _SETTINGS) and not name.startswith("_") and name not in DEPTH_NAMES:
                found[path, name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A setting; of a fraction only whether it is nought, as a dropout may be: scales take neither memory nor work."""
    return bool(value) if isinstance(value, float) else value


def _is_number(place: _Place, said: Sequence[dict[_Place, Any]]) -> bool:
    """Whether that setting is, wherever it stands, the number of the layer, counted from 0 or 1."""
    values = [(number, of_layer[place]) for number, of_layer in enumerate(said) if place in of_layer]
    are_numbers = all(type(value) is int for _, value in values)
    return are_numbers and {value - number for number, value in values} in ({0}, {1})
