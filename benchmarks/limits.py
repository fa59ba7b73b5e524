"""What the machine could do at best: convolutions by themselves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import torch.nn.functional as F
from measuring import now
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CONVOLUTIONS = ((64, 32), (128, 16), (256, 8), (256, 14), (512, 7))
"""Channels, and height and width, of the 3x3 convolutions whose best rate is the limit."""


def flop_of_pass(model: nn.Module, example: Tensor) -> int:
    """FLOP of convolutions and linear layers for one image: forward, and as much again for the input's gradient."""
    counter = FlopCounterMode(display=False)
    model.eval()
    with torch.no_grad(), counter:
        model(example)
    return 2 * counter.get_total_flops()


class Timed:
    """A call that is timed over so many repetitions that the clock is fine enough."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self._call, self._device, self._calls = call, device, 1

    def warm_up(self, seconds: float) -> None:
        """Finds how many calls take so long."""
        self.seconds()
        self._calls = max(1, math.ceil(seconds / self.seconds()))

    def seconds(self) -> float:
        """Of one call, over these calls."""
        began = now(self._device)
        for _ in range(self._calls):
            self._call()
        return (now(self._device) - began) / self._calls


class Convolution(Timed):
    """A 3x3 convolution and the gradient of its input, channels last: what most of an attack is made of."""

    def __init__(self, channels: int, size: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name = f"{channels} channels, {size} x {size}, batch {batch}"
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        x = torch.randn(batch, channels, size, size, **options)
        weight = torch.randn(channels, channels, 3, 3, **options) / (3 * channels**0.5)
        x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
        gradient = torch.randn_like(x)
        x.requires_grad_()
        self._flop = 2 * 2 * batch * size**2 * channels**2 * 9
        super().__init__(lambda: torch.autograd.grad(F.conv2d(x, weight, padding=1), x, gradient), device)

    def rate(self) -> float:
        """FLOP/s."""
        return self._flop / self.seconds()


def convolutions_alone(
    model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The convolutions of a model on a batch and nothing else, channels last: their forward, and their backward pass.

    Inputs are random numbers of the right shapes; of the first one the gradient is taken too, as attacks do.
    """
    layers: list[tuple[nn.Conv2d, torch.Size, torch.Size]] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layers.append((module, inputs[0].shape, output.shape))  # type: ignore[arg-type]

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    held = []
    for layer, given, made in layers:
        tensors = torch.randn(given), layer.weight.detach(), torch.randn(made)
        laid_out = [tensor.to(x.device, dtype, memory_format=torch.channels_last) for tensor in tensors]
        held.append((layer, *laid_out))

    def forward() -> None:
        with torch.no_grad():
            for layer, given, weight, _ in held:
                F.conv2d(given, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    def backward() -> None:
        for layer, given, weight, gradient in held:
            options = (layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)
            torch.ops.aten.convolution_backward(gradient, given, weight, None, *options, (True, False, False))

    return forward, backward
