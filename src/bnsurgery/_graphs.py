"""A step captured in a CUDA graph: launched as one, whatever the number of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the capture: libraries choose their algorithms and allocate their workspaces in the first ones."""


class Captured:
    """A function of tensors of fixed shapes, captured; the tensors that it returns are written anew by each call."""

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
        return self._outputs
