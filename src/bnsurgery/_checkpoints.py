"""What a checkpoint of a fine-tuning run is: the configuration that it belongs to, and all that it puts back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery import _states
from bnsurgery._records import EpochRecord, is_number, require_numbers
from bnsurgery._undo import Undo
from bnsurgery.errors import CheckpointError
from bnsurgery.layers import join, named_modules, named_parameters

KIND = "adv_finetune"
ENDED = ("epochs", "max_steps", "callback")
"""How a run that is kept has ended, or is to."""


def require_same(path: Path, state: dict[str, Any], configuration: dict[str, Any]) -> None:
    """Refuses a checkpoint of another configuration.

    When BN becomes consistent may differ where it has not yet, nor is to have: until then the runs are the same.

    Raises:
        CheckpointError: it is of another configuration (differences listed), or says none.
    """
    with _states.taken_apart(path):
        saved = dict(state["configuration"])
        begun = epochs_begun(state)
        names = _states.differences(_so_far(saved, begun), _so_far(configuration, begun))
        differing = [_difference(name, saved.get(name), configuration.get(name)) for name in names]
    if differing:
        raise _states.of_another(path, "run", differing)


def epochs_begun(state: dict[str, Any]) -> int:
    """The epochs of which a checkpoint has at least one batch, or all."""
    epochs = len(state["history"]) if isinstance(state.get("history"), list) else 0
    tuning = state.get("tuning")
    return epochs + (isinstance(tuning, dict) and tuning.get("epoch") == epochs and bool(state.get("under_way")))


def _so_far(configuration: dict[str, Any], epochs: int) -> dict[str, Any]:
    """A configuration without what has had no part in the first epochs."""
    after = configuration.get("consistent_bn_after")
    begun = isinstance(after, int) and after < epochs
    return configuration if begun else configuration | {"consistent_bn_after": None}


def _difference(name: str, was: Any, now: Any) -> str:
    """What differs: of what trains, which may be long, the entries that only one of the two has."""
    if name == "trainable" and isinstance(was, list):
        return f"{name}: {_some(was, now)} before, {_some(now, was)} now"
    return f"{name} was {was!r}, is {now!r}"


def _some(these: list[Any], others: list[Any]) -> str:
    """The first entry that is not among the others, and how many more there are."""
    alone = [entry for entry in these if entry not in others]
    more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
    return f"{alone[0]!r}{more}" if alone else "nothing else"


def fingerprint(model: nn.Module, trainable: tuple[str, ...]) -> str:
    """A hash of the parameters that do not train: a checkpoint goes with the network that it was made from."""
    return _states.fingerprint(
        (name, parameter) for name, parameter in named_parameters(model).items() if name not in trainable
    )


def tensors(
    model: nn.Module, trainable: tuple[str, ...], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Tensor]:
    """What a run changes: the parameters of a model that train and all its buffers, by name; the tensors themselves.

    With them what else the optimizer moves, which is not of the model (a temperature in the loss, say), by its place.
    """
    parameters = named_parameters(model)
    found: dict[str, Tensor] = {name: parameters[name] for name in trainable}
    for name, module in named_modules(model):
        found |= {join(name, local): buffer for local, buffer in module.named_buffers(recurse=False)}
    known = {id(parameter) for parameter in model.parameters()}
    moved = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    found |= {f"optimizer, parameter {place}": p for place, p in enumerate(moved) if id(p) not in known}
    return found


def restore(
    path: Path, state: dict[str, Any], targets: dict[str, Tensor], optimizer: torch.optim.Optimizer | None
) -> tuple[list[EpochRecord], str]:
    """Puts the model and the optimizer back to where they were saved; the model's tensors come last, all or none.

    Returns:
        The history, and how the run has ended.

    Raises:
        CheckpointError: entries are missing, malformed, or do not fit the model.
    """
    with _states.taken_apart(path):
        history = [EpochRecord(**record) for record in state["history"]]
        for record in history:
            require_numbers(asdict(record))
        ended, values = state["ended"], dict(state["tensors"])
        if ended not in ENDED:
            raise ValueError(f"it has ended by {ended!r}")
        require_fit(path, values, targets)
        if optimizer is not None:
            load_optimizer(optimizer, state["optimizer"])
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(values[name])
    return history, ended


def require_fit(path: Path, values: dict[str, Any], targets: Mapping[str, Tensor | None]) -> None:
    """Raises :class:`CheckpointError` where a checkpoint's tensors cannot take the place of the model's."""
    wrong = sorted(targets.keys() ^ values.keys())
    wrong += [name for name in targets if name in values and not _fits(values[name], targets[name])]
    if wrong:
        raise CheckpointError(
            f"the checkpoint {str(path)!r}: its tensors do not fit the model: {', '.join(map(str, wrong[:6]))}"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts an optimizer's state back, and tries one of torch's own out, on gradients of zero: the step is taken back.

    Raises:
        ValueError: its options are others, or it cannot make a step with this state.
    """
    for now, was in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
        if _options(now) != _options(was):
            raise ValueError(f"the options of the optimizer are {_options(was)}, expected {_options(now)}")
    optimizer.load_state_dict(state)
    _keep_dtypes(optimizer, state)
    if type(optimizer).__module__.split(".")[:2] != ["torch", "optim"]:
        return  # another one may count its steps elsewhere
    if isinstance(optimizer, (torch.optim.SparseAdam, torch.optim.LBFGS)):
        return  # these want sparse gradients, and a closure
    undo = Undo(optimizer)
    undo.note()
    hooks: list[dict[int, Any]] = [vars(optimizer)[f"_optimizer_step_{when}_hooks"] for when in ("pre", "post")]
    held = [dict(own) for own in hooks]
    for own in hooks:
        own.clear()  # of the caller's: this is no step of the run
    try:
        for group in optimizer.param_groups:
            for parameter in filter(lambda own: own.requires_grad, group["params"]):
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception as error:
        raise ValueError(f"the optimizer cannot go on with its state ({type(error).__name__}: {error})") from error
    finally:
        for own, before in zip(hooks, held, strict=True):
            own.update(before)
        optimizer.zero_grad(set_to_none=True)
        undo.restore()


def _keep_dtypes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What has been loaded gets back the dtypes that it was saved in; torch casts to those of the parameters."""
    for now, was in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for parameter, index in zip(now["params"], was["params"], strict=True):
            for name, saved in state["state"].get(index, {}).items():
                held = optimizer.state[parameter].get(name)
                if isinstance(saved, Tensor) and isinstance(held, Tensor) and held.dtype != saved.dtype:
                    optimizer.state[parameter][name] = saved.to(held.device)


def _options(group: dict[str, Any]) -> dict[str, str]:
    """The kinds of a parameter group's options, whose values callbacks may move, and its parameters."""
    kinds = {name: _kind(value) for name, value in group.items() if name != "params"}
    return kinds | {"params": repr(group["params"])}


def _kind(value: object) -> str:
    """Numbers are of one kind: a schedule, a callback or JSON makes the one of the other."""
    return "number" if is_number(value) else type(value).__name__


def _fits(value: object, target: Tensor | None) -> bool:
    if not isinstance(value, Tensor) or target is None:
        return False
    return value.shape == target.shape and value.dtype == target.dtype
