"""What a checkpoint of a fine-tuning run is: the configuration that it belongs to, and all that it puts back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery import _states
from bnsurgery._records import EpochRecord, Tally
from bnsurgery.errors import CheckpointError
from bnsurgery.layers import join, named_modules, named_parameters

KIND = "adv_finetune"


def require_same(path: Path, state: dict[str, Any], configuration: dict[str, Any]) -> None:
    """Refuses a checkpoint of another configuration.

    When BN becomes consistent may differ where it has not yet, nor is to have: until then the runs are the same.

    Raises:
        CheckpointError: it is of another configuration (differences listed), or says none.
    """
    saved = state.get("configuration")
    if not isinstance(saved, dict):
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: it says no configuration")
    begun = epochs_begun(state)
    before, now = _so_far(saved, begun), _so_far(configuration, begun)
    differences = [
        _difference(name, saved.get(name), configuration.get(name))
        for name in sorted(before.keys() | now.keys(), key=str)
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} belongs to another run; {'; '.join(differences)}: "
            "use another path, or remove the file"
        )


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


def tensors(model: nn.Module, trainable: tuple[str, ...]) -> dict[str, Tensor]:
    """What a run changes in a model: the parameters that train and all buffers, by name; the tensors themselves."""
    parameters = named_parameters(model)
    found: dict[str, Tensor] = {name: parameters[name] for name in trainable}
    for name, module in named_modules(model):
        found |= {join(name, local): buffer for local, buffer in module.named_buffers(recurse=False)}
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
    try:
        history = [EpochRecord(**record) for record in state["history"]]
        ended, values = str(state["ended"]), dict(state["tensors"])
        Tally(**state["tuning"]["tally"])
        wrong = sorted(targets.keys() ^ values.keys())
        wrong += [name for name in targets.keys() & values.keys() if not _fits(values[name], targets[name])]
        if optimizer is not None and not wrong:
            optimizer.load_state_dict(state["optimizer"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    if wrong:
        raise CheckpointError(f"the checkpoint {str(path)!r}: its tensors do not fit the model: {', '.join(wrong[:6])}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
    return history, ended


def damaged(path: Path, error: Exception) -> CheckpointError:
    """For a checkpoint that is whole and yet not one that was ever written."""
    return CheckpointError(f"the checkpoint {str(path)!r} is damaged: {type(error).__name__}: {error}")


def _fits(value: object, target: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == target.shape and value.dtype == target.dtype
