"""Where results are, and how they are written and read: whole or not at all, with what they were made with."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from examples.machine import commit, hardware, versions


class Problem(Exception):  # noqa: N818 - not ours to fix: it is for the user
    """What is wrong, in one line for the user."""


@dataclass(frozen=True)
class Folder:
    """The results of one width and seed. Checkpoints and weights are in ``work``, which need not be kept.

    Attributes:
        root: what ``--out`` said.
        width: base width of the networks.
        seed: of the runs.
    """

    root: Path
    width: int
    seed: int

    @property
    def path(self) -> Path:
        """The folder of the results."""
        return self.root / f"w{self.width}-seed{self.seed}"

    def record(self, row: str, kind: str) -> Path:
        """The JSON file of a kind of result: ``"train"``, ``"evaluate"``, ``"choose"``."""
        return self.path / f"{row}.{kind}.json"

    def patch(self, row: str) -> Path:
        """The BN patch of a row."""
        return self.path / f"{row}.patch.safetensors"

    def work(self, name: str) -> Path:
        """A file that is needed only on the way."""
        return self.path / "work" / name

    def weights(self, row: str) -> Path:
        """The whole network of a row."""
        return self.work(f"{row}.safetensors")

    def make(self) -> None:
        """Makes the folders.

        Raises:
            Problem: they cannot be made.
        """
        try:
            self.work("").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Problem(f"--out {self.root} cannot be a folder: {error.strerror}") from None


def write(path: Path, put: Callable[[Path], object]) -> None:
    """Lets ``put`` write a file beside ``path``, then renames it: after a failure ``path`` is as it was.

    Raises:
        Problem: it cannot be written, because the disk is full for example.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        put(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Problem(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
        Problem: there is none, or it is not whole.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"there is no {path} yet") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Problem(f"{path} is cut short or damaged ({error}): remove it, and it is made again") from None
    if not isinstance(record, dict):
        raise Problem(f"{path} is not a result: remove it, and it is made again")
    return record


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes all parameters and buffers, as safetensors."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write(path, lambda partial: partial.write_bytes(save(state)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads them.

    Raises:
        Problem: the file is missing, damaged, or of another network.
    """
    try:
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Problem(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        shapes = [str(tuple(held[name].shape)) if name in held else "missing" for held in (state, own)]
        raise Problem(f"{path} is of another network or width: {name} is {shapes[0]}, and should be {shapes[1]}")
    model.load_state_dict(state)


def origin(seed: int, device: torch.device) -> dict[str, Any]:
    """What a result was made with."""
    return {
        "command": " ".join(["python -m examples.walter", *sys.argv[1:]]),
        "commit": commit(),
        "seed": seed,
        "versions": versions(),
        "hardware": hardware(device),
    }
