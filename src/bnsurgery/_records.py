"""What a fine-tuning run says of its steps and epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor, nn


@dataclass(frozen=True)
class StepRecord:
    """One step: counted from 0 over the whole run.

    Attributes:
        epoch: from 0.
        step: from 0, over all epochs.
        loss: mean over the batch.
        error: share misclassified, in training mode, in percent.
        lr: learning rate of the first parameter group; 0 where nothing but statistics move.
        examples: batch size; of several processes that share it, of all of them.
    """

    epoch: int
    step: int
    loss: float
    error: float
    lr: float
    examples: int


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: from 0.
        steps: whole steps in it.
        examples: examples in these steps.
        loss: mean over the examples, on what the model was trained on.
        error: share of these misclassified, in training mode, in percent.
        lr: learning rate at its end.
        skipped: steps undone because a number was not finite: an input, an activation, the loss, a gradient, an update.
        left_out: batches left out because a BN layer saw one value per channel.
        seconds: wall time of this process, callbacks of epochs not counted.
    """

    epoch: int
    steps: int
    examples: int
    loss: float
    error: float
    lr: float
    skipped: int
    left_out: int
    seconds: float


Callback: TypeAlias = Callable[[EpochRecord, nn.Module], "bool | None"]
StepCallback: TypeAlias = Callable[[StepRecord, nn.Module], "bool | None"]


@dataclass(frozen=True)
class Undone:
    """A step that was not made, or was taken back.

    Attributes:
        kind: ``"skipped"`` or ``"left out"``.
        reason: in words.
    """

    kind: str
    reason: str


@dataclass
class Tally:
    """An epoch under way: what becomes its record."""

    steps: int = 0
    examples: int = 0
    loss: float = 0.0
    wrong: float = 0.0
    skipped: int = 0
    left_out: int = 0
    seconds: float = 0.0

    def add(self, outcome: StepRecord | Undone) -> None:
        """Counts a step."""
        if isinstance(outcome, StepRecord):
            self.steps, self.examples = self.steps + 1, self.examples + outcome.examples
            self.loss += outcome.loss * outcome.examples
            self.wrong += outcome.error * outcome.examples
        else:
            self.skipped += outcome.kind == "skipped"
            self.left_out += outcome.kind == "left out"

    def record(self, epoch: int, lr: float) -> EpochRecord:
        """Of an epoch, counted from 0, at the end of which the learning rate is ``lr``."""
        return EpochRecord(
            epoch=epoch,
            steps=self.steps,
            examples=self.examples,
            loss=self.loss / self.examples if self.examples else math.nan,
            error=self.wrong / self.examples if self.examples else math.nan,
            lr=lr,
            skipped=self.skipped,
            left_out=self.left_out,
            seconds=self.seconds,
        )


def is_number(value: object) -> bool:
    """Whether this is one number: Python's, NumPy's or in a tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, Real) and not isinstance(value, bool)


def require_numbers(values: dict[str, Any]) -> None:
    """Raises :class:`ValueError` where one of these is no number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {value!r}")
