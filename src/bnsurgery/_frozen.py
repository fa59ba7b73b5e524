"""Frozen convolutions in a training step: the gradient goes back to their input, and nothing of it is kept for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def nothing_kept(model: nn.Module) -> Iterator[None]:
    """For the block, convolutions whose weight and bias are frozen keep no input for the backward pass.

    torch keeps it, since the gradient of the weight may be asked for; where an activation function keeps its own input
    (SiLU, GELU), the convolution behind it is then all that its output is kept for. Gradients are the same, of any
    order.
    """
    patched = [] if _is_compiled(model) else [module for module in model.modules() if _is_frozen(module)]
    for module in patched:
        vars(module)["_conv_forward"] = partial(_forward, module)
    try:
        yield
    finally:
        for module in patched:
            del vars(module)["_conv_forward"]


def _is_compiled(model: nn.Module) -> bool:
    """What is compiled keeps what it needs by itself, and would be compiled anew."""
    return any(
        hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") is not None
        for module in model.modules()
    )


def _is_frozen(module: nn.Module) -> bool:
    return (
        type(module) in _CONVOLUTIONS
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and "_conv_forward" not in vars(module)
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


def _forward(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    mixed = torch.is_autocast_enabled(x.device.type)
    computed = weight.requires_grad or (bias is not None and bias.requires_grad)  # not the module's own, then
    if computed or mixed or not x.requires_grad or not torch.is_grad_enabled() or x.dim() != weight.dim():
        plain: Tensor = type(module)._conv_forward(module, x, weight, bias)  # type: ignore[attr-defined]
        return plain
    options = (module.stride, module.padding, module.dilation, module.groups)
    found: Tensor = _Convolution.apply(x, weight, bias, *options)
    return found


class _Convolution(torch.autograd.Function):
    """A convolution (N, C, ...) to (N, K, ...) whose weight and bias get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.like = x.shape, x.stride(), x.dtype, x.device
        ctx.options = stride, padding, dilation, groups
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape, strides, dtype, device = ctx.like
        stride, padding, dilation, groups = ctx.options
        # Of the input itself only its shape and layout are looked at.
        unread = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        found, _, _ = torch.ops.aten.convolution_backward(
            gradient, unread, weight, None, stride, padding, dilation, False, (0,) * len(stride), groups,
            (True, False, False),
        )  # fmt: skip
        return (found, *(None,) * 6)
