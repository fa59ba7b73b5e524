"""What a copy of a model rests on besides values: whether it still fits."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping, Set
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._routing import Router

_PLAIN = frozenset((bool, int, float, str, type(None)))
_CONTAINERS = frozenset((dict, OrderedDict, list, set))
_SKIPPED = frozenset(("_parameters", "_buffers", "_modules", "training", "track_running_stats"))
_SKIPPED_OF_BN = _SKIPPED | {"momentum"}
_DEEPEST = 8
"""How far settings are followed that hold settings."""
_MOST = 4096
"""Entries of a container or array that are looked at one by one, before each batch; of larger arrays, so many."""
_OPAQUE = (type, FunctionType, MethodType, BuiltinFunctionType, partial, nn.Module)
"""What counts as the same as long as it is the same object."""


def signature(model: nn.Module) -> list[Any]:
    """Modules, their classes, hooks and attributes, and shapes of tensors: equal only where none has changed."""
    # It is taken before each batch: flat, since each container made here would be work for the garbage collector.
    parts: list[Any] = []
    add = parts.append
    own: set[int] | None = None
    for module in model.modules():
        add(_Same(module) if type(module).__eq__ is not object.__eq__ else module)
        add(type(module))
        skipped = _SKIPPED_OF_BN if isinstance(module, _BatchNorm) else _SKIPPED
        for name, value in vars(module).items():
            kind = type(value)
            if name in skipped or (kind in _CONTAINERS and not value):
                continue
            if kind in _PLAIN or (kind is tuple and is_plain(value)):
                add(name)
                add(value)
            elif type(value) is Router:  # where passes go is not for long: who looks asks it
                parts += (name, value.branches)
            elif isinstance(value, _OPAQUE):  # spares gathering all tensors
                add(name)
                add(_Same(value))
            elif not isinstance(value, Tensor):
                add(name)
                if own is None:
                    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
                add(_account(value, own))
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    parts += (name, tensor.shape, tensor.dtype, tensor.device)
    return parts


def settings(attack: object) -> list[Any]:
    """The class of an attack and its attributes but the generator: equal only where none has changed."""
    parts: list[Any] = [type(attack)]
    for name, value in vars(attack).items():
        if isinstance(value, Tensor):
            parts += (name, value.tolist())
        elif name != "_generator":
            parts += (name, _account(value, frozenset()))
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
    held.update({name: value for name, value in own.items() if isinstance(value, Tensor)})
    return {name: tensor for name, tensor in held.items() if tensor is not None}


class _Same:
    """An object, equal to itself alone."""

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    __hash__ = object.__hash__


def _account(value: object, own: Set[int], depth: int = 0) -> Any:
    """A value that is equal to another account only where nothing has changed.

    Args:
        value: an attribute, or what is in one.
        own: ids of the model's parameters and buffers, whose values are not looked at.
        depth: how many objects with attributes of their own the value is in.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, (list, tuple, Mapping, set, frozenset)) and len(value) > _MOST:  # data, not settings
        return _Same(value), len(value)
    if isinstance(value, (list, tuple)):
        return [kind, *(_account(item, own, depth) for item in value)]
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(value)
    if isinstance(value, Mapping):
        return [kind, *((key, _account(item, own, depth)) for key, item in value.items())]
    if isinstance(value, Tensor):  # those made in inference mode count no versions
        return _Same(value), None if id(value) in own or value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        if value.size > _MOST:
            return _Same(value), value.shape, value.dtype.str, value.flat[:: value.size // _MOST].tobytes()
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, _OPAQUE) or not _is_followed(value, depth):
        return _Same(value)
    fields: dict[str, Any] = dict(getattr(value, "__dict__", ()))
    if dataclasses.is_dataclass(value):  # one with slots has no __dict__; a field may be without a value
        fields |= {field.name: getattr(value, field.name, dataclasses.MISSING) for field in dataclasses.fields(value)}
    return [_Same(value), *((name, _account(item, own, depth + 1)) for name, item in fields.items())]


def _is_followed(value: object, depth: int) -> bool:
    """Whether attributes of an object count. Settings may be nested; anything else may lead to half the process."""
    if dataclasses.is_dataclass(value) or isinstance(value, (Namespace, SimpleNamespace)):
        return depth < _DEEPEST
    return depth == 0
