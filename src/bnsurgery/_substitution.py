"""Put other modules in the place of some, wherever a model refers to them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn


def substituted(model: nn.Module, swap: Mapping[int, nn.Module]) -> nn.Module:
    """Exchanges modules of a model, in place, where they are children, and where an attribute refers to them.

    Args:
        model: changed, unless it is to be exchanged itself.
        swap: by ``id`` of a module, what takes its place. It may hold what it replaces.

    Returns:
        The model, or what took its place.
    """
    exchange = _Exchange(swap)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = swap.get(id(child), child)
        for name, value in list(vars(module).items()):
            if name != "_modules":
                new = exchange(value, module)
                if new is not value:
                    vars(module)[name] = new
    return swap.get(id(model), model)


class _Exchange:
    """Values with the modules in them exchanged: lists and dicts in place, tuples and bound methods anew."""

    def __init__(self, swap: Mapping[int, nn.Module]) -> None:
        self._swap = swap
        self._seen: list[Any] = []  # held, so that no other object gets their ids

    def __call__(self, value: Any, owner: nn.Module) -> Any:
        if isinstance(value, nn.Module):
            return self._swap.get(id(value), value)
        if isinstance(value, MethodType) and value.__self__ is not owner:
            new = self._swap.get(id(value.__self__))
            return value if new is None else getattr(new, value.__name__, value)
        if type(value) is tuple:
            parts = [self(part, owner) for part in value]
            same = all(part is before for part, before in zip(parts, value, strict=True))
            return value if same else tuple(parts)
        if isinstance(value, (list, dict)) and not any(value is seen for seen in self._seen):
            self._seen.append(value)
            for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
                new = self(part, owner)
                if new is not part:
                    value[key] = new
        return value
