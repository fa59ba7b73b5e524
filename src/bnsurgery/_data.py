"""Check what callers hand in as data, before anything changes, and say what came and what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

Data: TypeAlias = Iterable[Any] | tuple[Tensor, Tensor]
"""An iterable of ``(x, y)`` batches, or one pair of tensors."""


def is_pair(data: object) -> TypeGuard[tuple[Tensor, Tensor]]:
    """Whether this is one pair of tensors (x, y) rather than an iterable of batches."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def batches_of(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The ``(x, y)`` batches of an iterable, or of a pair of tensors cut to ``batch_size``."""
    if is_pair(data):
        x, y = unpack(data)
        yield from zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
        return
    if not isinstance(data, Iterable):
        raise ValueError(f"data must be an iterable of (x, y) batches or one pair of tensors, got {describe(data)}")
    for batch in data:
        yield unpack(batch)


def gather(data: Data, batch_size: int, most: int | None) -> tuple[Tensor, Tensor]:
    """The first ``most`` examples in memory: x (N, ...) and y (N,), on the CPU."""
    pairs: list[tuple[Tensor, Tensor]] = []
    count = 0
    for x, y in batches_of(data, batch_size):
        pairs.append((x.cpu(), y.cpu().long()))
        count += len(y)
        if most is not None and count >= most:
            break
    if not count:
        raise ValueError("data has no examples")
    return torch.cat([x for x, _ in pairs])[:most], torch.cat([y for _, y in pairs])[:most]


def given(inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    """What a BN layer was called with, as its hooks are told: by position or by name."""
    return inputs[0] if inputs else named["input"]


def unpack(batch: object) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one batch, shapes and types checked.

    Raises:
        ValueError: not a pair of tensors, inputs not floating point, labels not integers, or lengths that differ.
    """
    if not is_pair(batch):
        raise ValueError(f"data must yield pairs (x, y) of tensors, got {describe(batch)}")
    x, y = batch
    check_pair(x, y)
    return x, y


def check_pair(x: Tensor, y: Tensor) -> None:
    """Raises :class:`ValueError` unless x is floating point (N, ...) and y holds N integer labels."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise ValueError(f"x and y must be tensors, got {describe(x)} and {describe(y)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}: scale images to [0, 1] first")
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, ...), got {tuple(x.shape)}")
    if y.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"y must hold integer labels, got {y.dtype}")
    if y.shape != x.shape[:1]:
        hint = ": batch single examples first, in a DataLoader for example" if y.dim() == 0 else ""
        raise ValueError(f"y must have shape ({len(x)},) to go with x {tuple(x.shape)}, got {tuple(y.shape)}{hint}")


def check_bounds(x: Tensor, bounds: tuple[float, float], *, tolerance: float = 1e-4) -> None:
    """Raises :class:`ValueError` where inputs are not finite or lie outside the bounds."""
    if x.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    if not (bounds[0] - tolerance <= low and high <= bounds[1] + tolerance):
        raise ValueError(
            f"x must lie in bounds=({bounds[0]:g}, {bounds[1]:g}), got values from {low:.4g} to {high:.4g}: scale the "
            "inputs, or say mean= and std= if they are normalised (to PGD, or to evaluate)"
        )


def check_eps(eps: float, norm: str, bounds: tuple[float, float]) -> None:
    """Raises :class:`ValueError` unless eps is finite, at least 0 and, for L-infinity, less than all there is."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    if norm == "linf" and eps > bounds[1] - bounds[0] > 0:
        raise ValueError(
            f"eps must be in the units of bounds=({bounds[0]:g}, {bounds[1]:g}), got {eps:g}, which is more than their "
            f"whole range: did you mean {eps:g}/255?"
        )


def check_labels(y: Tensor, logits: Tensor) -> None:
    """Raises :class:`ValueError` unless logits are (N, K) and labels lie in 0 ... K - 1."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must return logits ({len(y)}, classes), got {describe(logits)}: wrap it")
    if logits.dim() != 2 or len(logits) != len(y):
        raise ValueError(f"the model must return logits ({len(y)}, classes), got {tuple(logits.shape)}")
    if len(y):
        low, high = (int(value) for value in torch.aminmax(y))
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"y must lie in 0 ... {logits.shape[1] - 1}, got labels from {low} to {high}")


def describe(value: object) -> str:
    """A short account of a value for a message: shapes for tensors, types for the rest."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(describe(part) for part in value[:3])})"
    return f"a {type(value).__name__}"
