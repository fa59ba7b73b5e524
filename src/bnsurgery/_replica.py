"""A private copy of a model for attacks: fused, laid out and rounded for speed, refreshed from the live model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery._branches import route_of
from bnsurgery._copies import evaluation_copy, verify
from bnsurgery._fixed import fix
from bnsurgery._graphs import Steps
from bnsurgery._layouts import can_be_cut, channels_last, largest_activation, runs_channels_last
from bnsurgery._lowering import is_finite, round_all, round_products
from bnsurgery._modes import global_state
from bnsurgery._signature import signature, tensors
from bnsurgery.attacks import PGD, cross_entropy, evened
from bnsurgery.engine import Engine
from bnsurgery.errors import BNSurgeryWarning, FusionError
from bnsurgery.fusion import FusionPlan, apply_plan, fused_factors, plan_of
from bnsurgery.layers import device_of, named_modules

CACHE = {2: 16 * 2**20, 4: 4 * 2**20}
"""Bytes of the largest activation that a chunk may have on a CPU, by those of an entry; more is slower there."""
FEWEST = 16
"""Examples below which small layers leave the cores idle."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Replica:
    """One private copy, for one path through the model.

    Attributes:
        net: what attacks run on: inputs (N, ...) as the live model takes them to logits (N, K) in their dtype.
        asked: which BN layers were to go where.
        plan: which have gone.
        route: the way through the split layers of the model, where there are any, that it was made for.
        whole: batches are not cut.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        example: Tensor,
        engine: Engine,
        *,
        plan: FusionPlan,
        dtype: torch.dtype | None = None,
        compile: bool = False,  # noqa: A002 - the public name
    ) -> None:
        """Copies the model.

        Args:
            model: the live model, without wrappers; its values are read at each :meth:`refresh`.
            x: a whole batch: the copy must give the model's logits on it.
            example: the few inputs that the plan was made on.
            engine: the switches.
            plan: what to fuse.
            dtype: what convolutions and linear layers compute in; None for their own.
            compile: run the copy through ``torch.compile``.

        Raises:
            FusionError: the model cannot be copied, or does not run on the example.
        """
        self.model, self.engine, self.dtype, self.asked = model, engine, dtype, plan
        self.route = route_of(model)
        self._largest: dict[tuple[int, ...], int] = {}
        floating = [p.dtype for p in model.parameters() if p.is_floating_point()]
        self._itemsize = (dtype or (floating[0] if floating else x.dtype)).itemsize
        with global_state(device_of(model), seed=0):
            self._settle(x, example)
            self._copy = self._lowered(self._fused(), example)
            if not compile:  # the compiler finds out by itself
                self._fix(example)
        self._seen = signature(model)
        self._link()
        run: Any = torch.compile(self._copy) if compile else self._copy
        self.net = _Net(run, self)
        self._steps = Steps(self.net.part, lambda: [getattr(own, name) for _, own, name in self._others])

    def refresh(self) -> bool:
        """Writes the live model's values into the copy, in place; False where the live model is no longer the same.

        That is: modules, hooks, shapes or plain attributes have changed, and a new copy is needed.
        """
        if signature(self.model) != self._seen:
            return False
        with torch.no_grad():
            sources: list[Tensor] = []
            targets: list[Tensor] = []
            for (weight, scale, bias), target in zip(fused_factors(self._pairs), self._targets, strict=True):
                fused = target._parameters
                _multiply(weight, scale, fused["weight"])  # type: ignore[arg-type]
                sources.append(bias)
                targets.append(fused["bias"])  # type: ignore[arg-type]
            for module, own, name in self._others:
                source, held = getattr(module, name), getattr(own, name)
                if source.shape == held.shape and _writable(held):
                    sources.append(source.detach())
                    targets.append(held.detach())
                else:  # a pass has made it anew
                    own._buffers[name] = source.detach().to(held.dtype, copy=True)
                    self._steps.clear()
            if sources:
                torch._foreach_copy_(targets, sources)
            self._forget()
            for module, own, name, dtype in self._attributes:
                value, held = vars(module).get(name), vars(own).get(name)
                if not isinstance(value, Tensor):
                    continue
                if isinstance(held, Tensor) and _writable(held) and (held.shape, held.dtype) == (value.shape, dtype):
                    held.detach().copy_(value)
                else:  # a pass has put another value there, or none
                    vars(own)[name] = value.detach().to(dtype, copy=True)
                    self._steps.clear()
        return True

    def _forget(self) -> None:
        """Puts away what passes have left in the copy where the live model has nothing: values made of old weights."""
        for module, own in self._custom:
            given, held = vars(module), vars(own)
            for name, value in list(held.items()):
                if name in _OF_EVERY_MODULE:
                    continue
                if isinstance(value, Tensor) and given.get(name) is None:
                    if name in given:
                        held[name] = None
                    else:
                        del held[name]
                    self._steps.clear()
                elif isinstance(value, (dict, list, set)) and value and _is_empty(given.get(name)):
                    held[name] = copy.copy(given[name])
                    self._steps.clear()

    def serves(self, x: Tensor, example: Tensor) -> bool:
        """Whether the copy is right for batches like x too, of which ``example`` are the first few."""
        with global_state(device_of(self.model), seed=0):
            if not self.whole:
                self._measure(self._copy, example)
            try:
                self._verify(self.plan, x)
            except FusionError:
                return False
        return True

    def chunks(self, x: Tensor) -> int:
        """Into how many parts a batch is cut."""
        size = self.engine.chunk
        if self.whole or size is None:
            return 1
        if size == "auto":
            largest = self._largest.get(tuple(x.shape[1:])) or max(self._largest.values())
            size = max(FEWEST, CACHE[2 if self._itemsize == 2 else 4] // largest)
        return max(math.ceil(len(x) / size), 1)

    def laid_out(self, x: Tensor) -> Tensor:
        """Inputs in the memory format of the copy."""
        return channels_last(x) if self._images_channels_last else x

    def search(self, attack: PGD, pixels: Tensor, y: Tensor, begin: Tensor, dtype: torch.dtype) -> Tensor:
        """The loop of a PGD on the copy, part by part; whole for a loss of the user's own, which may know the batch."""
        parts = self.chunks(pixels) if attack.loss is cross_entropy else 1
        found = []
        for own, labels, start in zip(
            *(torch.tensor_split(tensor, parts) for tensor in (self.laid_out(pixels), y, self.laid_out(begin))),
            strict=True,
        ):
            advance = None
            if self.engine.cuda_graph and own.is_cuda and attack.steps:
                advance = self._steps.captured(attack, start, own, labels, dtype)
            found.append(attack.search(self.net.part, own, labels, start, dtype, advance))
        return torch.cat(found)

    def _settle(self, x: Tensor, example: Tensor) -> None:
        """Finds out how much can be fused, and whether batches can be cut, with the model's logits as they were."""
        fixed = self.engine.chunk is None or (self.engine.chunk == "auto" and device_of(self.model).type != "cpu")
        original = evaluation_copy(self.model)
        cuttable = not fixed and can_be_cut(original)
        if cuttable:
            self._measure(original, example)
        failure: FusionError | None = None
        for plan, whole in self._ways(x):
            if not (whole or cuttable):
                continue
            self.plan, self.whole = plan, whole
            try:
                self._verify(plan, x)
            except FusionError as error:
                failure = failure or error
            else:
                break
        if self.asked.fused and not self.plan.fused:
            say(f"attacks run on a copy that is not fused: {failure}")

    def _ways(self, x: Tensor) -> Iterator[tuple[FusionPlan, bool]]:
        """Plans, each with whether batches stay whole, the fastest first; the last is the model as it is."""
        yield self.asked, False
        yield self.asked, True
        if self.asked.fused:
            again = planned(self.model, x, self.engine)  # its path may hang on how many examples there are
            if again != self.asked:
                yield again, True
        nothing = FusionPlan((), tuple((name, "the fused copy was wrong") for _, name in self.asked.fused))
        yield nothing, False
        yield nothing, True

    def _verify(self, plan: FusionPlan, x: Tensor) -> None:
        """Raises :class:`FusionError` unless logits of the batch are the model's, fused as planned and cut."""
        parts = self.chunks(x)
        if plan.fused or parts > 1:
            verify(
                evaluation_copy(self.model),
                _Cut(apply_plan(plan, self.model), parts),
                x.detach(),
                lambda wide: _Cut(apply_plan(plan, wide), parts),
            )

    def _measure(self, copy: nn.Module, example: Tensor) -> None:
        """Takes note of how large the activations of inputs like these are."""
        if self.engine.chunk == "auto":
            itemsize = 8 if self.dtype is None else self.dtype.itemsize
            self._largest[tuple(example.shape[1:])] = largest_activation(copy, example, itemsize)

    def _fused(self) -> nn.Module:
        return apply_plan(self.plan, self.model).requires_grad_(False)

    def _lowered(self, fused: nn.Module, example: Tensor) -> nn.Module:
        """The copy, laid out and in the dtype asked for, in the first way in which it runs."""
        self._images_channels_last = False
        if self.engine.channels_last and example.dim() == 4:
            laid_out = evaluation_copy(fused).to(memory_format=torch.channels_last)
            if runs_channels_last(laid_out, example, modes=(False,), hooks=True):
                fused, self._images_channels_last = laid_out, True
        if self.dtype is None:
            return fused
        error: Exception | None = None
        for lower in (round_products, round_all):
            copy = evaluation_copy(fused)
            lower(copy, self.dtype)
            try:
                if not is_finite(copy, example) and is_finite(fused, example):
                    raise ArithmeticError("its logits or their gradients are not finite")
                return copy
            except Exception as failure:
                error = failure
        say(f"attacks run in the model's own precision: it does not run in {self.dtype} ({error})")
        self.dtype = None
        return fused

    def _fix(self, example: Tensor) -> None:
        """Spares BN layers that stay in the copy what they can do without, where the copy still runs."""
        fixed = fix(self._copy)
        try:
            if fixed:
                is_finite(self._copy, example)
        except Exception:
            for module in fixed:
                del vars(module)["forward"]

    def _link(self) -> None:
        """Finds out which values of the live model go where in the copy."""
        live, copies = dict(named_modules(self.model)), dict(named_modules(self._copy))
        gone = {name for _, name in self.plan.fused}
        fused = {producer for producer, _ in self.plan.fused}
        self._pairs = [(live[producer], live[name]) for producer, name in self.plan.fused]
        self._targets = [copies[producer] for producer, _ in self.plan.fused]
        self._custom = [
            (module, copies[name])
            for name, module in live.items()
            if name in copies and not type(module).__module__.startswith("torch.")
        ]
        self._others: list[tuple[nn.Module, nn.Module, str]] = []
        self._attributes: list[tuple[nn.Module, nn.Module, str, torch.dtype]] = []
        for name, module in live.items():
            if name in gone or name not in copies:
                continue
            held = tensors(copies[name])
            for key in tensors(module):
                if key in held and not (name in fused and key in ("weight", "bias")):
                    if key in vars(module):
                        self._attributes.append((module, copies[name], key, held[key].dtype))
                    else:
                        self._others.append((module, copies[name], key))


class _Net(nn.Module):
    """The copy, as any attack may call it: whole batches in and out, cut inside."""

    def __init__(self, run: Any, replica: Replica) -> None:
        super().__init__()
        self.run = run
        self._replica = (replica,)  # hidden from nn.Module
        self.eval()

    def part(self, x: Tensor) -> Tensor:
        """Logits of one part of a batch, for an attack that goes by the gradient's direction alone."""
        logits: Tensor = self.run(x)
        return evened(logits) if self._replica[0].dtype == torch.float16 else logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, ...), in the dtype of the inputs."""
        (replica,) = self._replica
        parts = replica.chunks(x)
        x = replica.laid_out(x)
        if parts == 1:
            logits: Tensor = self.run(x).to(x.dtype)
            return logits
        return torch.cat([self.run(part) for part in torch.tensor_split(x, parts)]).to(x.dtype)


class _Cut(nn.Module):
    """A model that takes a batch in parts."""

    def __init__(self, model: nn.Module, parts: int) -> None:
        super().__init__()
        self._model, self._parts = model, parts

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._model(part) for part in torch.tensor_split(x, self._parts)])


def planned(model: nn.Module, example: Tensor, engine: Engine) -> FusionPlan:
    """What is to be fused, for inputs like these; nothing, with a warning, where the model cannot be traced."""
    if not engine.fuse:
        return FusionPlan(())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BNSurgeryWarning)  # no BN layer is no news here
            return plan_of(model, example, strict=False)
    except FusionError as error:
        evaluation_copy(model)  # raises where there can be no copy at all
        say(f"attacks run on a copy that is not fused: {error}")
        return FusionPlan(())


def _is_empty(value: object) -> bool:
    return isinstance(value, (dict, list, set)) and not value


def _writable(held: Tensor) -> bool:
    """Whether each entry has a place in memory of its own."""
    if held.layout != torch.strided:
        return True
    return not any(stride == 0 and size > 1 for stride, size in zip(held.stride(), held.shape, strict=True))


def _multiply(weight: Tensor, scale: Tensor, held: Tensor) -> None:
    """Writes the product where it is held, in the way that is fastest for its dtype and layout."""
    if held.dtype == scale.dtype:
        torch.mul(weight, scale, out=held)
    elif held.is_contiguous():
        held.copy_(weight * scale)
    else:
        held.copy_((weight * scale).to(held.dtype))  # the cast, then the change of layout: each has a fast kernel


def say(message: str) -> None:
    """Warns the caller of the public function."""
    warnings.warn(message, BNSurgeryWarning, stacklevel=6)
