"""What the library is held against: plain formulas in NumPy's float64, and bit-for-bit records of a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


def moments(*parts: Tensor) -> tuple[Array, Array]:
    """Mean and unbiased variance per channel of all elements of all parts (N, C, ...), put side by side."""
    rows = [np.moveaxis(array(part), 1, 0).reshape(part.shape[1], -1) for part in parts]
    elements = np.concatenate(rows, axis=1)
    return elements.mean(axis=1), elements.var(axis=1, ddof=1)


def batch_norm(x: Tensor, mean: Any, variance: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Array:
    """BN by the given statistics: gamma (x - mean) / sqrt(var + eps) + beta, per channel of x (N, C, ...)."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, variance = array(mean).reshape(shape), array(variance).reshape(shape)
    gamma = 1.0 if weight is None else array(weight).reshape(shape)
    beta = 0.0 if bias is None else array(bias).reshape(shape)
    return gamma * (array(x) - mean) / np.sqrt(variance + eps) + beta


def batch_statistics(x: Tensor) -> tuple[Array, Array]:
    """Mean and biased variance per channel of one batch (N, C, ...): what BN normalises by in training."""
    axes = tuple(axis for axis in range(x.dim()) if axis != 1)
    return array(x).mean(axis=axes), array(x).var(axis=axes)


def array(value: Any) -> Array:
    """Any tensor or array as float64."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The BN layers as torch lists them."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def training_twin(model: nn.Module, **attributes: Any) -> nn.Module:
    """A copy in evaluation mode but for its BN layers, which train and get the given attributes."""
    twin = copy.deepcopy(model).eval()
    for layer in norm_layers(twin).values():
        layer.training = True
        for name, value in attributes.items():
            setattr(layer, name, value)
    return twin


def layer_inputs(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """What each BN layer is given, call after call, where BN normalises by the batch and all else evaluates."""
    twin = training_twin(model, track_running_stats=False)
    seen: dict[str, list[Tensor]] = {}
    for name, layer in norm_layers(twin).items():
        calls = seen.setdefault(name, [])
        layer.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(inputs[0].clone()))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return seen


def pooled(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[Array, Array]]:
    """Mean and unbiased variance of all that each BN layer is given, all calls together."""
    return {name: moments(*inputs) for name, inputs in layer_inputs(model, batches).items()}


def record(model: nn.Module) -> dict[str, Any]:
    """All that a call must leave alone: values, modes, flags, gradients, hooks, and where tensors live."""
    found: dict[str, Any] = {f"{name} value": value.clone() for name, value in model.state_dict().items()}
    for name, value in model.state_dict(keep_vars=True).items():
        found[f"{name} address"] = value.data_ptr()
    for name, parameter in model.named_parameters():
        found[f"{name} requires_grad"] = parameter.requires_grad
        found[f"{name} grad"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"{name} grad address"] = None if parameter.grad is None else parameter.grad.data_ptr()
    for name, module in model.named_modules():
        found[f"{name} training"] = module.training
        found[f"{name} own attributes"] = sorted(vars(module))
        found[f"{name} hooks"] = tuple(
            len(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
        )
    for name, layer in norm_layers(model).items():
        found[f"{name} momentum"] = layer.momentum
        found[f"{name} track_running_stats"] = layer.track_running_stats
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The entries of two records that are not the same, tensors to the bit."""
    return [name for name in sorted(before.keys() | after.keys()) if not same(before.get(name), after.get(name))]


def same(one: Any, other: Any) -> bool:
    """Equality, for tensors that of their bits, so that NaN equals itself and -0 is not 0."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))
    return type(one) is type(other) and bool(one == other)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The entries of two state dicts that differ by a bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not same(before[name], after[name])}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
