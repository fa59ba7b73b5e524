"""How inputs lie in memory, and in how large pieces they pass through a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._branches import by_example
from bnsurgery._copies import evaluation_copy
from bnsurgery._modes import Buffers, global_state, preserved
from bnsurgery._random import global_random_state, set_global_random_state
from bnsurgery._ranks import waits_for_others
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


class StepLayouts:
    """Whether training steps are made in the memory format that is fastest for images, by the shape of an example."""

    def __init__(self, root: nn.Module, *, wanted: bool) -> None:
        self._root, self._wanted = root, wanted
        self._found: dict[torch.Size, bool] = {}

    def try_out(self, x: Tensor) -> None:
        """Finds out for inputs (N, ...) like x, on a copy of the model."""
        if not self._wanted or x.dim() != 4 or x.shape[1:] in self._found or not len(x):
            return
        # One example may not do in training mode, and what is found is not to hang on which batch comes first.
        some = x[:2] if len(x) > 1 else torch.cat([x, x])
        # In training mode SyncBatchNorm waits for the other processes, which need not be trying this out.
        modes = (False,) if waits_for_others(self._root) else (False, True)
        self._found[x.shape[1:]] = runs_channels_last(self._root, some, modes=modes, hooks=False)

    def arranged(self, x: Tensor) -> Tensor:
        """Inputs as the model takes them."""
        if not self._wanted or x.dim() != 4:
            return x
        return channels_last(x) if self._found.get(x.shape[1:]) else x.contiguous()

    def run(self, model: Callable[[Tensor], Tensor], x: Tensor, before: Buffers) -> Tensor:
        """What a model gives; in the usual layout where a hook, which was not tried out, takes no other."""
        random = global_random_state(device_of(self._root)) if self._found.get(x.shape[1:]) else None
        try:
            return model(x)
        except RuntimeError as error:
            if random is None or "view size is not compatible" not in str(error):
                raise
        self._found[x.shape[1:]] = False
        before.restore()
        set_global_random_state(random, device_of(self._root))  # a run that goes on from here does not try
        return model(x.contiguous())


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
