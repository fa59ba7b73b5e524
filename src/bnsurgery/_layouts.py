"""How inputs lie in memory, and in how large pieces they pass through a network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._branches import by_example
from bnsurgery._copies import evaluation_copy
from bnsurgery._modes import global_state, preserved
from bnsurgery._tracing import leaves
from bnsurgery.layers import device_of, has_statistics


def channels_last(x: Tensor) -> Tensor:
    """Images (N, C, H, W) with the channels innermost in memory; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def runs_channels_last(model: nn.Module, x: Tensor, *, modes: Sequence[bool], hooks: bool) -> bool:
    """Whether a model, of which a copy is tried out, takes images like x with the channels innermost in memory.

    A ``view`` over channels and positions does not, for one. Without ``hooks``, these are not called: they may write
    down what they see.
    """
    if x.dim() != 4:
        return False
    with suppress(Exception), torch.no_grad(), global_state(device_of(model), seed=0), preserved(model):
        for mode in modes:
            copy = evaluation_copy(model)
            for module in copy.modules():
                module.training = mode
                if not hooks:
                    module._forward_hooks.clear()
                    module._forward_pre_hooks.clear()
            copy(channels_last(x.detach().clone()))
        return True
    return False


def can_be_cut(model: nn.Module) -> bool:
    """Whether the BN layers of a model in evaluation mode leave the examples of a batch to themselves."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return not by_example(model) and all(has_statistics(layer) and not layer.training for layer in layers)


def largest_activation(copy: nn.Module, example: Tensor, itemsize: int) -> int:
    """Bytes of the largest tensor that a module returns for one example, with entries of at most ``itemsize`` bytes."""
    largest = [example[:1].numel() * min(example.element_size(), itemsize)]

    def look(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        found = leaves(outputs, Tensor)
        largest.extend(t.numel() * min(t.element_size(), itemsize) // len(example) for t in found)

    with ExitStack() as stack, torch.no_grad():
        for module in copy.modules():
            stack.callback(module.register_forward_hook(look).remove)
        copy(example)
    return max(largest)
