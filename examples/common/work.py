"""A run under way: what all commands share, and training that goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from bnsurgery import CheckpointError, EpochRecord, Finetuning, adv_finetune
from examples import several
from examples.common.data import Images
from examples.common.files import Folder, Problem, begin_anew, origin, read_json, write_json


@dataclass
class Work:
    """What all commands share.

    Attributes:
        folder: of the results.
        read: reads CIFAR-10 or the sample of it, once it is needed.
        scale: how much is done.
        device: where.
        deadline: in ``time.monotonic()``'s seconds; None: there is none.
        bars: whether progress bars are shown; else a line is printed after each epoch.
        worked: whether anything has been done yet; what would end too late is begun only where nothing has.
        program: the name of the example.
    """

    folder: Folder
    read: Callable[[], Images]
    scale: Any
    device: torch.device
    deadline: float | None = None
    bars: bool = True
    worked: bool = field(default=False, init=False)
    program: ClassVar[str]

    @cached_property
    def images(self) -> Images:
        """CIFAR-10, or the sample of it."""
        return self.read()

    @property
    def left(self) -> float | None:
        """Seconds until the deadline, below 0 behind it; None: there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def fits(self, seconds: float | None) -> bool:
        """Whether to begin something that takes about so long; None: nobody knows."""
        left = several.of_first(lambda: self.left)
        return left is None or (left > 0 and (left >= (seconds or 0.0) or not self.worked))

    def note_call(self, path: Path, *, goes_on: bool, needs: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """What each call that worked on a result was made with, this one last; kept beside the checkpoint.

        Raises:
            Problem: it was begun of other results than are here now, which ``needs`` names by their hashes.
        """
        before: list[dict[str, Any]] = []
        if goes_on and path.exists():
            record = read_json(path, lambda record: (list(record["calls"]), dict(record.get("needs", {}))))
            require_begun_of(path, record.get("needs", {}), needs or {})
            before = record["calls"]
        calls = [*before, origin(self.program, self.folder.seed, self.device)]
        write_json(path, {"calls": calls, **({"needs": dict(needs)} if needs else {})})
        return calls


def require_begun_of(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises :class:`Problem` unless something was begun of the results, or with the settings, that are here now."""
    differs = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differs:
        raise Problem(f"{path} was begun of another {', '.join(differs)} than is here now: {begin_anew(path)}")


def tune(
    work: Work,
    name: str,
    model: nn.Module,
    data: Iterable[Any],
    checkpoint: Path,
    *,
    epochs: int,
    callbacks: Sequence[Callable[[EpochRecord, nn.Module], bool | None]] = (),
    **options: Any,
) -> Finetuning:
    """Trains a model, in place; goes on from the checkpoint, and ends at the deadline.

    Raises:
        Problem: the checkpoint is damaged, of another run, or cannot be written.
    """
    left = work.left

    def say(record: EpochRecord, _: nn.Module) -> None:
        left = record.seconds * (epochs - record.epoch - 1) / 60
        print(
            f"{name}: epoch {record.epoch + 1} of {epochs}, loss {record.loss:.3f}, error {record.error:.1f}%, "
            f"{record.seconds:.0f} s; about {left:.0f} min left",
            flush=True,
        )

    try:
        return adv_finetune(
            model,
            data,
            epochs=epochs,
            step_precision="auto",
            seed=work.folder.seed,
            max_seconds=None if left is None else max(left, 1e-3),
            checkpoint=checkpoint,
            callbacks=(*callbacks, *(() if work.bars else (say,))),
            progress=work.bars,
            **options,
        )
    except CheckpointError as error:
        raise Problem(str(error)) from None
    except OSError as error:
        raise Problem(f"cannot write {checkpoint}: {error.strerror or error}") from None


@contextmanager
def float32() -> Iterator[None]:
    """Keeps convolutions on a GPU from rounding their inputs to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
