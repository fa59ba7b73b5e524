"""The configurations of the paper: what each row starts from, what trains, what its statistics do, on which examples.

Numbers of the paper are clean error and robust error under AutoAttack in percent (Table 2), L-infinity, eps 8/255.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from bnsurgery import PGD
from bnsurgery.finetuning import Train

EPS = 8 / 255


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        name: as the paper has it; of rows that are not in its table, likewise.
        start: the row whose network this one starts from; None: random weights.
        train: what trains, in the words of :func:`bnsurgery.adv_finetune`.
        adversarial: whether it trains on adversarial examples (crops and flips) or on clean ones (AutoAugment, Cutout).
        epochs: passes over the training set.
        also: what else trains.
        reset: whether BN statistics are reset first.
        lr: initial learning rate of SGD with Nesterov momentum 0.9, which falls to 0 along a cosine.
        weight_decay: on all that trains.
        eps: radius of the attack in training, in pixel units of [0, 1].
        eps_warmup: number of first epochs over which it grows to that.
        gamma: initial value of gamma in a random network: 1, or drawn from U(0, 1) as by Frankle et al. (2021).
        paper: clean and robust error in the paper's Table 2; None: the row is not in the table.
    """

    name: str
    start: str | None
    train: Train
    adversarial: bool
    epochs: int
    also: tuple[str, ...] = ()
    reset: bool = False
    lr: float = 0.05
    weight_decay: float = 5e-4
    eps: float = EPS
    eps_warmup: int = 0
    gamma: Literal["one", "uniform"] = "one"
    paper: tuple[float, float] | None = None

    def attack(self) -> PGD | None:
        """PGD with 10 steps of 0.007 (at eps 8/255) from a random start, of which the best iterate counts."""
        if not self.adversarial:
            return None
        return PGD(self.eps, steps=10, step_size=0.007 * self.eps / EPS, best=True)

    def shortened(self, epochs: int) -> Row:
        """The row with so many epochs, of which the last is at the full radius."""
        return replace(self, epochs=epochs, eps_warmup=min(self.eps_warmup, epochs - 1))

    @property
    def passes(self) -> int:
        """Passes through the network, forward or backward, that an image takes in an epoch."""
        attack = self.attack()
        return 3 + (0 if attack is None else 2 * attack.steps)

    @property
    def only_bn(self) -> bool:
        """Whether BN layers are all that changes."""
        return self.train != "all" and not self.also

    @property
    def statistics(self) -> str:
        """What the BN statistics do in training."""
        if self.train == "bn-params":
            return "frozen"
        return "reset, then updated" if self.reset else "updated"

    def configuration(self) -> dict[str, Any]:
        """What decides about the result, as plain values."""
        attack = repr(self.attack()) if self.adversarial else None
        if self.eps_warmup:
            attack = f"{attack}, eps_warmup={self.eps_warmup}"
        plain = asdict(self) | {"also": list(self.also), "attack": attack}
        return {name: value for name, value in plain.items() if name not in ("name", "paper", "eps_warmup")}


_BASE = Row("NORMAL", None, "all", adversarial=False, epochs=60)
_STATS = Row("BN STATS (no reset)", "normal", "bn-stats", adversarial=True, epochs=1)
_BN = Row("BN PARAMS", "normal", "bn", adversarial=True, epochs=12, lr=0.4)
_BOTH_ENDS = ("conv1", "logits")

ROWS: Mapping[str, Row] = {
    "normal": replace(_BASE, paper=(4.11, 99.8)),
    "normal-bn-only": replace(_BASE, name="NORMAL +BN ONLY", train="bn", epochs=25, lr=0.1, paper=(46.11, 99.7)),
    "normal-bn-only-log-conv1": replace(
        _BASE, name="NORMAL +BN ONLY +log+conv1", train="bn", also=_BOTH_ENDS, epochs=25, lr=0.1, paper=(35.89, 99.6)
    ),
    "adv": Row("ADV", None, "all", adversarial=True, epochs=30, paper=(17.67, 58.4)),
    "adv-bn-only": Row("ADV +BN ONLY", None, "bn", adversarial=True, epochs=12, lr=0.1, paper=(43.33, 98.0)),
    "adv-bn-only-log-conv1": Row(
        "ADV +BN ONLY +log+conv1", None, "bn", True, epochs=12, also=_BOTH_ENDS, lr=0.1, paper=(35.22, 98.1)
    ),
    "bn-stats": replace(_STATS, paper=(6.44, 99.9)),
    "bn-stats-reset": replace(_STATS, name="BN STATS (reset)", reset=True, paper=(6.33, 99.6)),
    "bn-only-params": replace(_BN, name="BN ONLY PARAMS", train="bn-params", lr=0.0003, paper=(77.11, 85.3)),
    "bn-params": replace(_BN, paper=(29.67, 70.5)),
    "bn-params-log-conv1": replace(_BN, name="BN PARAMS +log+conv1", also=_BOTH_ENDS, lr=0.2, paper=(26.89, 68.2)),
    # Not in the table: remarks of the text, and whether the rows have settled.
    "bn-stats-eps4": replace(_STATS, name="BN STATS (no reset), eps 4/255", eps=4 / 255),
    "bn-stats-eps2": replace(_STATS, name="BN STATS (no reset), eps 2/255", eps=2 / 255),
    "bn-stats-eps1": replace(_STATS, name="BN STATS (no reset), eps 1/255", eps=1 / 255),
    "bn-stats-log": replace(_STATS, name="BN STATS (no reset) +log", start="bn-stats", also=("logits",), epochs=3),
    "bn-only-params-warm": replace(_BN, name="BN ONLY PARAMS, eps warmed up", train="bn-params", lr=0.01, eps_warmup=7),
    "bn-params-no-decay": replace(_BN, name="BN PARAMS, no weight decay", weight_decay=0.0),
    "bn-params-longer": replace(_BN, name="BN PARAMS, twice the epochs", epochs=2 * _BN.epochs),
}
"""By the name that the command line takes, each after what it starts from."""

CHOICES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    # The last with eps warmed up, to compare with parameters alone.
    "bn-params": (
        *({"lr": lr} for lr in (0.05, 0.1, 0.2, 0.4, 0.8)),
        {"lr": 0.4, "epochs": 8, "eps_warmup": 7},
    ),
    "bn-only-params": tuple({"lr": lr} for lr in (0.0001, 0.0003, 0.001, 0.003, 0.01)),
    # From 1/255 on, as in the row itself.
    "bn-only-params-warm": tuple({"lr": lr, "epochs": 8, "eps_warmup": 7} for lr in (0.001, 0.003, 0.01, 0.03)),
    "bn-params-log-conv1": tuple({"lr": lr} for lr in (0.1, 0.2, 0.4)),
    "bn-stats-log": tuple({"lr": lr} for lr in (0.0005, 0.005, 0.05)),
    "normal-bn-only": tuple({"lr": lr, "gamma": gamma} for lr in (0.05, 0.1, 0.2) for gamma in ("one", "uniform")),
    # The last two are hardly adversarial and not at all, with crops and flips: is that what gives the paper's errors?
    "adv-bn-only": (
        {"lr": 0.1, "gamma": "one"},
        {"lr": 0.1, "gamma": "uniform"},
        {"lr": 0.4, "gamma": "one"},
        {"lr": 0.1, "gamma": "one", "eps": 1 / 255},
        {"lr": 0.1, "gamma": "one", "eps": 0.0},
    ),
}
"""By row: the settings that are compared on training images that are left out of training."""


def described(settings: Mapping[str, Any]) -> str:
    """Settings as they are named in tables."""
    shown = {option: f"{255 * value:g}/255" if option == "eps" else value for option, value in settings.items()}
    return ", ".join(f"{option} {value}" for option, value in shown.items())


def table() -> dict[str, Row]:
    """The eleven rows of Table 2."""
    return {key: row for key, row in ROWS.items() if row.paper is not None}


def needed(keys: list[str]) -> list[str]:
    """These rows and those that they start from, each once, in an order in which every start comes first."""
    wanted = set(keys)
    for key in reversed(list(ROWS)):
        start = ROWS[key].start
        if key in wanted and start is not None:
            wanted.add(start)
    return [key for key in ROWS if key in wanted]
