"""A private copy of a model for attacks: fused, laid out and rounded for speed, refreshed from the live model."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._copies import evaluation_copy, verify
from bnsurgery._data import check_labels
from bnsurgery._graphs import Captured
from bnsurgery._modes import global_state
from bnsurgery._tracing import PRODUCERS, leaves
from bnsurgery.adapters import check_attack, craft, is_autoattack, is_torchattacks
from bnsurgery.attacks import PGD
from bnsurgery.engine import Engine
from bnsurgery.errors import BNSurgeryWarning, FusionError
from bnsurgery.folding import FusionPlan, apply_plan, fused_parameters, plan_fusion
from bnsurgery.layers import bn_layers, device_of, has_statistics, named_modules, unwrap

CACHE = 8 * 2**20
"""Bytes of the largest activation that a chunk may have on a CPU: it then stays in the cache between two layers."""
FEWEST = 16
"""Examples below which small layers leave the cores idle."""
MOST_CHANGES = 5
"""Copies made anew in a row, before there are no more."""


class Replica:
    """One private copy, for one path through the model.

    Attributes:
        net: what attacks run on: inputs (N, ...) as the live model takes them to logits (N, K) in their dtype.
        plan: which BN layers have gone where.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        engine: Engine,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,  # noqa: A002 - the public name
        plan: FusionPlan,
    ) -> None:
        """Copies the model.

        Args:
            model: the live model, without wrappers; its values are read at each :meth:`refresh`.
            example: a few inputs, such as a batch begins with.
            engine: the switches.
            dtype: what convolutions and linear layers compute in; None for their own.
            compile: run the copy through ``torch.compile``.
            plan: what to fuse.

        Raises:
            FusionError: the model cannot be copied, or does not run on the example.
        """
        self.model, self.engine, self.dtype, self.plan = model, engine, dtype, plan
        with global_state(device_of(model), seed=0):
            self._copy = self._checked(example)
            self.whole = _touch(model, self._copy, example, engine)
            self._copy = self._lowered(example)
            self._largest: dict[tuple[int, ...], int] = {}
            self.measure(example)
        self._seen = signature(model)
        self._link()
        run: Any = torch.compile(self._copy) if compile else self._copy
        self.net = _Net(run, self)
        self._graphs: dict[Any, Any] = {}
        self.classes = 0

    def refresh(self) -> bool:
        """Writes the live model's values into the copy, in place; False where the live model is no longer the same.

        That is: modules, hooks, shapes or plain attributes have changed, and a new copy is needed.
        """
        if signature(self.model) != self._seen:
            return False
        with torch.no_grad():
            for (weight, bias), target in zip(fused_parameters(self._pairs), self._targets, strict=True):
                held: Tensor = target.weight  # type: ignore[assignment]
                held.copy_(weight.to(held.dtype))  # first the cast, then the change of layout: two fast passes
                target.bias.copy_(bias)  # type: ignore[operator]
            sources = [getattr(module, name) for module, name in self._others]
            if sources:
                torch._foreach_copy_(self._others_copies, [source.detach() for source in sources])
            for module, own, name in self._attributes:
                value = vars(module).get(name)
                held = vars(own)[name]
                if isinstance(value, Tensor) and value.shape == held.shape:
                    held.detach().copy_(value)
                elif isinstance(value, Tensor):
                    vars(own)[name] = value.detach().to(held.dtype, copy=True)
        return True

    def measure(self, example: Tensor) -> None:
        """Takes note of how large the activations of inputs like these are."""
        if not self.whole and self.engine.chunk == "auto":
            self._largest[tuple(example.shape[1:])] = _largest_activation(self._copy, example)

    def chunks(self, x: Tensor) -> int:
        """Into how many parts a batch is cut."""
        size = self.engine.chunk
        if self.whole or size is None:
            return 1
        if size == "auto":
            largest = self._largest.get(tuple(x.shape[1:])) or max(self._largest.values())
            size = max(FEWEST, CACHE // largest)
        return max(math.ceil(len(x) / size), 1)

    def laid_out(self, x: Tensor) -> Tensor:
        """Inputs in the memory format of the copy."""
        return channels_last(x) if self._images_channels_last else x

    def search(self, attack: PGD, pixels: Tensor, y: Tensor, begin: Tensor, dtype: torch.dtype) -> Tensor:
        """The loop of a PGD on the copy, part by part."""
        parts = self.chunks(pixels)
        found = []
        for own, labels, start in zip(
            *(torch.tensor_split(tensor, parts) for tensor in (self.laid_out(pixels), y, self.laid_out(begin))),
            strict=True,
        ):
            advance = None
            if self.engine.cuda_graph and own.is_cuda and attack.steps:
                advance = self._captured(attack, start, own, labels, dtype)
            found.append(attack.search(self.net.part, own, labels, start, dtype, advance))
        return torch.cat(found)

    def _captured(self, attack: PGD, start: Tensor, own: Tensor, labels: Tensor, dtype: torch.dtype) -> Any:
        """The attack's step in a CUDA graph, or None where it cannot be captured."""
        if not self.classes:
            with torch.no_grad():
                self.classes = self.net.part(attack._inputs(own[:1]).to(dtype)).shape[1]
        check_labels(labels, torch.empty((len(labels), self.classes), device="meta"))
        # A callback may change the attack, and a captured step would not know.
        key = (*(item for item in vars(attack).items() if _is_plain(item[1])), attack.loss, start.shape, start.dtype)
        if key not in self._graphs:
            try:
                self._graphs[key] = Captured(
                    lambda current, pixels, y: attack.advance(self.net.part, current, pixels, y, dtype),
                    (start, own, labels),
                )
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"the attack's step cannot be captured in a CUDA graph ({reason}): it runs without",
                    BNSurgeryWarning,
                    stacklevel=2,
                )
                self._graphs[key] = None
        return self._graphs[key]

    def _checked(self, example: Tensor) -> nn.Module:
        """A fused copy whose outputs are the model's."""
        copy = apply_plan(self.plan, self.model)
        if self.plan.fused:
            try:
                verify(evaluation_copy(self.model), copy, example, lambda wide: apply_plan(self.plan, wide))
            except FusionError as error:
                _say(f"attacks run on a copy that is not fused: {error}")
                self.plan = FusionPlan((), tuple((name, "the fused copy was wrong") for _, name in self.plan.fused))
                copy = apply_plan(self.plan, self.model)
        return copy.requires_grad_(False)

    def _lowered(self, example: Tensor) -> nn.Module:
        """The copy, laid out and in the dtype asked for, in the first way in which it runs."""
        self._images_channels_last = False
        if self.engine.channels_last and example.dim() == 4:
            laid_out = evaluation_copy(self._copy).to(memory_format=torch.channels_last)
            if runs_channels_last(laid_out, example, modes=(False,)):
                self._copy, self._images_channels_last = laid_out, True
        if self.dtype is None:
            return self._copy
        error: Exception | None = None
        for lower in (_round_products, _round_all):
            copy = evaluation_copy(self._copy)
            lower(copy, self.dtype)
            try:
                _forward(copy, example)
                return copy
            except Exception as failure:
                error = failure
        _say(f"attacks run in the model's own precision: it does not run in {self.dtype} ({error})")
        self.dtype = None
        return self._copy

    def _link(self) -> None:
        """Finds out which values of the live model go where in the copy."""
        live, copies = dict(named_modules(self.model)), dict(named_modules(self._copy))
        gone = {name for _, name in self.plan.fused}
        fused = {producer for producer, _ in self.plan.fused}
        self._pairs = [(live[producer], live[name]) for producer, name in self.plan.fused]
        self._targets = [copies[producer] for producer, _ in self.plan.fused]
        self._others: list[tuple[nn.Module, str]] = []
        self._others_copies: list[Tensor] = []
        self._attributes: list[tuple[nn.Module, nn.Module, str]] = []
        for name, module in live.items():
            if name in gone or name not in copies:
                continue
            held = _tensors(copies[name])
            for key in _tensors(module):
                target = held.get(key)
                if target is not None and not (name in fused and key in ("weight", "bias")):
                    if key in vars(module):
                        self._attributes.append((module, copies[name], key))
                        continue
                    self._others.append((module, key))
                    self._others_copies.append(target.detach())


_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
"""By what logits differ, relative to the largest, where a batch is cut."""


class _Net(nn.Module):
    """The copy, as any attack may call it: whole batches in and out, cut inside."""

    def __init__(self, run: Any, replica: Replica) -> None:
        super().__init__()
        self.run = run
        self._replica = (replica,)  # hidden from nn.Module
        self.eval()

    def part(self, x: Tensor) -> Tensor:
        """Logits of one part of a batch."""
        logits: Tensor = self.run(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, ...), in the dtype of the inputs."""
        (replica,) = self._replica
        parts = replica.chunks(x)
        x = replica.laid_out(x)
        if parts == 1:
            return self.part(x).to(x.dtype)
        return torch.cat([self.part(part) for part in torch.tensor_split(x, parts)]).to(x.dtype)


def planned(model: nn.Module, example: Tensor, engine: Engine) -> FusionPlan:
    """What is to be fused, for inputs like these; nothing, with a warning, where the model cannot be traced."""
    if not engine.fuse:
        return FusionPlan(())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BNSurgeryWarning)  # no BN layer is no news here
            return plan_fusion(model, example, strict=False)
    except FusionError as error:
        evaluation_copy(model)  # raises where there can be no copy at all
        _say(f"attacks run on a copy that is not fused: {error}")
        return FusionPlan(())


def _example(model: nn.Module, x: Tensor) -> Tensor | None:
    """The fewest inputs of a batch on which a copy of the model runs as on all of it; None where it gives no logits.

    Raises:
        FusionError: there can be no copy.
    """
    for example in (x[:2], x):
        copy = evaluation_copy(model)
        with suppress(Exception), torch.no_grad(), global_state(device_of(model), seed=0):
            logits = copy(example.detach().clone())
            if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(example):
                return example.detach().clone()
    return None


def runs_channels_last(model: nn.Module, x: Tensor, *, modes: Sequence[bool]) -> bool:
    """Whether a model, of which a copy is tried out, takes images like x with the channels innermost in memory.

    A ``view`` over channels and positions does not, for one.
    """
    if x.dim() != 4:
        return False
    with suppress(Exception), torch.no_grad(), global_state(device_of(model), seed=0):
        for mode in modes:
            copy = evaluation_copy(model)
            for module in copy.modules():
                module.training = mode
                module._forward_hooks.clear()  # they may write down what they see
                module._forward_pre_hooks.clear()
            copy(channels_last(x.detach().clone()))
        return True
    return False


def channels_last(x: Tensor) -> Tensor:
    """Images (N, C, H, W) with the channels innermost in memory; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def signature(model: nn.Module) -> list[Any]:
    """What a copy rests on besides values: modules, their classes, hooks, attributes, and shapes of tensors."""
    parts: list[Any] = []
    for module in model.modules():
        parts.append(_Same(module))
        parts.append(type(module))
        skipped = _SKIPPED | {"momentum"} if isinstance(module, _BatchNorm) else _SKIPPED
        for name, value in vars(module).items():
            if name in skipped or isinstance(value, Tensor) or (isinstance(value, (dict, list)) and not value):
                continue
            parts.append((name, _account(value)))
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    parts.append((name, tensor.shape, tensor.dtype, tensor.device))
    return parts


_PLAIN = frozenset((bool, int, float, str, type(None)))
_SKIPPED = frozenset(("_parameters", "_buffers", "_modules", "training", "track_running_stats"))


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(type(part) in _PLAIN for part in value))


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


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors held as plain attributes."""
    own = vars(module)
    held = {**own["_parameters"], **own["_buffers"]}
    held.update({name: value for name, value in own.items() if isinstance(value, Tensor) and value.is_leaf})
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _round_products(copy: nn.Module, dtype: torch.dtype) -> None:
    """Convolutions and linear layers alone: the input is normalised, and BN layers compute, with all digits."""

    def cast(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
        )

    for module in copy.modules():
        if isinstance(module, PRODUCERS):
            module.to(dtype)
            module.register_forward_pre_hook(cast)


def _round_all(copy: nn.Module, dtype: torch.dtype) -> None:
    """Everything but BN layers, and the input."""
    for module in copy.modules():
        if not isinstance(module, _BatchNorm):
            for tensor in _tensors(module).values():
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    copy.register_forward_pre_hook(
        lambda _module, inputs: tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    )


def _forward(copy: nn.Module, x: Tensor) -> Tensor:
    """The output of a forward and a backward pass, to see that both can be done."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits: Tensor = copy(x)
        torch.autograd.grad(logits.float().sum(), x, allow_unused=True)
    return logits.detach()


def _touch(model: nn.Module, copy: nn.Module, example: Tensor, engine: Engine) -> bool:
    """Whether examples of a batch touch one another in evaluation mode, so that it must not be cut."""
    if engine.chunk is None or (engine.chunk == "auto" and device_of(model).type != "cpu"):
        return True
    layers = bn_layers(model, strict=False) if any(isinstance(m, _BatchNorm) for m in model.modules()) else {}
    modules = dict(named_modules(copy))
    if any(not has_statistics(layer) for layer in layers.values()):
        return True
    if any(isinstance(module, _BatchNorm) and module.training for module in modules.values()) or len(example) < 2:
        return True
    with torch.no_grad():
        whole = copy(example)
        try:
            parts = torch.cat([copy(part) for part in torch.tensor_split(example, 2)])
        except Exception:
            return True  # it takes batches of one size alone
    if whole.shape != parts.shape:
        return True
    scale = float(whole.abs().amax()) or 1.0
    return not float((whole - parts).abs().amax()) <= _ROUNDING.get(whole.dtype, 1e-2) * scale


def _largest_activation(copy: nn.Module, example: Tensor) -> int:
    """Bytes of the largest tensor that a module returns, for one example."""
    largest = [example[:1].numel() * example.element_size()]

    def look(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        largest.extend(tensor.numel() * tensor.element_size() // len(example) for tensor in leaves(outputs, Tensor))

    with _hooked(copy, look), torch.no_grad():
        copy(example)
    return max(largest)


@contextmanager
def _hooked(copy: nn.Module, look: Any) -> Iterator[None]:
    handles: Sequence[Any] = [module.register_forward_hook(look) for module in copy.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _say(message: str) -> None:
    warnings.warn(message, BNSurgeryWarning, stacklevel=6)


class Replicas:
    """The copies of one live model: one for each path through it that inputs of different shapes take."""

    def __init__(self, model: nn.Module, engine: Engine, *, dtype: torch.dtype | None, compile: bool) -> None:  # noqa: A002
        self._model, self._engine, self._dtype, self._compile = model, engine, dtype, compile
        self._by_shape: dict[Any, Replica] = {}
        self._changes = 0
        self.none = False

    def fresh(self, x: Tensor) -> Replica | None:
        """A copy for inputs like x (N, ...), with the live model's values; None, said once, where there can be none."""
        if self.none or torch.is_inference_mode_enabled():
            return None
        key = tuple(x.shape[1:]), x.dtype
        replica = self._by_shape.get(key)
        if replica is not None:
            if replica.refresh():
                self._changes = 0
                return replica
            self._by_shape.clear()
            self._changes += 1
            if self._changes > MOST_CHANGES:
                return self._nothing("the model's modules, hooks or attributes change with each batch")
        try:
            example = _example(self._model, x)
            if example is None:
                return None  # the attack itself will say what is wrong with the model
            self._by_shape[key] = self._for(example)
        except FusionError as error:
            return self._nothing(str(error))
        return self._by_shape[key]

    def _for(self, example: Tensor) -> Replica:
        with global_state(device_of(self._model), seed=0):
            plan = planned(self._model, example, self._engine)
        for replica in self._by_shape.values():
            if replica.plan == plan and replica.refresh():
                replica.measure(example)
                return replica
        return Replica(self._model, example, self._engine, dtype=self._dtype, compile=self._compile, plan=plan)

    def _nothing(self, reason: str) -> Replica | None:
        self.none = True
        self._by_shape.clear()
        warnings.warn(
            f"attacks run on the live model, as with engine='plain': {reason}", BNSurgeryWarning, stacklevel=5
        )
        return None


def can_attack_a_copy(attack: Any, model: nn.Module) -> bool:
    """Whether an attack gives on a copy of the model what it gives on the model.

    Callables may know the model from elsewhere, or look into it; an attack object may be bound to a wrapper around it.
    """
    if isinstance(attack, PGD):
        own = (getattr(type(attack), name) is getattr(PGD, name) for name in ("__call__", "run", "search"))
        return attack.bn == "eval" and all(own)
    if not (is_torchattacks(attack) or is_autoattack(attack)):
        return False
    if not isinstance(attack.model, nn.Module) or getattr(attack, "_model_training", False):
        return False
    bound = unwrap(attack.model)
    return bound is model or all(module is not model for module in bound.modules())


def craft_on_copy(
    replica: Replica,
    attack: Any,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    batch_size: int | None = None,
) -> Tensor:
    """As :func:`bnsurgery.adapters.craft`, on a copy."""
    if isinstance(attack, PGD):
        check_attack(attack)

        def search(pixels: Tensor, labels: Tensor, begin: Tensor) -> Tensor:
            return replica.search(attack, pixels, labels, begin, x.dtype)

        return attack.run(search, x, y, generator=generator)
    return craft(attack, replica.net, x, y, generator=generator, batch_size=batch_size)
