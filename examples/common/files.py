"""Where results are, and how they are written and read: whole or not at all, with what they were made with."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from examples import several
from examples.machine import commit, hardware, versions

COMMIT = commit()
"""Of the code that is running: read when it is loaded, since a run may last longer than the commit is checked out."""


class Problem(Exception):  # noqa: N818 - it is for the user, who need not look for an error of the program
    """What is wrong, in one line."""


class Pending(Problem):
    """A result is needed that is not there yet."""


def label(settings: Mapping[str, Any]) -> str:
    """Settings as they are named in files."""
    short = {option: f"{value:g}" if isinstance(value, float) else value for option, value in settings.items()}
    return "-".join(f"{option}{value}" for option, value in short.items())


@dataclass(frozen=True)
class Folder:
    """The results of one width and seed. Checkpoints and weights are in ``interim``; finished results are read without.

    Attributes:
        root: what ``--out`` said.
        width: base width of the networks.
        seed: of the runs.
        network: where there are several, which of them; "" for the usual one.
    """

    root: Path
    width: int
    seed: int
    network: str = ""

    @property
    def path(self) -> Path:
        """The folder of the results."""
        network = f"{self.network}-" if self.network else ""
        return self.root / f"{network}w{self.width}-seed{self.seed}"

    def record(self, row: str, kind: str) -> Path:
        """The JSON file of a kind of result: ``"train"``, ``"evaluate"``, ``"choose"``."""
        return self.path / f"{row}.{kind}.json"

    def choice(self, row: str, settings: Mapping[str, Any]) -> Path:
        """The JSON file of settings of a row that are compared with others."""
        return self.record(f"{row}-{label(settings)}", "choose")

    def patch(self, row: str) -> Path:
        """The BN patch of a row."""
        return self.path / f"{row}.patch.safetensors"

    def interim(self, name: str) -> Path:
        """A file that is needed only on the way."""
        return self.path / "interim" / name

    def weights(self, row: str) -> Path:
        """The whole network of a row: beside its results if it is published with them, else in ``interim``."""
        published = self.path / f"{row}.safetensors"
        return published if published.exists() else self.interim(f"{row}.safetensors")

    def make(self) -> None:
        """Makes the folders.

        Raises:
            Problem: they cannot be made.
        """
        try:
            self.interim("").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Problem(f"--out {self.root} cannot be a folder: {error.strerror}") from None

    @contextmanager
    def locked(self, row: str) -> Iterator[None]:
        """Keeps other processes from a row for the block, where the system has such locks.

        Raises:
            Problem: another process works on it.
        """
        self.make()
        with ExitStack() as stack:
            several.of_first(lambda: stack.enter_context(self._lock(row)))
            yield

    @contextmanager
    def _lock(self, row: str) -> Iterator[None]:
        try:
            import fcntl
        except ModuleNotFoundError:
            yield
            return
        path = self.interim(f".{row}.lock")
        try:
            file = path.open("w")
        except OSError as error:
            raise Problem(f"cannot write {path}: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Problem(f"another process is at work on {row} in {self.path}") from None
            except OSError as error:
                raise Problem(f"cannot lock {path}: {error.strerror}") from None
            yield


def begin_anew(path: Path) -> str:
    """The remedy where a file that is kept of a row that is begun will not do: all of them go."""
    row = path.name.split(".")[0]
    return f"remove {path.with_name(row)}.*, and {row} is begun anew"


def write(path: Path, put: Callable[[Path], object]) -> None:
    """Lets ``put`` write a file beside ``path``, then renames it: after a failure ``path`` is as it was.

    Of several processes, the first does.

    Raises:
        Problem: it cannot be written, because the disk is full for example.
    """
    several.of_first(lambda: _write(path, put))


def _write(path: Path, put: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        put(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Problem(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def discard(*paths: Path) -> None:
    """Removes files where they are, and of a checkpoint the one before it, which is kept beside it."""
    several.of_first(lambda: _discard(paths))


def _discard(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.previous").unlink(missing_ok=True)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path, look: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
    """Reads a record; ``look`` goes over what it is to hold.

    Raises:
        Problem: it is not whole.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        look(record)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise Problem(f"{path} is cut short or damaged ({what}): remove it, and it is made again") from None
    return record  # type: ignore[no-any-return]


def require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises :class:`Problem` unless a record was made with this configuration."""
    differences = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if differences:
        raise Problem(f"{path} was made otherwise ({'; '.join(differences)}): remove it, or use another --out")


def kept(path: Path, look: Callable[[dict[str, Any]], object], now: dict[str, Any]) -> dict[str, Any] | None:
    """A record of the configuration ``now``; None where there is none yet.

    Raises:
        Problem: it is damaged, or of another configuration.
    """
    if not path.exists():
        return None
    record = read_json(path, look)
    require_same(path, record["configuration"], now)
    return record


def require_trained(path: Path, sha256: str, record: Mapping[str, Any] | None, of: Path) -> None:
    """Raises :class:`Problem` unless an evaluation at ``path`` is of the network of the training record at ``of``."""
    if record is None:
        raise Problem(f"{path} belongs to {of}, which is not here: put that back, or remove this")
    if record["sha256"] != sha256:
        raise Problem(f"{path} is of another network than {of}: remove it")


def serialized(model: nn.Module) -> tuple[bytes, str]:
    """All parameters and buffers, as safetensors, and the SHA-256 of that."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    return data, hashlib.sha256(data).hexdigest()


def load_weights(model: nn.Module, path: Path, sha256: str, record: Path) -> None:
    """Reads them.

    Raises:
        Problem: the file is missing, or another one than ``record`` says.
    """
    remedy = f"remove {record}, and it is trained again"
    try:
        data = path.read_bytes()
        state: dict[str, Tensor] = load(data)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise Problem(f"cannot read {path} ({reason}): {remedy}") from None
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        shapes = [str(tuple(held[wrong[0]].shape)) if wrong[0] in held else "missing" for held in (state, own)]
        raise Problem(f"{path} is of another network or width ({wrong[0]} is {shapes[0]}, not {shapes[1]}): {remedy}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Problem(f"{path} is not the network of {record}: {remedy}")
    model.load_state_dict(state)


def origin(program: str, seed: int, device: torch.device) -> dict[str, Any]:
    """What a result is made with, by the example of this name."""
    return {
        "command": shlex.join(["python", "-m", f"examples.{program}", *sys.argv[1:]]),
        "commit": COMMIT,
        "seed": seed,
        **({"processes": several.world()} if several.world() > 1 else {}),
        "versions": versions(),
        "hardware": hardware(device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
