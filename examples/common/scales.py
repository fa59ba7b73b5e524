"""How much is done, all of it or a little."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How much is done: all of it, or just enough to see that everything runs.

    Attributes:
        batch_size: in training.
        most_epochs: no row trains longer.
        training: how many training images are used, the first.
        measured: first test images that are measured on after each epoch.
        tested: first test images that the finished network is measured on.
        attacked: of these, the first that AutoAttack is run on.
        held_out: training images, the last, that settings are compared on.
        compared_training: training images, the first, that settings are compared with.
        compared_epochs: how long.
        rate: factor on learning rates, and
        deepest: no network is deeper: a few steps leave running statistics far from those of the batches, and a network
            that goes by them is not to diverge.
    """

    batch_size: int = 128
    most_epochs: int | None = None
    training: int = 50_000
    measured: int = 1000
    tested: int = 10_000
    attacked: int = 500
    held_out: int = 5000
    compared_training: int = 15_000
    compared_epochs: int = 3
    rate: float = 1.0
    deepest: int | None = None

    def epochs(self, epochs: int) -> int:
        """How many of so many epochs are made at this scale."""
        return min(epochs, self.most_epochs or epochs)


FULL = Scale()
QUICK = Scale(
    batch_size=32,
    most_epochs=2,
    training=128,
    measured=32,
    tested=64,
    attacked=8,
    held_out=64,
    compared_training=96,
    compared_epochs=1,
    rate=0.02,
    deepest=26,
)
