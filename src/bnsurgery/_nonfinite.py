"""Find out where numbers go wrong: the first layer of a forward pass that gives NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bnsurgery.layers import label, named_modules


class _Found(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """The place has been found."""


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of some tensors are finite: one answer from the device, in few operations."""
    return math.isfinite(float(largest(tensors)))


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest magnitude in some tensors, float64 (): it cannot overflow, and is NaN where one value is."""
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floating:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(part, torch.inf) for part in floating if part.layout != torch.strided]
    dense = [part for part in floating if part.layout == torch.strided]
    for group in {(part.device, part.dtype) for part in dense}:
        norms += torch._foreach_norm([part for part in dense if (part.device, part.dtype) == group], torch.inf)
    where = norms[0].device
    return torch.stack([norm.double().to(where) for norm in norms]).max()


def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """The first place in a forward pass where a value is not finite, in words; None where all of them are.

    What the pass changes is for the caller to put back.
    """
    seen: list[str] = []

    def given(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, inputs: Any, named: Any) -> None:
            if not _all_finite((inputs, named)):
                seen.append(f"what {label(name, layer)} is given")
                raise _Found

        return look

    def gave(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, _inputs: Any, outputs: Any) -> None:
            if not _all_finite(outputs):
                seen.append(f"what {label(name, layer)} gives")
                raise _Found

        return look

    with ExitStack() as stack, torch.no_grad():
        for name, module in named_modules(model):
            if not any(True for _ in module.children()):
                stack.callback(module.register_forward_pre_hook(given(name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(gave(name)).remove)
        try:
            forward()
        except _Found:
            return seen[0]
    return None


def _all_finite(values: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
