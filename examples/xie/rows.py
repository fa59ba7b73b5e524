"""What is trained on what, through which BN, at which depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

EPS = 8 / 255
"""L-infinity radius in training and evaluation, in pixel units of [0, 1]; the paper has 16/255, on ImageNet."""
DEPTHS = (20, 56, 110)
EPOCHS, CONSISTENT = 15, 12


@dataclass(frozen=True)
class Row:
    """A network that is trained.

    Attributes:
        name: for tables.
        images: ``"adversarial"``: adversarial examples alone; ``"mix"``: each image clean and adversarial.
        bn: ``"one"``; ``"mixture"``: one for clean and one for adversarial images.
        depth: of the ResNet.
        epochs: passes over the training images.
        consistent: epochs after which BN normalises in training as in evaluation; None: it never does.
        lr: initial learning rate of SGD with momentum 0.9, x 0.1 after 35, 70 and 95 of 110 parts of the steps.
        weight_decay: on all parameters.
        steps: of PGD in training.
        needs: the row without consistent BN, whose first epochs are this one's too.
    """

    name: str
    images: Literal["adversarial", "mix"]
    bn: Literal["one", "mixture"]
    depth: int
    epochs: int = EPOCHS
    consistent: int | None = None
    lr: float = 0.1
    weight_decay: float = 5e-4
    steps: int = 5
    needs: tuple[str, ...] = ()

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches of its BN; of one BN there are none."""
        return ("clean", "adv") if self.bn == "mixture" else ()


KINDS: Mapping[str, tuple[str, Literal["adversarial", "mix"], Literal["one", "mixture"]]] = {
    "adv": ("adversarial alone", "adversarial", "one"),
    "mix": ("mix, one BN", "mix", "one"),
    "mbn": ("mix, mixture BN", "mix", "mixture"),
}


def key_of(kind: str, depth: int, *, consistent: bool = False) -> str:
    """The name of a row."""
    return f"{kind}-{depth}{'-consistent' if consistent else ''}"


ROWS: Mapping[str, Row] = {
    key_of(kind, depth, consistent=after is not None): Row(
        f"{name}{', consistent' if after is not None else ''}, ResNet-{depth}",
        images,
        bn,
        depth,
        consistent=after,
        needs=() if after is None else (key_of(kind, depth),),
    )
    for depth in DEPTHS
    for after in (None, CONSISTENT)
    for kind, (name, images, bn) in KINDS.items()
}
"""By the name that the command line takes."""

CHOICES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    key: tuple({"lr": lr} for lr in (0.05, 0.1, 0.2)) for key in ("adv-20", "mix-20", "mbn-20")
}
"""By row: the settings that are compared on training images that are left out of training."""


def held(record: Mapping[str, Any], key: str, test: str, branch: str = "adv") -> str:
    """Of an evaluated row, for each example whether it is right, 1 or 0; of mixture BN, through this branch."""
    return str(record["tests"][f"{branch}: {test}" if ROWS[key].branches else test]["held"])
