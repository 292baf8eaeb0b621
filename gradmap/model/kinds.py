"""A model's lists of layers, and which of them are of the same kind: the same modules, with tensors
of the same shapes and the same settings."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from torch import nn

# Where a layer is, and not what it is.
_POSITION = ("layer_idx", "training")


def layer_lists(model: nn.Module, layers: int) -> dict[str, nn.ModuleList]:
    """All lists of so many modules that are not inside another one, by path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == layers
        if is_list and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def kind_of(module: nn.Module) -> Hashable:
    """What two modules have in common that compute the same with the same weights."""
    return tuple(
        (path, type(part).__qualname__, _shapes(part), _settings(part))
        for path, part in module.named_modules()
    )


def kinds_of(layers: Iterable[nn.Module]) -> list[int]:
    """The kind of each layer, numbered in the order in which they first occur."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(kind_of(layer), len(numbers)) for layer in layers]


def _shapes(module: nn.Module) -> Hashable:
    tensors = (*module._parameters.items(), *module._buffers.items())
    return tuple((name, tuple(value.shape)) for name, value in tensors if value is not None)


def _settings(module: nn.Module) -> Hashable:
    return tuple(
        sorted(
            (name, repr(value))
            for name, value in vars(module).items()
            if isinstance(value, int | float | str | None) and name not in _POSITION
        )
    )
