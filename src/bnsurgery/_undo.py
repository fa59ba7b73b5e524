"""Take an optimizer's step back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class Undo:
    """The parameters and the state of an optimizer, to be put back in place after a step that is not to count."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._states: dict[Any, dict[Any, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._noted = False

    def note(self) -> None:
        """Remembers how all is now; into the memory of the last time, where the tensors are the same."""
        self._noted = False
        groups = self._optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        self._states = {key: _copied(state) for key, state in self._optimizer.state.items()}
        self._groups = [_copied({key: value for key, value in group.items() if key != "params"}) for group in groups]
        held = [part for state in (*self._states.values(), *self._groups) for part in state.values()]
        tensors = [tensor.detach() for tensor in (*parameters, *held) if isinstance(tensor, Tensor)]
        same = len(tensors) == len(self._tensors) and all(map(_is_same_memory, tensors, self._tensors))
        if same and all(tensor.layout == torch.strided for tensor in tensors):
            torch._foreach_copy_(self._copies, tensors)
        else:
            self._copies = [tensor.clone() for tensor in tensors]
        self._tensors = tensors
        self._noted = True

    def forget(self) -> None:
        """What was noted is not to be put back any more; the memory is kept for the next time."""
        self._noted = False

    def restore(self) -> None:
        """Puts all back as it was when it was last noted, if it was; may be called again."""
        if not self._noted:
            return
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._copies, strict=True):
                tensor.copy_(value)
        state = self._optimizer.state
        for key in [key for key in state if key not in self._states]:
            del state[key]
        state.update(self._states)
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in [name for name in group if name != "params" and name not in before]:
                del group[name]
            group.update(before)


def _copied(state: dict[Any, Any]) -> dict[Any, Any]:
    """The same tensors, of all else a copy."""
    return {key: value if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in state.items()}


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device, one.stride()) == (other.shape, other.dtype, other.device, other.stride())
    return alike and one.data_ptr() == other.data_ptr()
