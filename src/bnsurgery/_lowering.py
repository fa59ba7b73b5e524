"""Copies that compute with fewer digits: which layers do, and whether what comes out is still numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._signature import tensors
from bnsurgery._tracing import PRODUCERS


def round_products(copy: nn.Module, dtype: torch.dtype) -> None:
    """Convolutions and linear layers alone: the input is normalised, and BN layers compute, with all digits."""

    def cast(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
        )

    for module in copy.modules():
        if isinstance(module, PRODUCERS):
            module.to(dtype)
            module.register_forward_pre_hook(cast)


def round_all(copy: nn.Module, dtype: torch.dtype) -> None:
    """Everything but BN layers, and the input."""
    for module in copy.modules():
        if not isinstance(module, _BatchNorm):
            for tensor in tensors(module).values():
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    copy.register_forward_pre_hook(
        lambda _module, inputs: tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    )


def is_finite(copy: nn.Module, x: Tensor) -> bool:
    """Whether a forward and a backward pass, which can be done, give nothing but numbers."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits: Tensor = copy(x)
        (gradient,) = torch.autograd.grad(logits.float().sum(), x, allow_unused=True)
    return all(bool(tensor.isfinite().all()) for tensor in (logits, gradient) if tensor is not None)
