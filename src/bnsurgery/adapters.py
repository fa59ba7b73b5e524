"""Other people's attacks, as they are: torchattacks objects, AutoAttack objects and plain callables."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnsurgery._data import check_bounds, check_eps, check_pair, describe
from bnsurgery._geometry import Norm, check_norm
from bnsurgery._modes import global_state, seed_of
from bnsurgery.attacks import PGD, attacking
from bnsurgery.errors import BNSurgeryError, MissingExtraError
from bnsurgery.layers import unwrap

AUTOATTACK_PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The four attacks of AutoAttack's standard version, in their order."""
_AUTOATTACK_MODULES = ("pyautoattack", "autoattack")


def craft(
    attack: Any,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    batch_size: int | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Runs any attack on a model; the model and the process's random state are as before afterwards.

    Args:
        attack: a :class:`~bnsurgery.PGD`, a torchattacks object, an AutoAttack object, or a callable
            ``attack(model, x, y)``. The last three find the model in evaluation mode, with ``requires_grad`` off, and
            the global generators seeded from ``generator``; one that is bound to a model is lent this one instead.
        model: maps inputs to logits (N, K).
        x: inputs (N, ...) on the model's device.
        y: labels (N,).
        generator: where all randomness comes from.
        batch_size: AutoAttack cuts the examples into batches of so many; the others take them all at once.
        start: the first iterate of a PGD, (N, ...), instead of a random start.

    Returns:
        Adversarial examples like ``x``, detached.

    Raises:
        TypeError: this is no attack.
        ValueError: wrong shapes.
        BNSurgeryError: the attack returned something else than inputs of the same shape.
    """
    check_attack(attack)
    if isinstance(attack, PGD):
        return attack(model, x, y, generator=generator, **({} if start is None else {"start": start}))
    check_pair(x, y)
    if is_autoattack(attack) or (is_torchattacks(attack) and not normalises(attack)):
        check_bounds(x, (0.0, 1.0))  # they would clamp it there without a word
    seed = seed_of(generator)
    x_own, y_own = x.detach().clone(), y.clone()
    made: Any
    with _bound(attack, model, x.device) as held, attacking(held), global_state(x.device, seed), torch.enable_grad():
        if is_torchattacks(attack):
            made = attack(x_own, y_own)
        elif is_autoattack(attack):
            made = run_autoattack(attack, x_own, y_own, batch_size=batch_size or max(len(x), 1))
        else:
            made = attack(model, x_own, y_own)
    if not isinstance(made, Tensor) or made.shape != x.shape:
        raise BNSurgeryError(
            f"{describe_attack(attack)} must return inputs of shape {tuple(x.shape)}, got {describe(made)}"
        )
    return made.detach().to(x.device, x.dtype)


def check_attack(attack: Any) -> None:
    """Raises :class:`TypeError` unless this can be run as an attack."""
    if not (isinstance(attack, PGD) or is_autoattack(attack) or callable(attack)) or isinstance(attack, type):
        raise TypeError(
            "an attack must be a PGD, a torchattacks or AutoAttack object, or a callable attack(model, x, y), "
            f"got {attack!r}"
        )
    if isinstance(attack, PGD):
        check_eps(attack.eps, attack.norm, attack.bounds)
        if attack.targeted:
            raise ValueError(
                "a targeted PGD takes labels as targets, and here it would be given the true ones: pass a callable "
                "that chooses targets, such as lambda model, x, y: attack(model, x, (y + 1) % 10)"
            )


def describe_attack(attack: Any) -> str:
    """A name for tables and messages."""
    if isinstance(attack, str):
        return attack
    if isinstance(attack, PGD):
        return repr(attack)
    if is_torchattacks(attack):
        return f"torchattacks.{attack.attack}"
    if is_autoattack(attack):
        return "AutoAttack"
    return getattr(attack, "__name__", type(attack).__name__)


def configuration_of(attack: Any) -> str:
    """What sets an attack apart from others of its kind, for the configuration of a checkpoint."""
    if is_torchattacks(attack):
        plain = (bool, int, float, str, tuple, list)
        options = {k: v for k, v in sorted(vars(attack).items()) if isinstance(v, plain) and not k.startswith("_")}
        return f"{describe_attack(attack)}({options})"
    if is_autoattack(attack):
        return f"AutoAttack({attack.norm}, {attack.epsilon:g}, {attack.attacks_to_run}, {attack.seed})"
    return describe_attack(attack)


def autoattack(
    model: nn.Module,
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    version: Literal["standard", "plus", "rand"] = "standard",
    seed: int = 0,
    classes: int = 10,
    device: torch.device | str = "cpu",
) -> Any:
    """An AutoAttack object (Croce and Hein, 2020) from whichever package is installed, silent.

    Args:
        model: maps inputs in [0, 1] to logits (N, ``classes``).
        eps: radius in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        version: as AutoAttack names them.
        seed: seeds each of its attacks.
        classes: where there are fewer than ten, the targeted attacks have fewer targets.
        device: where it works.

    Returns:
        That package's ``AutoAttack``, bound to the model: serves wherever an attack does.

    Raises:
        ValueError: ``norm`` is neither.
        MissingExtraError: neither ``pyautoattack`` nor ``autoattack`` is installed.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10)).eval()
        >>> autoattack(model, eps=8 / 255).attacks_to_run
        ['apgd-ce', 'apgd-t', 'fab-t', 'square']
    """
    check_norm(norm)
    module = _autoattack_module()
    name = {"linf": "Linf", "l2": "L2"}[norm]
    options: dict[str, Any] = {"norm": name, "eps": eps, "version": version, "seed": seed, "device": device}
    if "verbose" in inspect.signature(module.AutoAttack).parameters:
        options["verbose"] = False
    attack = module.AutoAttack(model, **options)
    for part in (attack.apgd_targeted, attack.fab):
        part.n_target_classes = min(part.n_target_classes, classes - 1)
    return attack


def run_autoattack(attack: Any, x: Tensor, y: Tensor, *, batch_size: int) -> Tensor:
    """Runs an AutoAttack object of either package, and returns the adversarial examples alone."""
    method = attack.run_standard_evaluation
    size = "batch_size" if "batch_size" in inspect.signature(method).parameters else "bs"
    made = method(x, y, **{size: batch_size})
    result: Tensor = made[0] if isinstance(made, tuple) else made
    return result


def is_torchattacks(attack: object) -> bool:
    """Whether this is a torchattacks object."""
    module = sys.modules.get("torchattacks.attack")
    return module is not None and isinstance(attack, module.Attack)


def is_autoattack(attack: object) -> bool:
    """Whether this is an AutoAttack object, of ``pyautoattack`` or ``autoattack``."""
    modules = [sys.modules.get(name) for name in _AUTOATTACK_MODULES]
    return any(module is not None and isinstance(attack, module.AutoAttack) for module in modules)


def is_around(attack: Any, model: nn.Module) -> bool:
    """Whether an attack object is bound to a larger module of which this model is a part."""
    if not (is_torchattacks(attack) or is_autoattack(attack)) or not isinstance(attack.model, nn.Module):
        return False
    bound = unwrap(attack.model)
    return bound is not model and any(module is model for module in bound.modules())


def normalises(attack: Any) -> bool:
    """Whether an attack object undoes a normalisation of the data by itself."""
    if is_torchattacks(attack):
        return attack._normalization_applied is True
    return isinstance(attack, PGD) and attack.mean is not None


def threat_of(attack: Any) -> tuple[float, str] | None:
    """Radius and norm of an attack object, where it says them."""
    if isinstance(attack, PGD):
        return attack.eps, attack.norm
    if is_autoattack(attack):
        return float(attack.epsilon), str(attack.norm).lower()
    return None


def _autoattack_module() -> Any:
    for name in _AUTOATTACK_MODULES:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise MissingExtraError("pyautoattack", "autoattack", "AutoAttack")


@contextmanager
def _bound(attack: Any, model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Sees that an attack object attacks ``model`` in the block; yields the module that it runs.

    An object that is bound to another model is lent this one. One that is bound to a wrapper of this model (a
    normalisation in front, say) or to a function is used as it is.
    """
    if is_torchattacks(attack):
        # Attacks made of attacks (MultiAttack, AutoAttack) list all of them, flat, in `_attacks`.
        parts = [attack, *vars(attack).get("_attacks", {}).values()]
    elif is_autoattack(attack):
        parts = [attack, attack.apgd, attack.apgd_targeted, attack.fab, attack.square]
    else:
        yield model
        return
    bound = attack.model
    if not isinstance(bound, nn.Module):
        yield model
    elif any(module is model for module in bound.modules()):
        yield bound
    else:
        with _lent(parts, model, device):
            yield model


@contextmanager
def _lent(parts: list[Any], model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts a model where attack objects hold theirs: as model, forward function and device, for the block.

    Written to ``__dict__``: torchattacks' ``__setattr__`` keeps every value it is given alive for good.
    """
    lent = {"model": model, "predict": model, "device": device}
    before = [{name: vars(part)[name] for name in lent if name in vars(part)} for part in parts]
    try:
        for part, held in zip(parts, before, strict=True):
            vars(part).update({name: lent[name] for name in held})
        yield
    finally:
        for part, held in zip(parts, before, strict=True):
            vars(part).update(held)
