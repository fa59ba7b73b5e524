"""Checkpoints of a fine-tuning run: written whole or not at all, read without executing anything."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnsurgery._files import replacing
from bnsurgery._tuning import EpochRecord
from bnsurgery.errors import CheckpointError
from bnsurgery.layers import join, named_modules, named_parameters

FORMAT = "bnsurgery-checkpoint-1"


def save(
    path: Path,
    configuration: dict[str, Any],
    progress: dict[str, Any],
    targets: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    """Writes a checkpoint; the one before stays until the new one is whole."""
    state = {
        **progress,
        "configuration": configuration,
        "format": FORMAT,
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "random": random_state(device, generator),
        "tensors": {name: tensor.detach().cpu() for name, tensor in targets.items()},
    }
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the disk is full, which torch has no words for
                raise error.__context__ from None
            raise


def load(path: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint of the same configuration; nothing in it is executed.

    When BN becomes consistent may differ where it has not yet, nor is to have: until then the runs are the same.

    Raises:
        CheckpointError: it cannot be read, is none, or belongs to another configuration (differences listed).
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{str(path)!r} is not a checkpoint of bnsurgery ({FORMAT})")
    saved = state.get("configuration")
    if not isinstance(saved, dict):
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: it says no configuration")
    epochs = len(state["history"]) if isinstance(state.get("history"), list) else 0
    before, now = _so_far(saved, epochs), _so_far(configuration, epochs)
    differences = [
        _difference(name, saved.get(name), configuration.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} belongs to another run; {'; '.join(differences)}: "
            "use another path, or remove the file"
        )
    return state


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
    digest = hashlib.sha256()
    for name, parameter in named_parameters(model).items():
        if name not in trainable:
            flat = parameter.detach().cpu().contiguous().flatten()
            digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tensors(model: nn.Module, trainable: tuple[str, ...]) -> dict[str, Tensor]:
    """What a run changes in a model: the parameters that train and all buffers, by name; the tensors themselves."""
    parameters = named_parameters(model)
    found: dict[str, Tensor] = {name: parameters[name] for name in trainable}
    for name, module in named_modules(model):
        found |= {join(name, local): buffer for local, buffer in module.named_buffers(recurse=False)}
    return found


def restore(
    path: Path,
    state: dict[str, Any],
    targets: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[list[EpochRecord], int, str]:
    """Puts a run back to where it was saved; the tensors come last, all or none.

    Returns:
        The history, the steps behind it, and how the run has ended.

    Raises:
        CheckpointError: entries are missing, malformed, or do not fit the model.
    """
    try:
        history = [EpochRecord(**record) for record in state["history"]]
        step, ended, values = int(state["step"]), str(state["ended"]), dict(state["tensors"])
        wrong = sorted(targets.keys() ^ values.keys())
        wrong += [name for name in targets.keys() & values.keys() if targets[name].shape != values[name].shape]
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        set_random_state(state["random"], device, generator)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: {type(error).__name__}: {error}") from error
    if wrong:
        raise CheckpointError(f"the checkpoint {str(path)!r}: its tensors do not fit the model: {', '.join(wrong[:6])}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
    return history, step, ended


def random_state(device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """All random state that a run depends on, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "attack": generator.get_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device, generator: torch.Generator) -> None:
    """Puts :func:`random_state` back."""
    torch.set_rng_state(state["torch"])
    generator.set_state(state["attack"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
