"""Watch one pass through a model: what each BN layer is fed with, and who else takes that tensor.

Two tracers give the same small record. :func:`trace_eager`, here, runs the model on an example and sees every operation
below autograd (``TorchDispatchMode``), inside custom autograd functions and scripted parts too; reading a shape or a
dtype is no operation there. The other is :mod:`bnsurgery._symbolic`. Both run the ``forward`` of the module that they
are given, which may leave something behind: hand them a private copy in evaluation mode.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from bnsurgery._modes import global_state
from bnsurgery.layers import device_of, is_frozen_bn, label, named_modules

T = TypeVar("T")

PRODUCERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""The layers that BN can go into: linear in their input, channel by channel of their output."""


@dataclass(frozen=True)
class Source:
    """What a BN layer is fed with.

    Attributes:
        description: where it comes from, in words.
        producer: the name of the module whose output it is, as it left it; None for anything else.
        uses: everything that takes this tensor, in words, the BN layer itself included.
        ndim: its number of dimensions; None where the trace knows no shapes.
    """

    description: str
    producer: str | None = None
    uses: tuple[str, ...] = ()
    ndim: int | None = None


@dataclass
class Trace:
    """What one pass showed; modules go by their qualified names.

    Attributes:
        calls: how often each module was called (symbolic: each leaf module).
        sources: what each BN layer that was reached is fed with.
        leaks: modules whose parameters or buffers are used outside their own ``forward``, and where.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sources: dict[str, Source] = field(default_factory=dict)
    leaks: dict[str, str] = field(default_factory=dict)


def is_bn(module: nn.Module) -> bool:
    """Whether this is a BN layer that folds: any that trains, or frozen BN."""
    return isinstance(module, _BatchNorm) or is_frozen_bn(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks of the user see, or may change, what goes through a module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def leaves(structure: object, kind: type[T]) -> Iterator[T]:
    """The instances of ``kind`` in any nesting of mappings, lists, tuples, sets and dataclasses."""
    if isinstance(structure, kind):
        yield structure
    elif isinstance(structure, Mapping):
        for value in structure.values():
            yield from leaves(value, kind)
    elif isinstance(structure, (list, tuple, set, frozenset)):
        for value in structure:
            yield from leaves(value, kind)
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        yield from leaves(vars(structure), kind)


def kept(model: nn.Module, kind: type[T]) -> Iterator[tuple[T, str]]:
    """What modules keep of a pass as attributes."""
    for name, module in named_modules(model):
        for attribute, value in list(vars(module).items()):
            for leaf in leaves(value, kind):
                yield leaf, f"attribute {attribute!r} of {label(name, module)}"


def trace_eager(model: nn.Module, args: tuple[Any, ...]) -> Trace:
    """Runs the model once and records what feeds its BN layers."""
    watch = _Watch(model, args)
    with torch.no_grad(), global_state(device_of(model), seed=0), watch, watch.wrapped():
        outputs = model(*args)
    return watch.finish(outputs)


@dataclass
class _Seen:
    """A tensor of the pass, held so that no later one gets its id."""

    tensor: Tensor
    producer: str | None
    description: str
    uses: list[str] = field(default_factory=list)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.model = model
        self.stack: list[nn.Module] = []
        self.names = {id(module): name for name, module in named_modules(model)}
        self.fed: dict[str, tuple[_Seen, int]] = {}
        self.seen: dict[int, _Seen] = {id(t): _Seen(t, None, "the model's input") for t in leaves(args, Tensor)}
        self.owners: dict[int, list[nn.Module]] = {}
        for _, module in named_modules(model):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self.owners.setdefault(id(tensor), []).append(module)

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Puts a wrapper around every ``forward``: unlike a hook it sees direct calls of ``forward`` too."""
        modules = [module for _, module in named_modules(self.model) if not isinstance(module, torch.jit.ScriptModule)]
        before = [vars(module).get("forward") for module in modules]
        for module in modules:
            vars(module)["forward"] = self.watched(module, module.forward)
        try:
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward

    def watched(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        name = self.names[id(module)]

        def call(*args: Any, **kwargs: Any) -> Any:
            self.trace.calls[name] += 1
            if is_bn(module):
                self.feed(name, module, next(leaves((args, kwargs), Tensor), None))
            self.stack.append(module)
            try:
                outputs = forward(*args, **kwargs)
            finally:
                self.stack.pop()
            if is_hooked(module):
                self.use((args, kwargs, outputs), f"a hook on {label(name, module)}")
            if _is_leaf(module) and isinstance(outputs, Tensor):
                known = self.seen.get(id(outputs))
                returned = any(outputs is tensor for tensor in leaves((args, kwargs), Tensor))
                if not returned and (known is None or known.producer is None):
                    self.seen[id(outputs)] = _Seen(outputs, name, f"the output of {label(name, module)}")
            return outputs

        return call

    def feed(self, name: str, layer: nn.Module, tensor: Tensor | None) -> None:
        if tensor is not None:
            seen = self.seen.setdefault(id(tensor), _Seen(tensor, None, "a tensor from outside the model"))
            seen.uses.append(label(name, layer))
            self.fed[name] = (seen, tensor.ndim)

    def use(self, structure: object, where: str) -> None:
        for tensor in leaves(structure, Tensor):
            if id(tensor) in self.seen:
                self.seen[id(tensor)].uses.append(where)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = self.stack[-1] if self.stack else self.model
        where = f"{_operation(func)} in {label(self.names[id(inside)], inside)}"
        if not is_bn(inside):
            self.use((args, kwargs), where)
        for tensor in leaves((args, kwargs), Tensor):
            owners = self.owners.get(id(tensor), [])
            if not any(owner is inside for owner in owners):
                self.trace.leaks.update({self.names[id(owner)]: where for owner in owners})
        outputs = func(*args, **kwargs)
        for tensor in leaves(outputs, Tensor):
            self.seen.setdefault(id(tensor), _Seen(tensor, None, f"the output of {where}"))
        return outputs

    def finish(self, outputs: object) -> Trace:
        self.use(outputs, "the model's outputs")
        for tensor, where in kept(self.model, Tensor):
            self.use(tensor, where)
        for name, (seen, ndim) in self.fed.items():
            self.trace.sources[name] = Source(seen.description, seen.producer, tuple(seen.uses), ndim)
        return self.trace


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, PRODUCERS) or is_bn(module) or not any(True for _ in module.children())


def _operation(func: Any) -> str:
    return str(getattr(getattr(func, "overloadpacket", func), "__name__", func))
