"""Adversarial examples of a live model for a training step, made on a copy of it where that can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery._replicas import Replicas, can_attack_a_copy, craft_on_copy
from bnsurgery.adapters import craft
from bnsurgery.attacks import PGD, Part, attacking, cross_entropy, start_of


class AttackStep:
    """Inputs (N, ...) and labels (N,) to adversarial examples of the live model as it is now.

    ``strength``, in (0, 1], is the factor on eps and step size of a PGD; random starts come from ``generator``.
    """

    def __init__(self, attack: Any, model: nn.Module, generator: torch.Generator, replicas: Replicas | None) -> None:
        """Attacks copies of the model where there are ``replicas`` and the attack can, else the model."""
        self._attack, self._model, self.generator = attack, model, generator
        self._replicas = replicas if can_attack_a_copy(attack, model) else None
        self.strength = 1.0

    def copies(self) -> dict[str, Any]:
        """What a run that goes on has to know of the copies, as plain values."""
        return {} if self._replicas is None else self._replicas.state()

    def restore_copies(self, state: dict[str, Any]) -> None:
        """Goes on with it.

        Raises:
            ValueError: it is something else.
        """
        if self._replicas is not None:
            self._replicas.restore(state)

    @property
    def live(self) -> bool:
        """Whether the live model itself is run."""
        return self._replicas is None or self._replicas.none

    def __call__(self, x: Tensor, y: Tensor, of: Part | None = None) -> Tensor:
        """Inputs (N, ...) and labels (N,), which may be part of a larger batch, to adversarial examples."""
        with self._weakened():
            return self._made(x, y, of)

    @contextmanager
    def _weakened(self) -> Iterator[None]:
        """Holds a PGD at its present strength, for the block; the object itself, which may be more than a PGD."""
        if self.strength == 1 or not isinstance(self._attack, PGD):
            yield
            return
        full = self._attack.eps, self._attack.step_size
        self._attack.eps, self._attack.step_size = (self.strength * size for size in full)
        try:
            yield
        finally:
            self._attack.eps, self._attack.step_size = full

    def _made(self, x: Tensor, y: Tensor, of: Part | None) -> Tensor:
        replica = None if self._replicas is None or not len(x) else self._replicas.fresh(x)
        start = None
        if of is not None and len(x) and isinstance(self._attack, PGD):
            start = start_of(self._attack, x, of, self.generator)
        if replica is None:
            return craft(self._attack, self._model, x, y, generator=self.generator, start=start)
        # A loss of the user's own may call the live model, for its clean logits say.
        calls = isinstance(self._attack, PGD) and self._attack.loss is not cross_entropy
        with attacking(self._model) if calls else nullcontext():
            return craft_on_copy(replica, self._attack, x, y, generator=self.generator, start=start)
