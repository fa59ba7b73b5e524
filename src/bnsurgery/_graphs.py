"""A step captured in a CUDA graph: launched as one, whatever the number of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from bnsurgery._data import check_labels
from bnsurgery._signature import settings
from bnsurgery.attacks import PGD, Advance, cross_entropy
from bnsurgery.errors import BNSurgeryWarning

WARM_UP = 3
"""Calls before the capture: libraries choose their algorithms and allocate their workspaces in the first ones."""
MOST_CAPTURES = 5
"""Of an attack that changes with each batch: a capture costs several passes."""


class Captured:
    """A function of tensors of fixed shapes, captured; it returns tensors of their own with each call."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        """Captures it on inputs like these; weights that it reads may change in place between calls.

        Raises:
            RuntimeError: it does what a graph cannot hold, such as waiting for the device.
        """
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        side = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream(inputs[0].device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for held, given in zip(self._inputs, inputs, strict=True):
            if held.data_ptr() != given.data_ptr():
                held.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)  # the next replay writes to the same memory


class Steps:
    """The captured steps of attacks on one network, one for each shape of a batch."""

    def __init__(self, net: Callable[[Tensor], Tensor], values: Callable[[], list[Tensor]]) -> None:
        """``net`` takes inputs to logits (N, K), and reads ``values``, which may change in place alone."""
        self._net, self._values = net, values
        self._held: dict[Any, tuple[list[Any], Captured | None, int]] = {}
        self._classes = 0

    def clear(self) -> None:
        """Forgets all steps: values were put in other places."""
        self._held = {key: ([], None, captures) for key, (_, _, captures) in self._held.items()}

    def captured(
        self, attack: PGD, start: Tensor, pixels: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> Advance | None:
        """The attack's step in a CUDA graph, or None where it cannot be captured."""
        if any(getattr(type(attack), name) is not getattr(PGD, name) for name in ("advance", "losses")):
            return None  # it may keep something from step to step
        if attack.loss is not cross_entropy:
            return None  # what it reads besides its arguments would stay what it was
        if not self._classes:
            with torch.no_grad():
                self._classes = self._net(attack._inputs(pixels[:1]).to(dtype)).shape[1]
        check_labels(labels, torch.empty((len(labels), self._classes), device="meta"))
        # A callback may change the attack, and a captured step would not know.
        key, now = (start.shape, start.dtype, dtype), settings(attack)
        seen, step, captures = self._held.get(key, ([], None, 0))
        if seen != now:
            step = self._capture(attack, (start, pixels, labels), dtype) if captures < MOST_CAPTURES else None
            self._held[key] = now, step, captures + 1
        else:
            self._held[key] = now, step, max(captures - 1, 0)
        return cast("Advance | None", step)

    def _capture(self, attack: PGD, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Captured | None:
        held = [id(value) for value in self._values()]
        try:
            step = Captured(
                lambda current, pixels, labels: attack.advance(self._net, current, pixels, labels, dtype), inputs
            )
            if held != [id(value) for value in self._values()]:
                raise RuntimeError("the model makes a buffer anew in each pass")
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"the attack's step cannot be captured in a CUDA graph ({reason}): it runs without",
                BNSurgeryWarning,
                stacklevel=3,
            )
            return None
        return step
