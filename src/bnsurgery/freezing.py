"""Choose what trains: everything but batch normalization is frozen, and the choice holds until it is taken back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery.errors import BNSurgeryWarning
from bnsurgery.layers import (
    PARAMETERS,
    bn_layers,
    has_statistics,
    is_frozen_bn,
    named_modules,
    named_parameters,
    require_statistics,
    select,
    trainable_parts,
    unwrap,
)

Stats = Literal["update", "frozen", "batch"]
STATS: tuple[Stats, ...] = ("update", "frozen", "batch")


def freeze_except_bn(
    model: nn.Module,
    *,
    weight: bool = True,
    bias: bool = True,
    stats: Stats = "update",
    also: str | Iterable[str] = (),
    strict: bool = True,
) -> Freeze:
    """Freezes all parameters but gamma and beta of the BN layers, in place, until the result is removed.

    The choice is kept on the parameters and layers themselves. It survives ``model.train()``, ``model.eval()``,
    ``copy.deepcopy``, pickling, ``torch.save``, DistributedDataParallel and ``torch.compile``, and adds nothing to the
    ``state_dict``. Gradients of parameters that become frozen are set aside and put back by ``remove()``, so that an
    optimizer over all parameters moves none of them.

    Args:
        model: any module with BN layers; wrapped ones are looked through.
        weight: whether gamma trains.
        bias: whether beta trains.
        stats: what the statistics do while the model is in training mode. ``"update"``: normalise by the batch and
            update the running statistics (Walter et al.: BN PARAMS; with ``weight=False, bias=False`` BN STATS).
            ``"frozen"``: normalise by the running statistics and never change them (BN ONLY PARAMS). ``"batch"``:
            normalise by the batch, running statistics unchanged. In evaluation mode all three normalise by the
            running statistics.
        also: qualified names or globs of modules or parameters that train too, such as ``"conv1"`` or ``"logits.*"``.
        strict: raise where the model has no BN layer; with ``False`` warn and freeze the rest.

    Returns:
        What trains, and how to undo it; a context manager too.

    Raises:
        NoBatchNormError: there is no BN layer (``strict=True``).
        BNSurgeryError: ``stats="frozen"`` and a layer has no running statistics; a layer is lazy or on the meta device.
        ValueError: an unknown ``stats``, or an ``also`` that matches nothing.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> frozen = freeze_except_bn(model)
        >>> frozen.trainable
        ('1.weight', '1.bias')
        >>> print(frozen.summary())
        trainable params: 16 || all params: 240 || trainable%: 6.67
        >>> optimizer = torch.optim.SGD(frozen.parameters(), lr=0.01)
        >>> frozen.remove()
    """
    if stats not in STATS:
        raise ValueError(f"stats must be one of {', '.join(map(repr, STATS))}, got {stats!r}")
    layers = bn_layers(model, strict=strict)
    names = named_parameters(model)
    chosen = {id(parameter) for parameter in _bn_parameters(layers, weight=weight, bias=bias)}
    chosen |= {id(parameter) for parameter in _named(model, names, also)}
    if stats == "frozen":
        for name, layer in layers.items():
            require_statistics(name, layer, "stats='frozen'")
    fixed = [name for name, p in names.items() if id(p) in chosen and not (p.is_floating_point() or p.is_complex())]
    if fixed:
        raise ValueError(f"also={also!r} names parameters of integers, which cannot train: {', '.join(fixed)}")
    _warn(model, layers, stats)

    freeze = Freeze(model, layers, {name for name, parameter in names.items() if id(parameter) in chosen}, stats)
    for parameter in names.values():
        trains = id(parameter) in chosen
        freeze._set(parameter, "requires_grad", trains)
        if not trains:
            freeze._set(parameter, "grad", None)
    for layer in layers.values():
        freeze._set_stats(layer, stats)
    _ACTIVE.append(weakref.ref(freeze))
    return freeze


class Freeze:
    """What :func:`freeze_except_bn` made trainable, and the way back.

    Attributes:
        trainable: qualified names of the parameters that train.
        without_parameters: names of the BN layers with no gamma and beta (``affine=False``): nothing to train there.
        stats: what the statistics do in training mode.
    """

    def __init__(self, model: nn.Module, layers: dict[str, _BatchNorm], trainable: set[str], stats: Stats) -> None:
        self._model = model
        self._saved: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._removed = False
        self.stats = stats
        self.trainable = tuple(name for name in named_parameters(model) if name in trainable)
        self.without_parameters = tuple(
            name for name, layer in layers.items() if not any(trainable_parts(layer, part) for part in PARAMETERS)
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train, for an optimizer."""
        names = named_parameters(self._model)
        return iter([names[name] for name in self.trainable])

    def summary(self) -> str:
        """One line: the count of trainable parameters, of all, and the share in percent."""
        trainable = sum(parameter.numel() for parameter in self.parameters())
        total = sum(parameter.numel() for parameter in self._model.parameters())
        share = 100 * trainable / total if total else 0.0
        return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.2f}"

    def remove(self) -> None:
        """Puts everything back as it was before, in place; again is a no-op.

        Freezes of the same model may be removed in any order: each takes back only its own choice.
        """
        if self._removed:
            return
        self._removed = True
        active = _active()
        index = active.index(self) if self in active else -1
        earlier, later = active[: max(index, 0)], active[index + 1 :]
        _ACTIVE[:] = [ref for ref in _ACTIVE if ref() not in (None, self)]
        for key, (owner, before) in self._saved.items():
            above = next((freeze for freeze in later if key in freeze._saved), None)
            if above is None:
                _write(owner, key[1], before)
            else:
                above._saved[key] = (owner, before)
        for freeze in earlier:  # gradients made meanwhile are not theirs to keep: what they froze has none
            for (_, name), (owner, _) in freeze._saved.items():
                if name == "grad" and not owner.requires_grad:
                    owner.grad = None
        self._saved.clear()

    def __enter__(self) -> Freeze:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else f"stats={self.stats!r}, {self.summary()}"
        return f"Freeze({state})"

    def __getstate__(self) -> dict[str, Any]:
        # Keys are ids, which a copy has others of.
        saved = [(owner, name, before) for (_, name), (owner, before) in self._saved.items()]
        return vars(self) | {"_saved": saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = {(id(owner), name): (owner, before) for owner, name, before in state["_saved"]}
        vars(self).update(state, _saved=saved)
        if not self._removed:
            _ACTIVE.append(weakref.ref(self))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._saved[id(owner), name] = (owner, _read(owner, name))
        _write(owner, name, value)

    def _set_stats(self, layer: _BatchNorm, stats: Stats) -> None:
        if has_statistics(layer):
            self._set(layer, "track_running_stats", stats == "update")
        mode = _Mode(layer, unwrap(self._model))
        if stats == "frozen":
            self._set(layer, "train", _StayInEvaluation(layer))
            self._set(layer, "training", False)
        elif "train" in vars(layer):
            self._set(layer, "train", None)
            self._set(layer, "training", unwrap(self._model).training)
        elif any((id(layer), "train") in freeze._saved for freeze in _active()):
            self._set(layer, "train", None)  # a freeze below that is removed first hands its stand-in on to this one
        else:
            return
        self._saved[id(layer), "training"] = (layer, mode)


_ACTIVE: list[weakref.ref[Freeze]] = []
"""The freezes in force, oldest first."""


def _active() -> list[Freeze]:
    return [freeze for ref in _ACTIVE if (freeze := ref()) is not None]


class _StayInEvaluation:
    """Stands in for a layer's ``train`` method: the layer stays in evaluation mode, its children follow.

    An instance attribute rather than a hook or a subclass: ``Module.train`` of the parents calls it, ``deepcopy`` and
    pickle carry it along, ``state_dict``, the layer's type and compiled graphs do not see it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.layer).train(self.layer, mode)
        self.layer.training = False
        return self.layer


class _Mode:
    """A layer's mode before a freeze: given back as it was, or as the model's own if that was switched since."""

    def __init__(self, layer: nn.Module, root: nn.Module) -> None:
        self.layer, self.root = layer, root
        self.before, self.root_before = layer.training, root.training

    def now(self) -> bool:
        if "train" in vars(self.layer):
            return False
        switched = self.root is not self.layer and self.root.training != self.root_before
        return self.root.training if switched else self.before


def _read(owner: Any, name: str) -> Any:
    return vars(owner).get("train") if name == "train" else getattr(owner, name)


def _write(owner: Any, name: str, value: Any) -> None:
    if name == "train":
        vars(owner).pop("train", None)
        if value is not None:
            vars(owner)["train"] = value
    else:
        setattr(owner, name, value.now() if isinstance(value, _Mode) else value)


def _bn_parameters(layers: dict[str, _BatchNorm], *, weight: bool, bias: bool) -> list[nn.Parameter]:
    parts = [part for part, wanted in zip(PARAMETERS, (weight, bias), strict=True) if wanted]
    found = [p for layer in layers.values() for part in parts for p in trainable_parts(layer, part).values()]
    if parts and layers and not found:
        warnings.warn(
            "no BN layer has a gamma or beta (affine=False): nothing trains there", BNSurgeryWarning, stacklevel=3
        )
    return found


def _named(model: nn.Module, names: dict[str, nn.Parameter], also: str | Iterable[str]) -> list[nn.Parameter]:
    owned = {name: list(module.parameters()) for name, module in named_modules(model) if name}
    owned.update({name: [parameter] for name, parameter in names.items()})
    return [parameter for group in select(owned, also, "also").values() for parameter in group]


def _warn(model: nn.Module, layers: dict[str, _BatchNorm], stats: Stats) -> None:
    still = [name for name, layer in layers.items() if stats == "update" and layer.momentum == 0]
    if still:
        warnings.warn(
            f"stats='update', but momentum is 0 in {', '.join(map(repr, still))}: statistics there will not move",
            BNSurgeryWarning,
            stacklevel=3,
        )
    frozen = [name for name, module in named_modules(model) if is_frozen_bn(module)]
    if layers and frozen:
        warnings.warn(
            f"frozen BN cannot train and stays as it is: {', '.join(map(repr, frozen))}",
            BNSurgeryWarning,
            stacklevel=3,
        )
