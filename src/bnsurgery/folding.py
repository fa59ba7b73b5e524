"""Read BN layers in evaluation mode as one affine map.

Walter, Stutz & Schiele, "On Fragile Features and Batch Normalization in Adversarial Training" (arXiv 2204.12393),
Eq. 1: BN with fixed statistics is z -> m z + b, with the normalized weight m = gamma / sqrt(var + eps) and the
normalized bias b = beta - m * mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bnsurgery._modes import preserved
from bnsurgery._tracing import is_bn
from bnsurgery.layers import bn_layers, named_modules, require_statistics, widest


class Affine(NamedTuple):
    """The affine map z -> m z + b that a BN layer is in evaluation mode.

    Attributes:
        weight: the normalized weight m = gamma / sqrt(var + eps), of shape (C,), detached.
        bias: the normalized bias b = beta - m * mean, of shape (C,), detached.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Applies the map to the channels of ``z``, of shape (N, C, ...); changes nothing.

        Raises:
            ValueError: dimension 1 of ``z`` has not C entries.
        """
        if z.ndim < 2 or z.shape[1] != len(self.weight):
            raise ValueError(f"expected z of shape (N, {len(self.weight)}, ...), got {tuple(z.shape)}")
        shape = (1, -1) + (1,) * (z.ndim - 2)
        return self.weight.view(shape) * z + self.bias.view(shape)


def fold_bn(model: nn.Module, *, strict: bool = True) -> dict[str, Affine]:
    """Reads each BN layer as the affine map that it is in evaluation mode; changes nothing.

    Source: Walter, Stutz & Schiele (arXiv 2204.12393), Eq. 1. It is computed in float64 where the device has it, and
    goes by the running statistics that a layer holds, as evaluation mode does, whatever ``track_running_stats`` says.
    Of timm's BatchNormAct2d it is the part before dropout and activation.

    Args:
        model: any module; wrapped ones are looked through. Torchvision's FrozenBatchNorm2d counts here,
            and timm's FrozenBatchNormAct2d.
        strict: raise where there is no BN layer; with ``False`` warn and return an empty dict.

    Returns:
        By qualified name, ``Affine(weight=m, bias=b)``, each of shape (C,), in float64 where the layer's parameters or
        statistics are, else in float32.

    Raises:
        NoBatchNormError: there is no BN layer (``strict=True``).
        BNSurgeryError: a layer has no running statistics, is lazy, or is on the meta device.

    Example:
        >>> import torch
        >>> layer = torch.nn.BatchNorm2d(3).eval()
        >>> affine = fold_bn(layer)[""]
        >>> z = torch.rand(2, 3, 4, 4)
        >>> torch.allclose(affine(z), layer(z))
        True
    """
    layers = foldable(model, strict)
    for name, layer in layers.items():
        require_statistics(name, layer, "fold_bn")
    folded = {}
    for (name, layer), (m, b) in zip(layers.items(), normalized(list(layers.values())), strict=True):
        held = (read(layer, "weight"), read(layer, "bias"), read(layer, "running_var"))
        dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in held) else torch.float32
        folded[name] = Affine(m.to(dtype, copy=True), b.to(dtype, copy=True))
    return folded


def foldable(model: nn.Module, strict: bool) -> dict[str, nn.Module]:
    """The BN layers by qualified name, frozen BN too; where there are none, as ``strict`` says."""
    layers = {name: module for name, module in named_modules(model) if is_bn(module)}
    if not layers or any(isinstance(layer, _BatchNorm) for layer in layers.values()):
        bn_layers(model, strict=strict)  # it knows what to raise: none, a lazy one, one without values
    return layers


@torch.no_grad()
def normalized(layers: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Eq. 1 for all layers of a device at once: m and b of each, in float64 where the device has it."""
    variances = [cast(Tensor, read(layer, "running_var")) for layer in layers]
    by_device: dict[torch.device, list[int]] = {}
    for index, variance in enumerate(variances):
        by_device.setdefault(variance.device, []).append(index)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for device, indices in by_device.items():
        own = [layers[index] for index in indices]
        sizes = [variances[index].numel() for index in indices]
        epsilons = torch.tensor([cast(float, layer.eps) for layer in own], dtype=torch.float64)
        eps: float | Tensor = float(epsilons[0])
        if bool((epsilons != eps).any()):
            eps = epsilons.repeat_interleave(torch.tensor(sizes)).to(device, widest(device))
        mean, variance, gamma, beta = (
            _joined([read(layer, name) for layer in own], sizes, missing, device)
            for name, missing in (("running_mean", 0.0), ("running_var", 1.0), ("weight", 1.0), ("bias", 0.0))
        )
        m = (variance + eps).rsqrt() * gamma
        b = beta - m * mean
        found.update(zip(indices, zip(torch.split(m, sizes), torch.split(b, sizes), strict=True), strict=True))
    return [found[index] for index in range(len(layers))]


def converted(vectors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Each vector in its dtype, those of a kind all at once: themselves, or views of what is not held elsewhere."""
    found = list(vectors)
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index, (vector, dtype) in enumerate(zip(vectors, dtypes, strict=True)):
        if vector.dtype != dtype:
            alike.setdefault((vector.device, vector.dtype, dtype), []).append(index)
    for (_, _, dtype), indices in alike.items():
        own = [vectors[index] for index in indices]
        parts = torch.split(torch.cat(own).to(dtype), [len(vector) for vector in own])
        for index, part in zip(indices, parts, strict=True):
            found[index] = part
    return found


def _joined(values: Sequence[Tensor | None], sizes: Sequence[int], missing: float, device: torch.device) -> Tensor:
    """Vectors end to end; where one is None, ``missing`` in its place."""
    wide = widest(device)
    if all(value is None for value in values):
        return torch.full((sum(sizes),), missing, dtype=wide, device=device)
    given = (
        torch.full((size,), missing, dtype=wide, device=device) if value is None else value
        for value, size in zip(values, sizes, strict=True)
    )
    return torch.cat(list(given)).to(wide)


def read(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a layer, computed where it is parametrized, as in evaluation mode."""
    for held in (layer._parameters, layer._buffers):  # as attributes they would take longer: there are many
        if name in held:
            return held[name]
    if not parametrize.is_parametrized(layer, name):
        return cast("Tensor | None", getattr(layer, name))
    with preserved(layer), torch.no_grad():  # in training mode a parametrization may move its buffers
        layer.eval()
        return cast(Tensor, getattr(layer, name)).detach()
