"""What a copy of a model rests on besides values: whether it still fits."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_PLAIN = frozenset((bool, int, float, str, type(None)))
_CONTAINERS = frozenset((dict, OrderedDict, list, set))
_SKIPPED = frozenset(("_parameters", "_buffers", "_modules", "training", "track_running_stats"))
_SKIPPED_OF_BN = _SKIPPED | {"momentum"}


def signature(model: nn.Module) -> list[Any]:
    """Modules, their classes, hooks and attributes, and shapes of tensors: equal only where none has changed."""
    # It is taken before each batch: flat, since each container made here would be work for the garbage collector.
    parts: list[Any] = []
    add = parts.append
    for module in model.modules():
        add(_Same(module) if type(module).__eq__ is not object.__eq__ else module)
        add(type(module))
        skipped = _SKIPPED_OF_BN if isinstance(module, _BatchNorm) else _SKIPPED
        for name, value in vars(module).items():
            if name in skipped:
                continue
            kind = type(value)
            if kind in _PLAIN or (kind is tuple and is_plain(value)):
                add(name)
                add(value)
            elif not ((kind in _CONTAINERS and not value) or isinstance(value, Tensor)):
                add(name)
                add(_account(value))
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    parts += (name, tensor.shape, tensor.dtype, tensor.device)
    return parts


def is_plain(value: object) -> bool:
    """Whether a value is a number, a string or None, or a tuple of these."""
    if type(value) is not tuple:
        return type(value) in _PLAIN
    for part in value:  # noqa: SIM110 - several times as fast as all()
        if type(part) not in _PLAIN:
            return False
    return True


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors held as plain attributes."""
    own = vars(module)
    held = {**own["_parameters"], **own["_buffers"]}
    held.update({name: value for name, value in own.items() if isinstance(value, Tensor) and value.is_leaf})
    return {name: tensor for name, tensor in held.items() if tensor is not None}


class _Same:
    """An object, equal to itself alone."""

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    __hash__ = object.__hash__


def _account(value: object) -> Any:
    """A value that is equal to another account only where nothing has changed."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (list, tuple)):
        return [type(value), *map(_account, value)]
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(value)
    if isinstance(value, Mapping):
        return [type(value), *((key, _account(item)) for key, item in value.items())]
    if isinstance(value, Tensor):
        return _Same(value), value._version
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [
            _Same(value),
            *((field.name, _account(getattr(value, field.name))) for field in dataclasses.fields(value)),
        ]
    return _Same(value)
