"""Save and restore what a call must not leave changed: a model's modes, flags, gradients and buffers; global state."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module, *, buffers: bool = True) -> Iterator[None]:
    """Puts a model back as it was on leaving the block, whatever happens inside.

    Restored, to the bit: every module's ``training`` flag, every parameter's ``requires_grad`` and ``grad``, every
    buffer's values (unless ``buffers=False``: where they are meant to move), and the momentum and
    ``track_running_stats`` of every BN layer. The values of parameters are not: nothing in this library changes them
    but an optimizer's step. Gradients are set aside for the block, so that a ``backward`` inside adds to none of the
    caller's.
    """
    modules = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    settings = [(layer, layer.momentum, layer.track_running_stats) for layer in _bn(model)]
    held = Buffers(model) if buffers else None
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad, grad in parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for layer, momentum, track in settings:
            layer.momentum, layer.track_running_stats = momentum, track
        if held is not None:
            held.restore()


@contextmanager
def gradients_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Takes the gradients of some parameters away for the block, and puts them back on leaving it."""
    held = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in held:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in held:
            parameter.grad = grad


class Buffers:
    """The buffers of a model, to be put back: the tensors, which a forward pass may replace, and their values."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
        self._values = Snapshot(buffer for _, own in self._held for buffer in own.values() if buffer is not None)

    def restore(self) -> None:
        """Puts the tensors back, and their values into them; may be called again."""
        for module, own in self._held:
            module._buffers.update(own)
        self._values.restore()


class Snapshot:
    """The values of some tensors, to be put back in place; a tensor that holds them still is not written to.

    (Writing to it would raise its version, and break the backward pass of a graph that the caller holds.)
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._copies = [tensor.detach().clone() for tensor in self._tensors]

    def restore(self) -> None:
        """Copies the values back, in place; may be called again."""
        with torch.no_grad():
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                if not _is_same(tensor, copy):
                    tensor.copy_(copy)


def _is_same(tensor: Tensor, copy: Tensor) -> bool:
    """Whether values are equal, NaN to NaN; False where that cannot be said, as of sparse tensors."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return torch.equal(tensor, copy) or bool(((tensor == copy) | (tensor.isnan() & copy.isnan())).all())


@contextmanager
def global_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Puts the process-wide state back on leaving the block; seeds the generators inside it where ``seed`` is given.

    Restored: torch's generators (CPU and CUDA), NumPy's and Python's, the cudnn switches, the default dtype
    and the trace function, which AutoAttack clears.
    """
    # Seeding seeds every CUDA device, so every one is put back; none is woken up for it.
    devices = range(torch.cuda.device_count()) if device.type == "cuda" or _cuda_awake() else ()
    cudnn = torch.backends.cudnn
    switches = {}
    for name in ("enabled", "benchmark", "deterministic", "allow_tf32"):
        with suppress(RuntimeError):  # allow_tf32 cannot be read where the newer fp32_precision has been set
            switches[name] = getattr(cudnn, name)
    dtype, trace = torch.get_default_dtype(), sys.gettrace()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            if seed is not None:
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_default_dtype(dtype)
        if sys.gettrace() is not trace:
            sys.settrace(trace)
        for name, value in switches.items():
            if getattr(cudnn, name) != value:
                setattr(cudnn, name, value)


def seed_of(generator: torch.Generator) -> int:
    """A seed drawn from a generator, for code that knows only the global one."""
    return int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device).item())


def _bn(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def _cuda_awake() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
