"""BN patches: the parameters and statistics of a model's BN layers, all that BN fine-tuning changes, kept apart."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bnsurgery._data import describe
from bnsurgery._files import replacing
from bnsurgery._modes import Snapshot
from bnsurgery._states import fingerprint
from bnsurgery.errors import PatchError
from bnsurgery.layers import PARAMETERS, bn_layers, join, statistics, trainable_parts

FORMAT = "bnsurgery-patch-1"


def bn_state(model: nn.Module, *, strict: bool = True) -> dict[str, Tensor]:
    """Reads the BN parameters and statistics of a model; returns a copy.

    Args:
        model: any module with BN layers; wrapped ones are looked through.
        strict: raise where there is no BN layer; with ``False`` warn and return an empty dict.

    Returns:
        Copies of gamma, beta, running mean and variance (C,) and the counter () of each BN layer, those it has, under
        their names in the unwrapped model's ``state_dict``, in the model's dtypes and on its devices. A layer that is
        used in several places appears once.

    Raises:
        NoBatchNormError: there is no BN layer (``strict=True``).

    Example:
        >>> import torch
        >>> sorted(bn_state(torch.nn.Sequential(torch.nn.BatchNorm2d(8))))
        ['0.bias', '0.num_batches_tracked', '0.running_mean', '0.running_var', '0.weight']
    """
    return {name: tensor.detach().clone() for name, tensor in _tensors(model, strict=strict).items()}


def load_bn_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Writes BN parameters and statistics into a model, in place: all of them, or, where one does not fit, none.

    Values are copied into the model's own tensors, and converted to their dtype and device.

    Args:
        model: any module whose BN layers have the names and shapes of ``state``.
        state: what :func:`bn_state` returned, of this model or of one with the same BN layers.

    Raises:
        PatchError: entries are missing, unexpected, mis-shaped, not tensors, not finite, or a variance is negative;
            the message lists them, and nothing has been written.
        NoBatchNormError: the model has no BN layer.

    Example:
        >>> import torch
        >>> model, other = (torch.nn.Sequential(torch.nn.BatchNorm2d(8)) for _ in range(2))
        >>> state = bn_state(other)
        >>> state["0.bias"].add_(1).max()
        tensor(1.)
        >>> load_bn_state(model, state)
        >>> model[0].bias.max().item()
        1.0
    """
    targets = _tensors(model)
    _check(targets, state)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state[name])


@contextmanager
def swap_bn(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Puts BN parameters and statistics into a model for the length of a ``with`` block, in place.

    On leaving the block, also by an exception, the values from before are back, to the bit; what was trained inside
    is lost unless read with :func:`bn_state`.

    Args:
        model: any module whose BN layers have the names and shapes of ``state``.
        state: what :func:`bn_state` returned.

    Yields:
        The model.

    Raises:
        PatchError: as :func:`load_bn_state`.
        NoBatchNormError: the model has no BN layer.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8))
        >>> state = bn_state(model)
        >>> state["0.weight"].mul_(2).max()
        tensor(2.)
        >>> with swap_bn(model, state):
        ...     print(model[0].weight.max().item())
        2.0
        >>> model[0].weight.max().item()
        1.0
    """
    before = Snapshot(_tensors(model).values())
    load_bn_state(model, state)
    try:
        yield model
    finally:
        before.restore()


def save_bn_patch(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the BN parameters and statistics of a model to a safetensors file; changes nothing in the model.

    The file appears whole or not at all: it is written under another name in the same folder, then renamed. It holds a
    checksum of the values, by which :func:`load_bn_patch` knows a damaged file.

    Args:
        model: any module with BN layers.
        path: the file to write, by custom named ``*.safetensors``; replaced if it exists.

    Raises:
        NoBatchNormError: there is no BN layer.
        OSError: the folder does not exist or cannot be written to.

    Example:
        >>> import tempfile, pathlib, torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "patch.safetensors")
        >>> save_bn_patch(model, path)
        >>> load_bn_patch(model, path)
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in bn_state(model).items()}
    with replacing(Path(path)) as partial:
        partial.write_bytes(save(state, metadata={"format": FORMAT, "checksum": _checksum(state)}))


def load_bn_patch(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a patch file's BN parameters and statistics into a model, in place: all of them or none.

    Only safetensors is read; a pickle is refused and never executed.

    Args:
        model: any module whose BN layers have the names and shapes of the patch.
        path: a file that :func:`save_bn_patch` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        PatchError: this is no safetensors file, it is damaged, or it does not fit the model; nothing has been written
            to the model.
        NoBatchNormError: the model has no BN layer.

    Example:
        >>> import tempfile, pathlib, torch
        >>> model, other = (torch.nn.Sequential(torch.nn.BatchNorm2d(8)) for _ in range(2))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "patch.safetensors")
        >>> with torch.no_grad():
        ...     _ = other[0].bias.fill_(1)
        >>> save_bn_patch(other, path)
        >>> load_bn_patch(model, path)
        >>> model[0].bias.max().item()
        1.0
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"no BN patch at {str(target)!r}")
    try:
        with safe_open(target, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError, RuntimeError, TypeError, OSError) as error:
        raise PatchError(f"{str(target)!r} is not a safetensors file, and nothing else is read: {error}") from error
    form = metadata.get("format", FORMAT)
    if form not in (FORMAT, "pt"):
        raise PatchError(f"{str(target)!r} has format {form!r}, and this version reads {FORMAT!r}")
    if metadata.get("checksum", _checksum(state)) != _checksum(state):  # other programs' files have none
        raise PatchError(f"{str(target)!r} is damaged: its checksum does not match")
    try:
        load_bn_state(model, state)
    except PatchError as error:
        raise PatchError(f"{str(target)!r}: {error}") from None


def _checksum(state: Mapping[str, Tensor]) -> str:
    return fingerprint(sorted(state.items()))


def _tensors(model: nn.Module, *, strict: bool = True) -> dict[str, Tensor]:
    """The model's own BN tensors under their ``state_dict`` names."""
    found: dict[str, Tensor] = {}
    for name, layer in bn_layers(model, strict=strict).items():
        for part in PARAMETERS:
            found |= {join(name, local): parameter for local, parameter in trainable_parts(layer, part).items()}
        found |= {join(name, local): buffer for local, buffer in statistics(layer).items()}
    return found


def _check(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    problems = []
    for what, names in (("missing", targets.keys() - state.keys()), ("unexpected", state.keys() - targets.keys())):
        if names:
            problems.append(f"{what}: {_some(sorted(map(str, names)))}")
    shared = {name: (target, state[name]) for name, target in targets.items() if name in state}
    shapes, values = [], []
    for name, (target, value) in shared.items():
        if not isinstance(value, Tensor) or value.shape != target.shape:
            shapes.append(f"{name} is {describe(value)}, expected {tuple(target.shape)}")
        elif value.is_complex() or value.is_floating_point() != target.is_floating_point():
            values.append(f"{name} is of {value.dtype}, expected {target.dtype}")
        elif not bool(torch.isfinite(value.to(target.dtype)).all()):
            values.append(f"{name} is not finite")
        elif name.endswith("running_var") and bool((value.to(target.dtype) < 0).any()):
            values.append(f"{name} is negative")
    shared_by: dict[int, str] = {}
    for name, (target, value) in shared.items():
        first = shared_by.setdefault(id(target), name)
        both = isinstance(value, Tensor) and isinstance(state[first], Tensor)
        if first != name and both and not torch.equal(value.cpu(), state[first].cpu()):
            values.append(f"{name} differs from {first}, and the model holds them together")
    if shapes:
        problems.append(f"mis-shaped: {_some(shapes)}")
    if values:
        problems.append(f"invalid: {_some(values)}")
    if problems:
        raise PatchError(f"the patch does not fit the model, nothing was loaded; {'; '.join(problems)}")


def _some(entries: list[str], most: int = 6) -> str:
    rest = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + rest
