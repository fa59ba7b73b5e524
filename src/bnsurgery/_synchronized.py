"""BN that normalises by the batch of all processes together, in whichever layers a model has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from bnsurgery._ranks import talking


@contextmanager
def synchronized(root: nn.Module, world: int) -> Iterator[None]:
    """While a batch passes, and its gradients, the BN layers of a model that are in training normalise together.

    So they do where activation checkpointing runs them once more in the backward pass, in which torch sets modes aside:
    each layer takes up one of its own.
    """
    entered: list[ExitStack] = []

    def enter(_layer: nn.Module, _inputs: object) -> None:
        entered.append(ExitStack())
        entered[-1].enter_context(_Mode(world))

    def leave(_layer: nn.Module, _inputs: object, _outputs: object) -> None:
        if entered:  # not where another hook has raised before
            entered.pop().close()

    with ExitStack() as stack:
        for layer in root.modules():
            if isinstance(layer, _BatchNorm):
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(_Mode(world))  # BN that is no layer
        yield


class _Mode(TorchFunctionMode):
    """BN in training normalises by the statistics of all processes' batches together, and records those."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self._world = world

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is F.batch_norm:
            call = dict(zip(("input", "running_mean", "running_var", "weight", "bias", "training"), args, strict=False))
            call |= dict(zip(("momentum", "eps"), args[6:], strict=False)) | named
            if call.get("training", False):
                return self._normalised(**call)
        return func(*args, **named)

    def _normalised(
        self,
        input: Tensor,  # noqa: A002 - torch's name
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = True,  # noqa: ARG002 - torch's signature
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        running = None if running_mean is None or running_var is None else (running_mean, running_var)
        output: Tensor = _SynchronizedBN.apply(input, weight, bias, running, momentum, eps, self._world)
        return output


class _SynchronizedBN(torch.autograd.Function):
    """BN of a batch that is spread over processes; its forward and backward pass each talk to the others once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor] | None,
        momentum: float,
        eps: float,
        world: int,
    ) -> Tensor:
        """Outputs like x; moves the running mean and variance (C,) by those of all."""
        wide = torch.promote_types(x.dtype, torch.float32)
        axes = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.to(wide), axes, correction=0)
        own = torch.cat([mean.new_tensor([count]), mean, variance])
        parts = [torch.empty_like(own) for _ in range(world)]
        with talking():
            dist.all_gather(parts, own)
        every = torch.stack(parts)
        counts, means, variances = every[:, :1], *every[:, 1:].chunk(2, dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        # Between the processes' means, and within their parts (Chan, Golub and LeVeque, 1979).
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        if running is not None:  # before anything is saved: activation checkpointing may go no further
            for own, value in zip(running, (mean, variance * (total / (total - 1))), strict=True):
                own.lerp_(value.to(own.dtype), momentum)
        scale = (variance + eps).rsqrt()
        shape = [1, -1, *[1] * (x.dim() - 2)]
        normalised = (x.to(wide) - mean.view(shape)) * scale.view(shape)
        output = normalised if weight is None else normalised * weight.to(wide).view(shape)
        output = output if bias is None else output + bias.to(wide).view(shape)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.axes, ctx.shape, ctx.wide, ctx.with_bias = axes, shape, wide, None if bias is None else bias.dtype
        return output.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients: of the inputs by way of all processes' statistics, of weight and bias this process's share."""
        x, weight, mean, scale, total = ctx.saved_tensors
        gradient = gradient.to(ctx.wide)
        normalised = (x.to(ctx.wide) - mean.view(ctx.shape)) * scale.view(ctx.shape)
        by_bias, by_weight = gradient.sum(ctx.axes), (gradient * normalised).sum(ctx.axes)
        sums = torch.cat([by_bias, by_weight])
        with talking():
            dist.all_reduce(sums)
        every_bias, every_weight = (part.view(ctx.shape) / total for part in sums.chunk(2))
        factor = scale if weight is None else scale * weight.to(ctx.wide)
        to_x = factor.view(ctx.shape) * (gradient - every_bias - normalised * every_weight)
        return (
            to_x.to(x.dtype),
            None if weight is None else by_weight.to(weight.dtype),
            None if ctx.with_bias is None else by_bias.to(ctx.with_bias),
            None,
            None,
            None,
            None,
        )
