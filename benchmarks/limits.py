"""What the machine could do at best: convolutions, and all operations of a network, by themselves."""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import torch.nn.functional as F
from measuring import now
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

ALIGNED = 64
"""Numbers between the beginnings of tensors: whole cache lines."""
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


class Operations:
    """All operations of a pass through a network, each timed by itself, over and over on the same random numbers.

    The sum is about the least that the pass takes where its operations run one after the other: nothing comes in
    between, and what fits into the caches is there. Views count for nothing. For CPUs: a GPU may run a captured pass in
    less time than it takes to launch these.
    """

    def __init__(self, pass_: Callable[[], object], device: torch.device) -> None:
        with _Recording() as recording:
            pass_()
        # Operations take turns on the same memory; tensors of one of them lie apart.
        held = {
            dtype: torch.empty(size, dtype=dtype, device=device).uniform_(-1, 1)
            for dtype, size in recording.sizes.items()
        }
        self._times = [
            (count, Timed(_on_random_numbers(*recording.calls[key], held), device))
            for key, count in recording.counts.items()
        ]

    def warm_up(self, seconds: float) -> None:
        """Finds for each kind how many calls take so long."""
        with torch.no_grad():
            for _, timed in self._times:
                timed.warm_up(seconds)

    def seconds(self) -> float:
        """Of all of them."""
        with torch.no_grad():
            return sum(count * timed.seconds() for count, timed in self._times)


def pass_of_attack(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The gradient of the loss in the input, channels last, as if BN cost nothing: it is left out."""
    net = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, nn.Identity())
    net.to(dtype=dtype, memory_format=torch.channels_last)
    x = x.detach().to(dtype=dtype, memory_format=torch.channels_last).requires_grad_()
    return lambda: torch.autograd.grad(F.cross_entropy(net(x), y), x)


def pass_of_update(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """The gradient of the loss in gamma and beta, in training mode, channels last."""
    net = copy.deepcopy(model).train().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    affine = [p for m in net.modules() if isinstance(m, _BatchNorm) for p in m.parameters()]
    for parameter in affine:
        parameter.requires_grad_()
    x = x.detach().to(memory_format=torch.channels_last)
    return lambda: torch.autograd.grad(F.cross_entropy(net(x), y), affine)


@dataclass(frozen=True)
class _Numbers:
    """A tensor of floating-point numbers, but for its values.

    Attributes:
        offset: where it begins among the numbers of its dtype; the same for the same tensor, within a call.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Recording(TorchDispatchMode):
    """Takes down which operations are called, and how often with inputs of the same kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.calls: dict[str, tuple[Any, Any, Any]] = {}
        self.sizes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        met: dict[int, _Numbers] = {}
        ends: Counter[torch.dtype] = Counter()

        def described(value: object) -> object:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value  # indices are not arbitrary
            if id(value) not in met:
                met[id(value)] = _Numbers(ends[value.dtype], tuple(value.shape), value.stride(), value.dtype)
                steps = zip(value.shape, value.stride(), strict=True)  # expanded ones lie on the same numbers
                span = 1 + sum(max(size - 1, 0) * stride for size, stride in steps)
                ends[value.dtype] += math.ceil(span / ALIGNED) * ALIGNED
            return met[id(value)]

        given = tree_map(described, (args, kwargs or {}))
        shapes = tree_map(lambda value: value.shape if isinstance(value, Tensor) else value, given)
        key = f"{func} {shapes}"
        self.sizes |= ends  # the larger ones
        self.counts[key] += 1
        self.calls.setdefault(key, (func, *given))
        return func(*args, **(kwargs or {}))


def _on_random_numbers(func: Any, args: Any, kwargs: Any, held: Mapping[torch.dtype, Tensor]) -> Callable[[], object]:
    """The call, on these."""

    def made(value: object) -> object:
        if not isinstance(value, _Numbers):
            return value
        return held[value.dtype].as_strided(value.shape, value.stride, value.offset)

    args, kwargs = tree_map(made, (args, kwargs))
    return lambda: func(*args, **kwargs)
