"""State files: plain values and tensors under a checksum, written whole, read without executing anything.

A file is four parts: a line that names the format, a line with the SHA-256 of all that follows, a line of JSON, and the
tensors in the safetensors format. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bnsurgery._files import clear_partials, replacing
from bnsurgery._ranks import Ranks
from bnsurgery.errors import BNSurgeryWarning, CheckpointError

FORMAT = "bnsurgery-state-2"
_PLAIN = (bool, int, float, str)
_OWN_DTYPES = {torch.complex128: torch.float64}
"""Dtypes that safetensors does not know, and what they are kept as, the last dimension twice as long."""


def previous(path: Path) -> Path:
    """Where the file before the one at ``path`` is kept."""
    return path.with_name(f"{path.name}.previous")


def require_folder(path: Path | None) -> None:
    """Raises :class:`ValueError`, on all processes, where the folder of a checkpoint, on the first, is not there.

    Or where some processes are to have a checkpoint, and others not.
    """
    ranks = Ranks()
    if len(set(ranks.gather(path is None))) > 1:
        raise ValueError("checkpoint= must be given to all processes, or to none; the first alone writes it")
    if path is not None and not ranks.of_first(path.parent.is_dir()):
        raise ValueError(f"checkpoint={str(path)!r}: the folder {str(path.parent)!r} does not exist")


def save(path: Path, kind: str, state: dict[str, Any]) -> None:
    """Writes a state: None, booleans, numbers, strings, lists, tuples, dicts, NumPy arrays and tensors, nested.

    The file before it stays at ``path`` until the new one is whole, and then under :func:`previous`.

    Raises:
        TypeError: there is something else in it.
        OSError: the file cannot be written; what was at ``path`` is there still.
    """
    data = dumped(kind, state)
    with replacing(path, keep=previous(path)) as partial:
        partial.write_bytes(data)


def load(path: Path, kind: str) -> dict[str, Any]:
    """Reads a state; where the file is damaged, the one before it, with a warning.

    Raises:
        CheckpointError: neither can be read, or it is a state of another kind.
    """
    try:
        return _read(path, kind)
    except CheckpointError as error:
        before = previous(path)
        if not before.is_file():
            raise
        try:
            state = _read(before, kind)
        except CheckpointError as second:
            raise CheckpointError(f"{error}; nor the one before it: {second}") from error
        warnings.warn(f"{error}; the one before it is used, {str(before)!r}", BNSurgeryWarning, stacklevel=4)
        return state


def of_first(ranks: Ranks, path: Path, kind: str) -> dict[str, Any] | None:
    """The state in the file that the first of several processes sees, on all of them; None where there is none.

    Raises:
        CheckpointError: it cannot be read, nor the one before it; on all of them.
        OSError: its folder cannot be looked at; on all of them.
    """
    found: bytes | str | OSError | None = None
    if ranks.first:
        try:
            clear_partials(path)
            state = load(path, kind) if path.exists() else None
            if ranks.alone:
                return state
            found = None if state is None else dumped(kind, state)
        except CheckpointError as error:
            if ranks.alone:
                raise
            found = str(error)
        except OSError as error:
            found = error
    found = ranks.of_first(found)
    if isinstance(found, OSError):
        raise found
    if isinstance(found, str):
        raise CheckpointError(found)
    return None if found is None else loaded(found, kind)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors and their names, in order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def taken_apart(path: Path) -> Iterator[None]:
    """While what a file held is put into use: whatever does not fit there makes it a damaged one.

    Raises:
        CheckpointError: anything went wrong.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: {type(error).__name__}: {error}") from error


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of what differs between two configurations, of plain values.

    Raises:
        ValueError: there is something else in one.
    """
    return [name for name in sorted(was.keys() | now.keys(), key=str) if _text(was, name) != _text(now, name)]


def of_another(path: Path, what: str, differing: list[str]) -> CheckpointError:
    """What refuses a checkpoint of another run or evaluation; each difference in words."""
    return CheckpointError(
        f"the checkpoint {str(path)!r} belongs to another {what}; {'; '.join(differing)}: use another path, or remove "
        "the file"
    )


def warn_unwritten(path: Path, error: Exception, what: str, *, when: str = "", stacklevel: int) -> None:
    """Says that a checkpoint could not be written, and what goes on; ``stacklevel`` is counted from the caller."""
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    warnings.warn(
        f"cannot write the checkpoint {str(path)!r}{when} ({reason}): the {what} goes on, and the last one that was "
        "written stays",
        BNSurgeryWarning,
        stacklevel=stacklevel + 1,
    )


def require_same_in_all(ranks: Ranks, configuration: dict[str, Any]) -> None:
    """Raises :class:`ValueError`, on all processes, where these were given different arguments, of plain values."""
    every = ranks.gather(configuration)
    names = sorted({name for own in every for name in differences(every[0], own)})
    if names:
        given = "; ".join(f"{name}: {', '.join(repr(own.get(name)) for own in every)}" for name in names)
        raise ValueError(f"the processes were given different arguments, where all must have the same ({given})")


def _text(values: dict[str, Any], name: str) -> str | None:
    tensors: list[Tensor] = []
    text = json.dumps(_packed(values[name], tensors)) if name in values else None
    if tensors:
        raise ValueError(f"a tensor in the configuration, as {name!r}")
    return text


def dumped(kind: str, state: dict[str, Any]) -> bytes:
    """The bytes of a state file."""
    tensors: list[Tensor] = []
    text = json.dumps({"kind": kind, "state": _packed(state, tensors)})
    held = {str(index): _kept(tensor) for index, tensor in enumerate(tensors)}
    rest = text.encode() + b"\n" + safetensors.torch.save(held)
    return f"{FORMAT}\n{hashlib.sha256(rest).hexdigest()}\n".encode() + rest


def loaded(data: bytes, kind: str) -> dict[str, Any]:
    """The state in the bytes of a state file.

    Raises:
        ValueError: these are no whole state file, or one of another kind; the message says what is wrong.
    """
    form, _, data = data.partition(b"\n")
    if form != FORMAT.encode():
        raise ValueError(f"this is no state of bnsurgery ({FORMAT})")
    checksum, _, rest = data.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != checksum:
        raise ValueError("the checksum does not match: it is cut short or damaged")
    text, _, blob = rest.partition(b"\n")
    try:
        content = json.loads(text)
        tensors = safetensors.torch.load(blob)
        state = _unpacked(content["state"], tensors)
    except (SafetensorError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"its content is malformed ({type(error).__name__}: {error})") from error
    if content.get("kind") != kind:
        raise ValueError(f"this is a state of {content.get('kind')!r}, not of {kind!r}")
    if not isinstance(state, dict):
        raise ValueError(f"its content is malformed (a {type(state).__name__})")
    return state


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError("it is no file")  # a device may have no end
        return loaded(path.read_bytes(), kind)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {reason or error}") from error


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON has it; tensors are put into the list, and their places there written instead."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [len(tensors) - 1, str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, np.ndarray):
        return {"array": [str(value.dtype), value.tolist()]}
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return value.item()
    if isinstance(value, dict):
        return {"dict": [[_key(key), _packed(part, tensors)] for key, part in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(part, tensors) for part in value]}
    raise TypeError(f"a checkpoint holds numbers, strings, lists, dicts and tensors, got a {type(value).__name__}")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, _PLAIN):
        return value
    ((form, content),) = value.items()
    if form == "tensor":
        place, dtype, shape = content
        return _restored(tensors[str(place)], getattr(torch, dtype), torch.Size(shape))
    if form == "array":
        dtype, entries = content
        if not np.issubdtype(np.dtype(dtype), np.number):
            raise ValueError(f"an array of {dtype!r}")
        return np.asarray(entries, dtype=dtype)
    if form == "dict":
        return {_key(key): _unpacked(part, tensors) for key, part in content}
    if form in ("list", "tuple"):
        parts = [_unpacked(part, tensors) for part in content]
        return parts if form == "list" else tuple(parts)
    raise ValueError(f"a {form!r}")


def _key(key: Any) -> Any:
    if not isinstance(key, (str, int)):
        raise TypeError(f"keys in a checkpoint are strings or numbers, got {key!r}")
    return key


def _kept(tensor: Tensor) -> Tensor:
    """In memory of its own, in a dtype that safetensors knows."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"a checkpoint holds dense tensors, got one of {tensor.layout} and {tensor.dtype}")
    own = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return torch.view_as_real(own) if own.dtype in _OWN_DTYPES else own


def _restored(tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if dtype in _OWN_DTYPES and tensor.dtype == _OWN_DTYPES[dtype]:
        tensor = torch.view_as_complex(tensor)
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"a tensor of {tensor.dtype} {tuple(tensor.shape)} for one of {dtype} {tuple(shape)}")
    return tensor


def remove(path: Path) -> None:
    """Removes a state file, and the one before it."""
    for one in (path, previous(path)):
        with suppress(FileNotFoundError):
            one.unlink()
