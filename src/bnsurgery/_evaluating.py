"""What :func:`bnsurgery.evaluate` is made of: the attacks that are to run, and one evaluation under way."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery._allocator import keeping_memory
from bnsurgery._branches import by_example
from bnsurgery._copies import rounding
from bnsurgery._data import Data, check_bounds, check_labels, gather
from bnsurgery._geometry import Norm, column, distance
from bnsurgery._modes import global_state
from bnsurgery._packing import Inside, Packed
from bnsurgery._replica import Replica
from bnsurgery._replicas import Replicas, can_attack_a_copy, craft_on_copy
from bnsurgery.adapters import (
    AUTOATTACK_PARTS,
    autoattack,
    check_attack,
    craft,
    describe_attack,
    is_around,
    is_autoattack,
    normalises,
    threat_of,
)
from bnsurgery.attacks import PGD, attacking
from bnsurgery.engine import Engine
from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning
from bnsurgery.layers import device_of, unwrap

Build = Callable[["Run", int], Any]
"""The evaluation and a seed to an attack."""


def plan(
    attacks: str | Sequence[Any], eps: float, norm: Norm, bounds: tuple[float, float], *, normalised: bool = False
) -> list[tuple[str, Build]]:
    """What is to run, in order: a name, and a function that builds the attack once the model is known."""
    if isinstance(attacks, str) or not isinstance(attacks, Sequence):
        attacks = (attacks,)
    plans: list[tuple[str, Build]] = []
    for attack in attacks:
        if not isinstance(attack, str):
            check_attack(attack)
            if normalised:
                refuse_normalising(attack, "evaluate")
            threat = threat_of(attack)
            if threat is not None and (threat[1] != norm or threat[0] < eps * (1 - 1e-6)):
                warnings.warn(
                    f"{describe_attack(attack)} is an attack of {threat[1]} eps {threat[0]:.4g}, not of the threat "
                    f"that is evaluated, {norm} eps {eps:.4g}: robust error may come out too low",
                    BNSurgeryWarning,
                    stacklevel=3,
                )
            plans.append((describe_attack(attack), lambda *_, attack=attack: attack))
        elif attack == "autoattack":
            plans += [(part, _autoattack_part(part, eps, norm)) for part in AUTOATTACK_PARTS]
        elif attack in AUTOATTACK_PARTS:
            plans.append((attack, _autoattack_part(attack, eps, norm)))
        elif match := re.fullmatch(r"pgd-([1-9]\d*)", attack):
            steps = int(match[1])
            made = PGD(eps, steps, 2.5 * eps / steps, norm, bounds=bounds)
            plans.append((attack, lambda *_, made=made: made))
        else:
            known = ", ".join(map(repr, ("autoattack", *AUTOATTACK_PARTS, "pgd-20")))
            raise ValueError(f"attacks must be among {known}, attack objects and callables, got {attack!r}")
    if bounds != (0.0, 1.0) and any(isinstance(a, str) and not a.startswith("pgd") for a in attacks):
        raise ValueError(f"AutoAttack knows inputs in [0, 1] alone, got bounds={bounds}: rescale the data or use PGD")
    return plans


def refuse_normalising(attack: Any, function: str) -> None:
    """Raises :class:`ValueError` where an attack would undo the normalisation of ``mean=`` and ``std=`` once more."""
    if normalises(attack):
        raise ValueError(
            f"{describe_attack(attack)} has a normalisation of its own, and with {function}(mean=, std=) attacks are "
            "given pixels: pass it without"
        )


def _autoattack_part(part: str, eps: float, norm: Norm) -> Build:
    def build(run: Run, seed: int) -> Any:
        if part == "apgd-t" and run.classes < 4:
            raise ValueError(
                f"AutoAttack's {part} needs at least 4 classes, the model has {run.classes}: "
                "name other parts, such as attacks=('apgd-ce', 'square')"
            )
        model = run.model if run.replica is None else run.replica.net
        attack = autoattack(model, eps=eps, norm=norm, seed=seed, classes=run.classes, device=run.device)
        attack.attacks_to_run = [part]
        return attack

    return build


@dataclass(frozen=True)
class AttackRow:
    """What one attack did.

    Attributes:
        attack: its name.
        tried: examples that were still right when it began.
        broken: of these, those that it broke.
        rejected: examples that it moved out of the eps-ball or the bounds; they do not count as broken.
        robust_error: robust error after it, in percent of all examples.
        seconds: wall time.
    """

    attack: str
    tried: int
    broken: int
    rejected: int
    robust_error: float
    seconds: float


@dataclass(frozen=True)
class Threat:
    """What adversarial examples are to keep to.

    Attributes:
        eps: radius in pixel units.
        norm: of the ball.
        bounds: lowest and highest valid input.
    """

    eps: float
    norm: Norm
    bounds: tuple[float, float]


@dataclass(frozen=True)
class Attempt:
    """What an attack did to a batch.

    Attributes:
        rows: of the examples that it broke.
        made: what broke them, (len(rows), ...).
        rejected: how many it moved out of the ball or the bounds.
    """

    rows: Tensor
    made: Tensor
    rejected: int


class InPixels(nn.Module):
    """A model that takes pixels in float32 and returns float32: normalisation and low precision are inside."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.mean, self.std = (
            torch.as_tensor([default] if given is None else given, dtype=torch.float64).flatten()
            for given, default in ((mean, 0.0), (std, 1.0))
        )
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be above 0, got {std}")

    def pixels(self, x: Tensor) -> Tensor:
        """The model's own inputs (N, C, ...) in pixel units, float32."""
        mean, std = self._like(x)
        return (x.to(mean.dtype) * std + mean).float()

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, ...) as the model takes them."""
        mean, std = self._like(pixels)
        return ((pixels - mean) / std).to(self.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K) in float32."""
        logits: Tensor = self.model(self.inputs(pixels))
        return logits.float() if isinstance(logits, Tensor) else logits  # who asked will say what is wrong with it

    def _like(self, x: Tensor) -> list[Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, x.shape[1]):
                raise ValueError(
                    f"{name} must hold {x.shape[1]} values to go with x {tuple(x.shape)}, got {len(values)}"
                )
        return [values.to(x.device, dtype).view(-1, *[1] * (x.dim() - 2)) for values in (self.mean, self.std)]


@contextmanager
def running(
    model: nn.Module,
    data: Data,
    *,
    bounds: tuple[float, float],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: int,
    max_examples: int | None,
    switches: Engine | None,
    compile: bool = False,  # noqa: A002 - the public name
    precision: torch.dtype | None = None,
) -> Iterator[Run]:
    """The examples checked and in pixels, and the model ready to be attacked, for the block.

    Raises:
        ValueError: as :func:`bnsurgery.evaluate` says of the data and of these arguments.
    """
    for name, value in (("batch_size", batch_size), ("max_examples", max_examples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither")
    root = unwrap(model)
    require_one_way(root)
    device = device_of(root)
    with global_state(device):
        x, y = gather(data, batch_size, max_examples)
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), x.dtype)
    inside = None
    if mean is not None or (dtype, x.dtype) != (torch.float32, torch.float32):
        root = inside = InPixels(root, dtype, mean, std)
        x = inside.pixels(x)
    check_bounds(x, bounds)
    x = x.clamp(*bounds)  # rounding: attacks and the check of what they return take the bounds at their word
    kept = keeping_memory(device, wanted=switches is not None and switches.keep_memory)
    with attacking(root), torch.autocast(device.type, enabled=False), kept:
        copies = (
            None
            if switches is None
            else Replicas(root, switches, dtype=precision, compile=compile, most_changes=math.inf)
        )
        yield Run(root, x, y, batch_size, copies, inside)


def require_one_way(model: nn.Module) -> None:
    """Raises :class:`BNSurgeryError` where examples take different branches of a split model, by their place."""
    if by_example(model):
        raise BNSurgeryError(
            "batches are made here, and use_branch says of each example of a batch of its own which branch it takes: "
            "choose one branch by its name"
        )


class Run:
    """One evaluation: the examples, what is still right, and what broke the others."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        replicas: Replicas | None,
        inside: InPixels | None,
    ) -> None:
        """Attacks run on a copy of the model where there are ``replicas`` and the attack can."""
        self.inside = inside
        self.model, self.x, self.y, self.batch_size = model, x, y, batch_size
        self._replicas = replicas
        self.device = device_of(model)
        self.adversarial = x.clone()
        self.robust = torch.ones(len(y), dtype=torch.bool)
        self.classes = 0

    def refuse_around(self, name: str, attack: Any) -> None:
        """Raises :class:`ValueError` where an attack would leave out what takes the model's inputs from pixels."""
        if self.inside is not None and is_around(attack, self.inside.model):
            raise ValueError(
                f"{name} is bound to a module around the model, which cannot be kept where the model takes other "
                "inputs than float32 pixels (mean=, std=, its dtype): bind it to the model itself"
            )

    def clean(self) -> Tensor:
        """Whether each example is right without an attack, bool (N,)."""
        return self.right(torch.arange(len(self.y)), self.x)

    def right(self, rows: Tensor, x: Tensor) -> Tensor:
        """Whether the model classifies x, made from these rows, right: bool (len(rows),)."""
        return self.logits(rows, x).argmax(1) == self.y[rows]

    def logits(self, rows: Tensor, x: Tensor) -> Tensor:
        """What the model gives for x, made from these rows: (len(rows), K), on the CPU."""
        made = []
        with torch.no_grad(), global_state(self.device, seed=0):
            for part, index in zip(torch.split(x, self.batch_size), torch.split(rows, self.batch_size), strict=True):
                logits = self.model(part.to(self.device))
                check_labels(self.y[index], logits)
                self.classes = logits.shape[1]
                made.append(logits.cpu())
        return torch.cat(made)

    @cached_property
    def replica(self) -> Replica | None:
        """The copy that attacks run on, where there is one."""
        return None if self._replicas is None else self._replicas.fresh(self.x[: self.batch_size].to(self.device))

    def _packed(self, rows: Tensor, inside: Inside, eps: float, norm: Norm) -> Packed | None:
        """The copy, for an attack that asks of each example for one adversarial point; None where there can be none."""
        if self._replicas is None or self.replica is None or self._replicas.compiled:
            return None  # the compiler would see another size of batch with each pass
        x, y = self.x[rows].to(self.device), self.y[rows].to(self.device)
        net, tolerance = self.replica.net, rounding(self.model, (x,))
        return Packed(net, x, y, inside, norm, tolerance) if Packed.suits(net, x, eps, norm, tolerance) else None

    def craft(self, attack: Any, rows: Tensor, generator: torch.Generator, packed: Packed | None = None) -> Tensor:
        """Adversarial examples of these rows, on the CPU."""
        x, y = self.x[rows].to(self.device), self.y[rows].to(self.device)
        size = self.batch_size
        if packed is not None:
            with global_state(self.device):
                torch.backends.cudnn.benchmark = False  # it would try out each size of batch anew
                made = craft(attack, packed, x, y, generator=generator, batch_size=size)
            return torch.where(column(packed.broken, made), packed.found, made).cpu()
        if not can_attack_a_copy(attack, self.model) or self.replica is None:
            return craft(attack, self.model, x, y, generator=generator, batch_size=size).cpu()
        return craft_on_copy(self.replica, attack, x, y, generator=generator, batch_size=size).cpu()

    def parts(self, name: str, attack: Any, left: Tensor) -> list[Tensor]:
        """The examples that an attack is to try, in the batches that it is given."""
        # AutoAttack cuts its batches itself, and starts its seed anew for each.
        whole = is_autoattack(attack) and not _is_own_part(name, attack)
        return list(torch.split(left, max(len(left), 1) if whole else self.batch_size)) if len(left) else []

    def attempt(self, name: str, attack: Any, rows: Tensor, threat: Threat, generator: torch.Generator) -> Attempt:
        """What an attack does to one batch, of which these are the rows; changes nothing here."""

        def inside(x: Tensor, made: Tensor) -> Tensor:
            return _valid(x, made, threat)

        x = self.x[rows]
        packed = self._packed(rows, inside, threat.eps, threat.norm) if _is_own_part(name, attack) else None
        made = self.craft(attack, rows, generator, packed)
        wrong = ~self.right(rows, made)
        if packed is not None and bool((lost := packed.broken.cpu() & ~wrong).any()):
            made[lost] = self.craft(attack, rows[lost], generator)  # wrong on the copy alone: to the last step
            wrong[lost] = ~self.right(rows[lost], made[lost])
        valid = inside(x, made)
        count = valid & wrong
        return Attempt(rows[count], made[count], int((~valid).sum()))

    def take(self, attempt: Attempt) -> None:
        """Counts what an attack has broken."""
        self.adversarial[attempt.rows] = attempt.made
        self.robust[attempt.rows] = False


def _is_own_part(name: str, attack: Any) -> bool:
    """Whether this is a part of AutoAttack that can leave out examples as soon as they are broken."""
    return name in ("apgd-ce", "apgd-t") and is_autoattack(attack) and attack.attacks_to_run == [name]


def _valid(x: Tensor, made: Tensor, threat: Threat) -> Tensor:
    """Whether each example is within eps and the bounds, but for float32 rounding: bool (N,)."""
    rounding = 1e-6
    inside = distance(x, made, threat.norm) <= threat.eps * (1 + 1e-5) + rounding
    flat = made.flatten(1)
    return inside & (flat.amin(1) >= threat.bounds[0] - rounding) & (flat.amax(1) <= threat.bounds[1] + rounding)


def percent(wrong: Tensor) -> float:
    """The share of true entries, in percent."""
    return 100 * float(wrong.double().mean())
