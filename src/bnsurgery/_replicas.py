"""All private copies of one live model, and which attacks may run on them."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery._branches import route_of
from bnsurgery._copies import by_itself, evaluation_copy, is_faithful
from bnsurgery._modes import global_state
from bnsurgery._records import require_numbers
from bnsurgery._replica import Replica, planned
from bnsurgery.adapters import check_attack, craft, is_around, is_autoattack, is_torchattacks
from bnsurgery.attacks import PGD
from bnsurgery.engine import Engine
from bnsurgery.errors import BNSurgeryWarning, FusionError
from bnsurgery.layers import device_of

MOST_CHANGES = 5
"""Copies made anew in a row, before a fine-tuning run goes on without."""


class Replicas:
    """The copies of one live model: one for each path through it that inputs of different shapes take."""

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        *,
        dtype: torch.dtype | None,
        compile: bool,  # noqa: A002
        most_changes: float = MOST_CHANGES,
    ) -> None:
        """``most_changes``: of copies made anew in a row, before there are no more."""
        self._most_changes = most_changes
        self._model, self._engine, self._dtype, self._compile = model, engine, dtype, compile
        self.compiled = compile
        self._by_shape: dict[Any, Replica] = {}
        self._changes = 0
        self._reason: str | None = None

    @property
    def none(self) -> bool:
        """Whether there can be no copies."""
        return self._reason is not None

    def fresh(self, x: Tensor) -> Replica | None:
        """A copy for inputs like x (N, ...), with the live model's values; None, said once, where there can be none."""
        if self.none or torch.is_inference_mode_enabled():
            return None
        key = tuple(x.shape), x.dtype, route_of(self._model)
        replica = self._by_shape.get(key)
        if self._by_shape:
            if replica.refresh() if replica is not None else self._same():
                self._changes = 0
            else:
                self._by_shape.clear()
                self._changes += 1
                replica = None
        if replica is not None:
            return replica
        if self._changes > self._most_changes:
            return self._nothing("the model's modules, hooks or attributes change with each batch")
        try:
            example = _example(self._model, x)
            if example is None:
                return None  # the attack itself will say what is wrong with the model
            self._by_shape[key] = self._for(x, example)
        except FusionError as error:
            return self._nothing(str(error))
        return self._by_shape[key]

    def state(self) -> dict[str, Any]:
        """How often in a row the live model had changed, with what has changed by now; and why there are no copies."""
        changes = self._changes
        if self._by_shape:
            changes = 0 if self._same() else changes + 1
        return {"changes": changes, "none": self._reason}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there.

        Raises:
            ValueError: this is no such state.
        """
        changes, reason = state["changes"], state["none"]
        require_numbers({"changes": changes})
        if reason is not None and not isinstance(reason, str):
            raise ValueError(f"there are no copies because of {reason!r}")
        self._changes = changes
        if reason is not None:
            self._nothing(reason)

    def _same(self) -> bool:
        """Whether the live model is as it was copied."""
        return all(replica.refresh() for replica in dict.fromkeys(self._by_shape.values()))

    def _for(self, x: Tensor, example: Tensor) -> Replica:
        """A copy that others share, where it is right for this batch too, or a new one."""
        with global_state(device_of(self._model), seed=0):
            plan = planned(self._model, example, self._engine)
        for replica in dict.fromkeys(self._by_shape.values()):
            same = replica.asked == plan and replica.route == route_of(self._model)
            if same and replica.refresh() and replica.serves(x, example):
                return replica
        return Replica(self._model, x, example, self._engine, plan=plan, dtype=self._dtype, compile=self._compile)

    def _nothing(self, reason: str) -> Replica | None:
        self._reason = reason
        self._by_shape.clear()
        warnings.warn(
            f"attacks run on the live model, as with engine='plain': {reason}", BNSurgeryWarning, stacklevel=5
        )
        return None


def _example(model: nn.Module, x: Tensor) -> Tensor | None:
    """The fewest inputs of a batch on which a copy of the model runs as on all of it; None where it gives no logits.

    Raises:
        FusionError: there can be no copy.
    """
    for example in (x[:2], x):
        copy = evaluation_copy(model)
        logits = None
        with torch.no_grad(), global_state(device_of(model), seed=0):
            with by_itself(model), suppress(Exception):
                logits = copy(example.detach().clone())
            if logits is None:  # what is compiled inside it may not run while it is watched
                copy = evaluation_copy(model)
                with suppress(Exception):
                    logits = copy(example.detach().clone())
        if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(example):
            if not is_faithful(model, copy, example):
                raise FusionError(
                    f"a copy of {type(model).__name__} does not compute what it does itself: make copy.deepcopy copy "
                    "parameters, hooks and attributes"
                )
            return example.detach().clone()
    return None


def can_attack_a_copy(attack: Any, model: nn.Module) -> bool:
    """Whether an attack gives on a copy of the model what it gives on the model.

    Callables may know the model from elsewhere, or look into it; an attack object may be bound to a wrapper around it.
    """
    if isinstance(attack, PGD):
        own = (getattr(type(attack), name) is getattr(PGD, name) for name in ("__call__", "run", "search"))
        return attack.bn == "eval" and all(own)
    if not (is_torchattacks(attack) or is_autoattack(attack)):
        return False
    if not isinstance(attack.model, nn.Module) or getattr(attack, "_model_training", False):
        return False
    return not is_around(attack, model)


def craft_on_copy(
    replica: Replica,
    attack: Any,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    batch_size: int | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """As :func:`bnsurgery.adapters.craft`, on a copy."""
    if isinstance(attack, PGD):
        check_attack(attack)

        def search(pixels: Tensor, labels: Tensor, begin: Tensor) -> Tensor:
            return replica.search(attack, pixels, labels, begin, x.dtype)

        return attack.run(search, x, y, generator=generator, start=start)
    return craft(attack, replica.net, x, y, generator=generator, batch_size=batch_size)
