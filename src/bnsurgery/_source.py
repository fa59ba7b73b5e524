"""Data gone over epoch by epoch, with random numbers of its own, so that a run can go on within an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnsurgery._data import is_pair
from bnsurgery._random import Source, Stream, require_random_state, set_source_state, source_state, sources_of
from bnsurgery._sharing import Share
from bnsurgery._states import taken_apart
from bnsurgery.errors import CheckpointError

SAMPLED = 1 << 16
"""So many values of a batch, at most about twice, tell it from others."""
END = object()
"""Comes after the last batch of an epoch."""


@dataclass(frozen=True)
class Place:
    """A place in the data.

    Attributes:
        now: the states of the stream and of the data's own generators.
        start: what these were when the epoch began; None: between epochs.
        position: batches drawn in the epoch.
        digest: tells these batches from others.
        finished: there are no more in the epoch; the data has been asked for one.
    """

    now: dict[str, Any]
    start: dict[str, Any] | None
    position: int
    digest: str
    finished: bool

    def __post_init__(self) -> None:
        if not (isinstance(self.now, dict) and isinstance(self.start, (dict, type(None)))):
            raise ValueError("it holds no random state")
        if isinstance(self.position, bool) or not isinstance(self.position, int) or self.position < 0:
            raise ValueError(f"its place in the data is {self.position!r}")
        if not isinstance(self.finished, bool):
            raise ValueError(f"it has finished its data: {self.finished!r}")


class Data:
    """Where a run is in its data.

    What a loader, its sampler and its transforms draw from the global generators comes from a stream apart: the same
    batches come again when an epoch is gone over again, whatever the steps in between drew.

    Attributes:
        length: batches of an epoch, where the data says so.
        position: batches drawn in this epoch.
    """

    def __init__(self, data: Iterable[Any], *, watched: bool, share: Share) -> None:
        """The stream begins as the global generators are now. ``watched``: the run can be gone on with."""
        self._data, self._watched, self._share = data, watched, share
        self.stream = Stream()
        self.length = _length(data)
        self.position = 0
        self._digest, self._finished = "", False
        self._iterator: Iterator[Any] = iter(())
        self._sources: list[Source] = []
        self._start: dict[str, Any] | None = None
        self._checked = False

    @property
    def under_way(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return self._start is not None

    def begin(self, epoch: int) -> None:
        """Begins an epoch."""
        for part in (self._data, *(getattr(self._data, name, None) for name in ("sampler", "batch_sampler"))):
            if callable(told := getattr(part, "set_epoch", None)):
                told(epoch)
        self._sources = sources_of(self._data) if self._watched else []
        self._start = self._now() if self._watched else {}
        self.position, self._digest, self._finished = 0, "", False
        with self.stream.flowing():
            self._iterator = iter(self._data)

    def check_processes(self, batch: object) -> None:
        """Raises :class:`ValueError` where the first batch of a run, or ``END``, does not go with the others' first."""
        ranks = self._share.ranks
        if ranks.alone or self._checked:
            return
        self._checked = True
        said = ranks.gather((self.length, batch is END, _signature(batch) if self._share.split else ""))
        if len({length for length, _, _ in said}) > 1:
            numbers = ", ".join(str(length) for length, _, _ in said)
            raise ValueError(f"the processes must be given equally many batches, got {numbers}: see DistributedSampler")
        ended = sum(end for _, end, _ in said)
        if 0 < ended < len(said):
            raise ValueError(f"the data of {ended} of {len(said)} processes has no batch, and that of the others has")
        if len({signature for _, _, signature in said}) > 1:
            raise ValueError(
                "the processes were given different batches, of which each was to take its rows: give all of them the "
                'same data in the same order (seed what you build it with), or say shard="none" where each has its own'
            )

    def check_same(self) -> None:
        """Raises :class:`ValueError` where processes that share each batch were not given the same in an epoch."""
        ranks = self._share.ranks
        if self._share.split and len(set(ranks.gather(self._digest))) > 1:
            raise ValueError(
                "the processes were given different batches in this epoch, of which each has taken its rows: give all "
                "of them the same data in the same order (random numbers that NumPy or Python draw in workers are not "
                'seeded alike by themselves), or say shard="none" where each has its own'
            )

    def draw(self) -> Any:
        """The next batch, or ``END``; the data is asked no more after that, as it may draw random numbers to say so."""
        if self._finished:
            return END
        with self.stream.flowing():
            batch = next(self._iterator, END)
        self._finished = batch is END
        if batch is not END:
            self.position += 1
            if self._watched or self._share.split:
                self._digest = hashlib.sha256(f"{self._digest}{_signature(batch)}".encode()).hexdigest()[:32]
        return batch

    def end(self) -> None:
        """Ends an epoch."""
        self._iterator, self._start, self._finished = iter(()), None, False

    def state(self) -> Place:
        """Where it is, for :meth:`restore`."""
        if not self.under_way:
            self._sources = sources_of(self._data) if self._watched else []
        return Place(self._now(), self._start, self.position, self._digest, self._finished)

    def restore(self, path: Path, place: Place, epoch: int, *, same: bool) -> None:
        """Goes back to where it was; within an epoch, the batches that are behind it are drawn again.

        Raises:
            CheckpointError: these are not the batches of before (``same=True``), or there are fewer; or this is no
                place.
        """
        self._sources = sources_of(self._data)
        if place.start is None:
            self._set(path, place.now)
            return
        self._set(path, place.start)
        self.begin(epoch)
        while self.position < place.position and self.draw() is not END:
            pass
        more = place.finished and self.position == place.position and self.draw() is not END
        if same and (more or (self.position, self._digest) != (place.position, place.digest)):
            what = "more" if more else "others" if self.position == place.position else f"{self.position} alone"
            raise CheckpointError(
                f"the checkpoint {str(path)!r} was made after {place.position} batches of epoch {epoch}, and the data "
                f'gives {what} now: give the same data in the same order, or say data_order="any" to go on with what '
                "comes"
            )
        self._finished = place.finished
        self._set(path, place.now)

    def _now(self) -> dict[str, Any]:
        return {"stream": self.stream.state, "own": [source_state(source) for source in self._sources]}

    def _set(self, path: Path, now: dict[str, Any]) -> None:
        with taken_apart(path):
            own, stream = list(now["own"]), dict(now["stream"])
            if len(own) != len(self._sources):
                raise CheckpointError(
                    f"the checkpoint {str(path)!r} was made with data that holds {len(own)} random generators, and "
                    f"this data holds {len(self._sources)}: give the same data"
                )
            require_random_state(stream)
            self.stream.state = stream
            for source, state in zip(self._sources, own, strict=True):
                set_source_state(source, state)


def described(data: object) -> dict[str, int | None]:
    """What data says of itself: what sets it apart from other data, in a checkpoint."""
    size = getattr(data, "batch_size", None)
    return {
        "batches": _length(data),
        "batch_size": size if isinstance(size, int) else None,
        "examples": _length(getattr(data, "dataset", None)),
    }


def _signature(batch: object) -> str:
    """Shapes, labels and a sample of the inputs of a batch; of what is no batch, its type."""
    if not is_pair(batch):
        return type(batch).__name__
    return ", ".join(f"{part.dtype} {tuple(part.shape)} {_hash(part)}" for part in batch)


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()


def _length(data: object) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]  # asked, not assumed
    except TypeError:
        return None
