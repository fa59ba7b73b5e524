"""Find the batch-normalization layers of a model, by type, under their qualified names.

A BN layer is an instance of :class:`torch.nn.modules.batchnorm._BatchNorm`, subclasses included (``SyncBatchNorm``,
timm's ``BatchNormAct2d``), never a matter of class names or of position. Wrappers (``DistributedDataParallel``,
``DataParallel``, ``torch.compile``) are looked through, at the root and anywhere inside, and leave no trace in names.
"""

from __future__ import annotations

import difflib
import fnmatch
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, NoBatchNormError

T = TypeVar("T")

PARAMETERS = ("weight", "bias")
"""The parameters of a BN layer: gamma and beta."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The statistics of a BN layer."""


def bn_layers(model: nn.Module, *, strict: bool = True) -> dict[str, _BatchNorm]:
    """Finds the BN layers of a model; changes nothing.

    Args:
        model: any module; a BN layer itself is found under the empty name.
        strict: raise where there is no BN layer; with ``False`` warn and return an empty dict.

    Returns:
        The BN layers in registration order, each once, under its first qualified name, without the prefixes of
        wrappers such as ``DistributedDataParallel`` or ``torch.compile``.

    Raises:
        NoBatchNormError: there is none (``strict=True``). InstanceNorm, GroupNorm and torchvision's
            FrozenBatchNorm2d are none.
        BNSurgeryError: a BN layer is lazy and not yet initialised, or on the meta device.
        TypeError: this is no module.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> list(bn_layers(model))
        ['1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    found: dict[str, _BatchNorm] = {}
    frozen = 0
    for name, module in named_modules(model):
        if isinstance(module, _BatchNorm):
            _check_materialized(name, module)
            found[name] = module
        frozen += is_frozen_bn(module)
    if not found:
        message = f"{type(unwrap(model)).__name__} has no batch-normalization layer"
        if frozen:
            message += f" that can train: its {frozen} layers of frozen BN can only be folded and fused"
        if strict:
            raise NoBatchNormError(message)
        warnings.warn(message, BNSurgeryWarning, stacklevel=2)
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside any nesting of ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif _is_compiled(model):
            model = model._orig_mod  # type: ignore[assignment]  # an OptimizedModule's own attribute
        else:
            return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, under its first qualified name; wrappers are looked through and not listed."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(model, "")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, under its first qualified name, wrappers looked through."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in named_modules(model):
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[join(name, local)] = parameter
    return found


def join(name: str, local: str) -> str:
    """A qualified name: ``join("layer1.bn", "weight") == "layer1.bn.weight"``; the root's name is empty."""
    return f"{name}.{local}" if name else local


def label(name: str, layer: nn.Module) -> str:
    """How messages name a layer: its qualified name and its type."""
    return f"{name or '(root)'!r} ({type(layer).__name__})"


def trainable_parts(layer: nn.Module, which: str) -> dict[str, nn.Parameter]:
    """The parameters behind gamma (``which="weight"``) or beta (``"bias"``), under their names in the layer.

    A parametrized gamma or beta is computed: what can train, then, are the originals and the parametrization's own
    parameters.
    """
    if parametrize.is_parametrized(layer, which):
        chain = layer.get_submodule(f"parametrizations.{which}")
        return {f"parametrizations.{which}.{name}": parameter for name, parameter in chain.named_parameters()}
    parameter = layer._parameters.get(which)
    return {} if parameter is None else {which: parameter}


def statistics(layer: nn.Module) -> dict[str, Tensor]:
    """The statistics that a layer holds: ``running_mean``, ``running_var``, ``num_batches_tracked``, those not None.

    Whether they are in use is another matter: see ``layer.track_running_stats``.
    """
    buffers = {name: layer._buffers.get(name) for name in STATISTICS}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def has_statistics(layer: nn.Module) -> bool:
    """Whether a layer holds a running mean and variance."""
    return {"running_mean", "running_var"} <= statistics(layer).keys()


def require_statistics(name: str, layer: nn.Module, purpose: str) -> None:
    """Raises :class:`BNSurgeryError` where a layer holds no running statistics."""
    if not has_statistics(layer):
        raise BNSurgeryError(
            f"{purpose} needs running statistics, and {label(name, layer)} has none: "
            "build it with track_running_stats=True, or leave it out"
        )


def select(names: Mapping[str, T], patterns: Iterable[str], what: str) -> dict[str, T]:
    """The entries whose names match any of the patterns (exact names or globs), in the order of ``names``.

    Raises:
        ValueError: a pattern matches nothing; the message lists the nearest names.
    """
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not isinstance(patterns, Iterable) or isinstance(patterns, nn.Module):
        raise ValueError(f"{what} takes qualified names or globs, got a {type(patterns).__name__}")
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
            raise ValueError(
                f"{what}={pattern!r} matches nothing; the nearest names are {', '.join(map(repr, nearest))}"
            )
        chosen.update(matches)
    return {name: value for name, value in names.items() if name in chosen}


def is_frozen_bn(module: nn.Module) -> bool:
    """Whether this is torchvision's FrozenBatchNorm2d, or timm's of the kind: they fold and fuse, and cannot train."""
    # Where their package has not been imported there is no instance, and it need not be imported to find that out.
    known = (("torchvision.ops.misc", "FrozenBatchNorm2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d"))
    return any(
        isinstance(module, kind) for package, name in known if (kind := getattr(sys.modules.get(package), name, None))
    )


def _is_compiled(module: nn.Module) -> bool:
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def _check_materialized(name: str, layer: _BatchNorm) -> None:
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise BNSurgeryError(f"{label(name, layer)} is lazy and not yet initialised: run a forward pass first")
    if any(tensor.is_meta for tensor in tensors):
        raise BNSurgeryError(
            f"{label(name, layer)} is on the meta device and holds no values: load or initialise it first"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs belong: the device of its first parameter or buffer, or the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def widest(device: torch.device) -> torch.dtype:
    """What statistics are computed in: float64, or float32 where a device has no more."""
    return torch.float32 if device.type == "mps" else torch.float64
