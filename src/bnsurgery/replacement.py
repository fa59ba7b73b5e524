"""Replace BN by what does not look at the batch, or by nothing.

Benz, Zhang and Kweon (arXiv 2010.03316) compare networks with BN, GroupNorm, LayerNorm, InstanceNorm and none. In a
network for images, their LayerNorm is GroupNorm with one group.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from bnsurgery._branches import SplitBatchNorm
from bnsurgery._copies import private_copy, rebind
from bnsurgery._refusals import has_activation, knows_forward
from bnsurgery._tracing import is_hooked
from bnsurgery.errors import BNSurgeryError
from bnsurgery.folding import read
from bnsurgery.layers import PARAMETERS, bn_layers, is_frozen_bn, label, named_modules, select, trainable_parts

Kind = Literal["group", "layer", "instance", "none"]
KINDS: tuple[Kind, ...] = ("group", "layer", "instance", "none")
Make = Callable[[_BatchNorm], nn.Module]
"""A BN layer to what takes its place."""


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace_bn` did; layers go by their qualified names.

    Attributes:
        layers: what took the place of each BN layer, in words.
        carried: layers whose gamma and beta went into what took their place.
        dropped: layers whose gamma and beta did not: there is no place for them, or it does not mean the same.
        kept: BN layers that stay: those not asked for, those inside of a layer that a function returned, and
            FrozenBatchNorm2d.
    """

    layers: dict[str, str]
    carried: tuple[str, ...]
    dropped: tuple[str, ...]
    kept: tuple[str, ...]


class Replaced(NamedTuple):
    """A model without BN layers, and the report on it.

    Attributes:
        model: the copy.
        report: what took the place of what.
    """

    model: nn.Module
    report: Replacement


def replace_bn(
    model: nn.Module,
    kind: Kind | Make,
    *,
    groups: int = 32,
    carry: bool = True,
    layers: str | Iterable[str] | None = None,
) -> Replaced:
    """Puts another normalization, or none, in the place of each BN layer; returns a copy and a report.

    Statistics go, eps stays. Gamma and beta stay where they mean the same, a scale and a shift of each normalized
    channel: in GroupNorm, InstanceNorm and BN; one that layers share is carried over to one that they share. Timm's
    BatchNormAct2d leaves its dropout and activation behind, unless a function returns what has one already: what holds
    the BN layer, what has an activation ``act``, or a Sequential that ends, dropout aside, in that or in a module of
    the activation's class. A layer that is used in several places is replaced in all of them by one.

    Args:
        model: any module with BN layers; wrapped ones are looked through, and the copy is without wrappers.
        kind: ``"group"``: GroupNorm. ``"layer"``: GroupNorm with one group, over channels and positions together.
            ``"instance"``: each channel of each example by itself: InstanceNorm2d or InstanceNorm3d, or, of other
            classes, an InstanceNorm of any number of dimensions; the inputs must have positions, (N, C, ...).
            ``"none"``: an Identity that returns a copy of its input, since what comes after may work in place. Or a
            function from a copy of the BN layer to the module that takes its place; it may be this copy, or hold it.
        groups: of GroupNorm, in how many groups channels are: a divisor of their number.
        carry: whether gamma and beta are carried over; with ``False`` they are as in a new layer, or as the function
            made them.
        layers: qualified names or globs of the layers to replace; all by default.

    Returns:
        The copy, in the same modes, without gradients, and the report, as in ``model, report = replace_bn(...)``. Gamma
        and beta that go into a new norm keep their dtype and device; what else is new has those of the layer, or is as
        a function made it.

    Raises:
        NoBatchNormError: there is no BN layer.
        ValueError: an unknown kind, ``groups`` that does not divide the channels of a layer, or a pattern that matches
            nothing; the function returned one module for several layers.
        TypeError: the function returned no module.
        BNSurgeryError: the model is split; a layer has hooks, or a ``forward`` of its own, which may do more than
            normalise; it is lazy or on the meta device; or the model cannot be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> without, report = replace_bn(model, "group", groups=4)
        >>> type(without[1]).__name__, without[1].num_groups
        ('GroupNorm', 4)
        >>> report.carried
        ('1',)
    """
    if not callable(kind) and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))} or a function, got {kind!r}")
    found = bn_layers(model)
    for name, module in named_modules(model):
        if isinstance(module, SplitBatchNorm):
            raise BNSurgeryError(f"{label(name, module)} is split: use keep_branch first")
    chosen = found if layers is None else select(found, layers, "layers")
    for name, layer in chosen.items():
        _check(name, layer, kind, groups)
    memo: dict[int, Any] = {}
    words: dict[str, str] = {}
    carried: list[str] = []
    dropped: list[str] = []
    taken: dict[int, str] = {}
    held: list[nn.Module] = []  # so that no other module gets their ids
    stayed: list[str] = []
    staying: set[int] = set()
    outside = {id(part) for part in _reached(model, set(chosen.values()))}
    for name, layer in chosen.items():
        if id(layer) not in outside:  # it stays with the layer that holds it, or goes with it
            (stayed if id(layer) in staying else dropped).append(name)
            continue
        own = copy.deepcopy(layer)
        new = kind(own) if callable(kind) else _made(layer, kind, groups)
        held.append(new)
        if not isinstance(new, nn.Module):
            raise TypeError(f"kind must return a module, got a {type(new).__name__} for {label(name, layer)}")
        if id(new) in taken:
            raise ValueError(f"kind returned the same module for {taken[id(new)]!r} and {name!r}: make one for each")
        taken[id(new)] = name
        if any(module is own for module in new.modules()):
            done = _put_back(layer, own, memo, carry=carry)
            staying |= {id(part) for part in layer.modules()}
        else:
            done = carry and _carried(layer, new, memo)
        if any(trainable_parts(layer, part) for part in PARAMETERS):
            (carried if done else dropped).append(name)
        words[name] = repr(new)
        memo[id(layer)] = _with_activation(own, new).train(layer.training)
    frozen = [name for name, module in named_modules(model) if is_frozen_bn(module)]
    kept = (*(name for name in found if name not in chosen), *stayed, *frozen)
    new_layers = list(memo.values())
    private = private_copy(model, memo, error=BNSurgeryError)
    rebind(private, new_layers)
    return Replaced(private, Replacement(words, tuple(carried), tuple(dropped), kept))


def _check(name: str, layer: _BatchNorm, kind: Kind | Make, groups: int) -> None:
    """Raises where a layer cannot be replaced."""
    channels = layer.num_features
    if kind == "group" and (not isinstance(groups, int) or groups < 1 or channels % groups):
        divisors = ", ".join(str(number) for number in range(1, channels + 1) if channels % number == 0)
        raise ValueError(
            f"groups={groups!r} does not divide the {channels} channels of {label(name, layer)}: take one of "
            f"{divisors}, or replace layers of other widths by themselves, with layers="
        )
    if is_hooked(layer):
        raise BNSurgeryError(f"{label(name, layer)} has hooks, which would be lost: remove them, or leave it out")
    if not callable(kind) and not knows_forward(layer):
        raise BNSurgeryError(
            f"{label(name, layer)} has a forward of its own, which may do more than normalise: pass a function that "
            "makes what is to take its place, or leave it out"
        )


def _made(layer: _BatchNorm, kind: Kind, groups: int) -> nn.Module:
    """What takes the place of a layer, with the same parameters as it has."""
    if kind == "none":
        return Identity()
    channels, eps = layer.num_features, layer.eps
    new: nn.Module
    if kind == "instance":
        norm = next((norm for bn, norm in _INSTANCE.items() if isinstance(layer, bn)), InstanceNorm)
        new = norm(channels, eps=eps, affine=True)
    else:
        new = nn.GroupNorm(groups if kind == "group" else 1, channels, eps=eps)
    for part in PARAMETERS:
        if not trainable_parts(layer, part):
            new.register_parameter(part, None)
    first = next(iter(layer.parameters()), None)
    return new if first is None else new.to(first.device, first.dtype)


def _reached(module: nn.Module, layers: set[_BatchNorm]) -> Iterator[nn.Module]:
    """A module and those in it, these layers included, and what is in them not."""
    yield module
    if module not in layers:
        for part in module.children():
            yield from _reached(part, layers)


def _put_back(layer: _BatchNorm, own: _BatchNorm, memo: dict[int, Any], *, carry: bool) -> bool:
    """Puts gamma and beta of a layer into its copy again, which a function may have changed; whether it has them.

    ``memo`` is that of :func:`_carried`. Parametrized ones stay as they are.
    """
    for part in PARAMETERS:
        old, copied = layer._parameters.get(part), own._parameters.get(part)
        if old is None or copied is None or copied.shape != old.shape:
            continue
        if carry:
            copied.data.copy_(old.detach())
        own._parameters[part] = memo.setdefault(id(old), copied)
    held = [(read(layer, part), read(own, part)) for part in PARAMETERS if trainable_parts(layer, part)]
    return all(
        a is not None and b is not None and a.shape == b.shape and torch.allclose(a.to(b), b, 0, 0, equal_nan=True)
        for a, b in held
    )


def _carried(layer: _BatchNorm, new: nn.Module, memo: dict[int, Any]) -> bool:
    """Puts gamma and beta into what takes a layer's place, if they mean the same there; whether they did.

    ``memo`` has what became of which parameter, by ``id``: one that layers share stays shared.
    """
    if not isinstance(new, (nn.GroupNorm, _InstanceNorm, _BatchNorm)) or parametrize.is_parametrized(new):
        return False
    parts = {part: read(layer, part) for part in PARAMETERS}
    held = {part: getattr(new, part) for part, value in parts.items() if value is not None}
    if any(own is None or own.shape != (layer.num_features,) for own in held.values()):
        return False
    for part in held:
        value = cast(Tensor, parts[part]).detach()
        trains = any(parameter.requires_grad for parameter in trainable_parts(layer, part).values())
        parameter = nn.Parameter(value.clone(), trains)
        old = layer._parameters.get(part)
        setattr(new, part, parameter if old is None else memo.setdefault(id(old), parameter))
        for other in (getattr(new, other) for other in PARAMETERS if other not in held):
            if other is not None:  # a beta that is new, say, beside a gamma that was there
                other.data = other.data.to(value)
    return True


def _with_activation(layer: _BatchNorm, new: nn.Module) -> nn.Module:
    """With timm's dropout and activation after it, where the BN layer has them and it has none."""
    if not has_activation(layer):
        return new
    if any(module is layer for module in new.modules()) or _ends_active(new, type(layer.act)):
        return new
    parts = {"norm": new, "drop": cast(nn.Module, layer.drop), "act": cast(nn.Module, layer.act)}
    return nn.Sequential(OrderedDict(parts))


def _ends_active(module: nn.Module, kind: type) -> bool:
    """Whether the last that a module does is an activation: of this class, or its ``act``."""
    while isinstance(module, nn.Sequential):
        last = [part for part in module if not isinstance(part, (nn.Identity, nn.modules.dropout._DropoutNd))]
        if not last:
            return False
        module = last[-1]
    # convert_sync_batchnorm leaves an ``act`` in a norm of torch, which never calls it.
    return type(module) is kind or (type(module) not in _OF_TORCH and hasattr(module, "act"))


class Identity(nn.Identity):
    """Hands on a copy of what it is given: BN never returned its input itself, and an activation in place follows."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        """The same values, in a tensor of their own."""
        return input.clone()


class InstanceNorm(_InstanceNorm):
    """InstanceNorm of batches (N, C, ...), with any number of dimensions of positions, but at least one."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        """The same shape; each channel of each example with mean 0 and variance 1, times gamma, plus beta."""
        if input.dim() < 3 or input.shape[1] != self.num_features:
            raise ValueError(
                f"InstanceNorm takes (N, {self.num_features}, ...) with at least one dimension of positions, got "
                f"{tuple(input.shape)}: of a single value per channel there is no variance"
            )
        normalized: Tensor = self._apply_instance_norm(input)  # type: ignore[no-untyped-call]
        return normalized


_INSTANCE: dict[type[_BatchNorm], type[_InstanceNorm]] = {
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
}
"""That of one dimension would take (N, C) for an example without a batch."""
_OF_TORCH = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm),
)
"""These call no module that they hold."""
