"""How much is done, all of it or a little, and what together with a row decides about a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from examples.walter.rows import EPS, Row


@dataclass(frozen=True)
class Scale:
    """How much is done: all of it, or just enough to see that everything runs.

    Attributes:
        batch_size: in training.
        most_epochs: no row trains longer.
        training: how many training images are used, the first.
        clean: numbers of first test images that clean error is reported on.
        robust: number of first test images that are attacked.
        chunk: of these, how many between two looks at the clock.
        robust_eps: radii, in pixel units of [0, 1], at which PGD-20 is run.
        held_out: training images, the last, that settings are compared on: clean error on all, PGD-20 on the last
            ``robust``.
        compared_training: training images, the first, that settings are compared with.
        compared_epochs: how long.
    """

    batch_size: int = 128
    most_epochs: int | None = None
    training: int = 50_000
    clean: tuple[int, ...] = (900, 1000, 10_000)
    robust: int = 1000
    chunk: int = 250
    robust_eps: tuple[float, ...] = (EPS, 4 / 255, 2 / 255, 1 / 255)
    held_out: int = 5000
    compared_training: int = 15_000
    compared_epochs: int = 3

    def row(self, row: Row) -> Row:
        """The row with as many epochs as are made at this scale."""
        return row.shortened(min(row.epochs, self.most_epochs or row.epochs))

    def of_training(self, row: Row, width: int) -> dict[str, Any]:
        """What decides about the result of training a row, as plain values."""
        more = {"width": width, "batch_size": self.batch_size, "training_images": self.training}
        return self.row(row).configuration() | more

    def of_evaluation(self, row: Row, width: int) -> dict[str, Any]:
        """What decides about the result of evaluating a row likewise."""
        names = ("clean", "robust", "chunk", "robust_eps")
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return self.of_training(row, width) | {"evaluation": {name: plain[name] for name in names}}

    def compared(self, row: Row, settings: Mapping[str, Any]) -> Row:
        """The row with settings that are compared with others, trained briefly."""
        return self.row(replace(row.shortened(self.compared_epochs), **settings))

    def of_choice(self, row: Row, settings: Mapping[str, Any], width: int) -> dict[str, Any]:
        """What decides about how settings compare, likewise."""
        more = {"held_out": self.held_out, "training_images": self.compared_training, "width": width}
        return self.compared(row, settings).configuration() | more | {"batch_size": self.batch_size}


FULL = Scale()
QUICK = Scale(
    batch_size=64,
    most_epochs=1,
    training=512,
    clean=(64, 512),
    robust=16,
    chunk=16,
    held_out=64,
    compared_training=128,
    compared_epochs=1,
)
