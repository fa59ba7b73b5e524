"""What the arguments of a fine-tuning run mean, and which are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bnsurgery._branches import routers
from bnsurgery._data import is_pair
from bnsurgery._records import is_number
from bnsurgery._sharing import SHARD, SYNC
from bnsurgery._step import OnNonFinite
from bnsurgery._tuning import SCHEDULES, Schedule
from bnsurgery.adapters import configuration_of, describe_attack
from bnsurgery.attacks import PGD
from bnsurgery.engine import STEP_PRECISIONS
from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import bn_layers, require_statistics
from bnsurgery.surgery import require_branches

Train = Literal["bn", "bn-params", "bn-stats", "all", "as-is"]
TRAIN: tuple[Train, ...] = get_args(Train)
DataOrder = Literal["same", "any"]
CHOICES: dict[str, tuple[str, ...]] = {
    "data_order": get_args(DataOrder),
    "on_nonfinite": get_args(OnNonFinite),
    "shard": SHARD,
    "step_precision": STEP_PRECISIONS,
    "sync": SYNC,
    "train": TRAIN,
}
OptimizerLike = torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def optimizer_over(
    given: OptimizerLike | None, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer | None:
    """What was given, made where it is a function, or by default SGD; none where nothing trains.

    Raises:
        ValueError: it lacks some of the parameters that train.
    """
    if not parameters:
        return None
    if given is None:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay)
    chosen = given if isinstance(given, torch.optim.Optimizer) else given(parameters)
    held = {id(parameter) for group in chosen.param_groups for parameter in group["params"]}
    missing = sum(id(parameter) not in held for parameter in parameters)
    if missing:
        raise ValueError(f"the optimizer lacks {missing} of the {len(parameters)} parameters that train")
    return chosen


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """What sets a parameter group apart, as plain values."""
    plain = {name: _plain(value) for name, value in group.items() if name != "params"}
    return plain | {"parameters": len(group["params"])}


def _plain(value: object) -> Any:
    """An option of an optimizer as a plain value: numbers of any kind are equal where their values are."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if is_number(value):
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return type(value).__name__


def schedule_of(schedule: str | Schedule) -> Schedule:
    """A schedule by its name, or as it was given."""
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))} or a function, got {schedule!r}")
    return SCHEDULES[schedule]


def check_choices(**given: str) -> None:
    """Raises :class:`ValueError` where an argument is none of the words that it may be."""
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")


def check(
    data: object,
    *,
    epochs: int,
    max_steps: int | None,
    max_seconds: float | None,
    checkpoint_every: float,
    clean_fraction: float,
) -> None:
    """Raises :class:`ValueError` where a number is out of its range, or data is not an iterable of batches."""
    for name, value in (("epochs", epochs), ("max_steps", max_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if value is not None and int(value) != value:
            raise ValueError(f"{name} must be a whole number, got {value}")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds must be above 0, got {max_seconds}")
    if not checkpoint_every >= 0:
        raise ValueError(f"checkpoint_every must be at least 0, got {checkpoint_every}")
    if not 0 <= clean_fraction <= 1:
        raise ValueError(f"clean_fraction must lie in [0, 1], got {clean_fraction}")
    if is_pair(data):
        raise ValueError("data must be an iterable of (x, y) batches, got one pair of tensors: use a DataLoader")
    if not isinstance(data, Iterable):
        raise ValueError(
            f"data must be an iterable of (x, y) batches, got {type(data).__name__}: put a Dataset in a DataLoader"
        )


def check_warmup(eps_warmup: int, epochs: int, attack: Any) -> None:
    """Raises :class:`ValueError` where an attack cannot grow over so many epochs."""
    if not (0 <= eps_warmup < epochs and int(eps_warmup) == eps_warmup):
        raise ValueError(f"eps_warmup must be a whole number from 0 to below epochs={epochs}, got {eps_warmup}")
    if eps_warmup and not isinstance(attack, PGD):
        what = "None" if attack is None else describe_attack(attack)
        raise ValueError(f"eps_warmup goes with a PGD as attack, got {what}")


def goes_through_branches(model: nn.Module, branches: tuple[str, str]) -> bool:
    """Whether the examples of a batch are to take these branches: the model is split, and none has been chosen."""
    found = routers(model)
    if not isinstance(branches, (tuple, list)) or len(branches) != 2:
        raise ValueError(f"branches must be two, for clean and for adversarial examples, got {branches!r}")
    if not found and tuple(branches) != ("clean", "adv"):
        raise ValueError(f"branches={branches!r}, and no BN layer is split: use split_bn, which returns a copy")
    chosen = [router.chosen is not None for router in found]
    if all(chosen):
        return False
    if any(chosen):
        raise BNSurgeryError(
            "use_branch has chosen for some split layers and not for others, which were split by another call: choose "
            "for the whole model, or for none"
        )
    try:
        require_branches(model, branches)
    except ValueError as error:
        raise ValueError(f"branches={branches!r}: {error}; name two of these, or choose one by use_branch") from None
    return True


def check_consistent(consistent_bn_after: int | None, epochs: int, train: str, model: nn.Module) -> None:
    """Raises :class:`ValueError` where BN cannot become consistent after so many epochs."""
    if consistent_bn_after is None:
        return
    whole = isinstance(consistent_bn_after, int) and not isinstance(consistent_bn_after, bool)
    if not (whole and 0 <= consistent_bn_after < epochs):
        raise ValueError(
            f"consistent_bn_after must be a whole number from 0 to below epochs={epochs}, got {consistent_bn_after!r}"
        )
    if train == "bn-stats":
        raise ValueError("consistent_bn_after holds the statistics, and with train='bn-stats' nothing else moves")
    for name, layer in bn_layers(model).items():
        require_statistics(name, layer, "consistent_bn_after")


def attack_text(attack: Any, eps_warmup: int) -> str:
    """For the configuration of a checkpoint."""
    text = "none" if attack is None else configuration_of(attack)
    return f"{text}, eps_warmup={eps_warmup}" if eps_warmup else text
