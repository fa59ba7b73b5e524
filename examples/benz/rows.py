"""The networks and the sets of images of the paper.

Numbers are those of the authors' code, read off its plots: clean accuracy, accuracy under an L2 attack of radius 0.25,
LIGS, of a ResNet-18.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Norm = Literal["batch", "group", "layer", "instance", "none"]
L2, LINF = 0.25, 1 / 255
"""Radii of the attacks that networks are measured by, in pixel units of [0, 1]."""


@dataclass(frozen=True)
class Row:
    """A network that is trained.

    Attributes:
        name: for tables.
        norm: what stands in the place of BN.
        epochs: passes over its training set.
        lr: initial learning rate of SGD with momentum 0.9, x 0.1 after a third and after two thirds of the steps.
        weight_decay: on all parameters.
        data: the set that it is trained on; None: CIFAR-10's training images.
        eps: L2 radius of the attack that it is trained on, in pixel units; 0: clean images.
        snapshots: epochs after which the network is kept.
        needs: what it is made of.
        paper: accuracy clean and under the L2 attack in percent, and LIGS; None: not among those.
    """

    name: str
    norm: Norm
    epochs: int
    lr: float = 0.1
    weight_decay: float = 5e-4
    data: str | None = None
    eps: float = 0.0
    snapshots: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()
    paper: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class SetRow:
    """A set of images that is made by a network.

    Attributes:
        name: for tables.
        kind: in the words of :func:`bnsurgery.analysis.feature_dataset`.
        model: the network whose features count.
        source: the set that its images come from; None: CIFAR-10's training images, the first.
        images: how many.
        steps: of the search.
        step_size: in pixel units.
        needs: what it is made of.
        epochs: none.
    """

    name: str
    kind: Literal["random", "conflicting", "matched"]
    model: str
    images: int
    steps: int
    step_size: float = 0.1
    source: str | None = None
    needs: tuple[str, ...] = ()
    epochs: int = 0


@dataclass(frozen=True)
class TransferRow:
    """Adversarial examples of networks, some of them early in training, given to each of them.

    Attributes:
        name: for tables.
        networks: rows with the epoch, 0 for the end.
        eps: L-infinity radius in pixel units.
        images: test images, the first.
        needs: the rows.
        epochs: none.
    """

    name: str
    networks: tuple[tuple[str, int], ...]
    eps: float = 4 / 255
    images: int = 1000
    needs: tuple[str, ...] = ()
    epochs: int = 0


AnyRow = Row | SetRow | TransferRow
EPOCHS, EARLY = 24, (1, 4)
_IMAGES = 25_000


def _clean(name: str, norm: Norm, **options: Any) -> Row:
    return Row(name, norm, EPOCHS, snapshots=EARLY, **options)


def _on(name: str, norm: Norm, data: str, **options: Any) -> Row:
    return Row(name, norm, 2 * EPOCHS, data=data, needs=(data,), **options)


ROWS: Mapping[str, AnyRow] = {
    "bn": _clean("BN", "batch", paper=(95, 10, 0.585)),
    "none": _clean("no BN", "none", paper=(92, 39.5, 0.79)),
    "gn": _clean("GN", "group"),
    "ln": _clean("LN", "layer"),
    "in": _clean("IN", "instance"),
    "adv-bn": Row("adversarial, BN", "batch", 12, eps=0.5, paper=(90.5, 79.5, 0.98)),
    "adv-none": Row("adversarial, no BN", "none", 12, eps=0.5, paper=(88.7, 76.5, 0.98)),
    "random": SetRow("D_rand", "random", "bn", _IMAGES, steps=100, needs=("bn",)),
    "robust": SetRow("D_R", "matched", "adv-bn", _IMAGES, steps=150, step_size=0.2, needs=("adv-bn",)),
    "conflicting": SetRow(
        "conflicting", "conflicting", "bn", _IMAGES, steps=100, source="robust", needs=("bn", "robust")
    ),
    "random-bn": _on("BN on D_rand", "batch", "random", paper=(68, 0, 0.31)),
    "random-bn-longer": Row("BN on D_rand, longer", "batch", 150, lr=0.01, data="random", needs=("random",)),
    "random-none": _on("no BN on D_rand", "none", "random"),
    "robust-bn": _on("BN on D_R", "batch", "robust", paper=(84, 45, 0.91)),
    "robust-none": _on("no BN on D_R", "none", "robust", paper=(81, 50, 0.94)),
    "conflicting-bn": _on("BN on conflicting", "batch", "conflicting"),
    "conflicting-none": _on("no BN on conflicting", "none", "conflicting"),
    "transfer": TransferRow(
        "transfer",
        # The last two are what the others' adversarial examples are given to that neither of them is.
        (*((key, epoch) for key in ("bn", "none") for epoch in (*EARLY, 0)), ("gn", 0), ("in", 0)),
        needs=("bn", "none", "gn", "in"),
    ),
}
"""By the name that the command line takes, each after what it needs."""

_RATES = (0.01, 0.03, 0.1)
CHOICES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    **{key: tuple({"lr": lr} for lr in _RATES) for key in ("bn", "none", "gn", "ln", "in")},
    # Labels of D_rand are right of one image in ten: what it takes to learn them shows later.
    "random-bn": tuple({"lr": lr, "epochs": 12} for lr in _RATES),
}
"""By row: the settings that are compared on training images that are left out of training."""
