"""Keep a fine-tuning run on disk while it goes on, and go on with one that was kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery import _checkpoints, _states
from bnsurgery._modes import Snapshot
from bnsurgery._random import global_random_state, seed_global, set_global_random_state
from bnsurgery._records import EpochRecord
from bnsurgery._sharing import Share
from bnsurgery._signals import Signals
from bnsurgery._source import Data, Place
from bnsurgery._tuning import Tuning
from bnsurgery._undo import Undo
from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, CheckpointError


class Keeper:
    """The checkpoint of one run; without a path, nothing is kept. Of several processes, the first writes.

    Attributes:
        history: of the epochs that have ended.
        ended: how the run has ended, or ``"epochs"`` while it goes on.
    """

    def __init__(
        self,
        path: Path | None,
        tuning: Tuning,
        data: Data,
        *,
        every: float,
        configuration: dict[str, Any],
        targets: Callable[[], dict[str, Tensor]],
        optimizer: torch.optim.Optimizer | None,
        device: torch.device,
        generator: torch.Generator,
        share: Share,
        signals: Signals,
        seed: int,
        before_callbacks: bool,
    ) -> None:
        """``targets`` are the tensors that the run changes; ``generator`` is the attack's.

        ``before_callbacks``: to be written too when an epoch has ended but for its callbacks.
        """
        self._tuning, self._data, self._before_callbacks = tuning, data, before_callbacks
        self._path, self._every, self._configuration = path, every, configuration
        self._targets, self._optimizer = targets, optimizer
        self._device, self._generator, self._seed = device, generator, seed
        self._share, self._ranks, self._signals = share, share.ranks, signals
        self._written = time.monotonic()
        self.history: list[EpochRecord] = []
        self.ended = "epochs"

    def begin(self, *, same: bool) -> None:
        """Goes on from the checkpoint, or writes the first one, before any work that could be lost.

        Raises:
            CheckpointError: it is damaged, belongs to another run, or (``same=True``) to another order of the data.
            OSError: it cannot be written.
        """
        path = self._path
        if path is None:
            return
        state = _states.of_first(self._ranks, path, _checkpoints.KIND)
        if state is None:
            state = self._state()
            self._ranks.first_does(lambda: self._write(path, state))
            return
        _checkpoints.require_same(path, state, self._configuration)
        before = Snapshot(self._targets().values())
        undo = None if self._optimizer is None else Undo(self._optimizer)
        if undo is not None:
            undo.note()
        whole = False
        try:
            failed: CheckpointError | None = None
            try:
                self._restore(path, state, same=same)
            except CheckpointError as error:  # of this process's own data, say
                failed = error
            said = [text for text in self._ranks.gather(None if failed is None else str(failed)) if text is not None]
            if said:
                raise failed or CheckpointError(said[0])
            whole = True
        finally:
            if not whole:
                before.restore()
                if undo is not None:
                    undo.restore()
        self._written = time.monotonic()

    def _restore(self, path: Path, state: dict[str, Any], *, same: bool) -> None:
        targets = self._targets()
        self.history, self.ended = _checkpoints.restore(path, state, targets, self._optimizer)
        with _states.taken_apart(path):
            self._tuning.restore(state["tuning"], len(self.history))
            own = self._own(state["processes"], split=bool(state["split"]))
            buffers = self._buffers(targets)
            _checkpoints.require_fit(path, own["buffers"], {name: buffers.get(name) for name in own["buffers"]})
            with torch.no_grad():
                for name, value in own["buffers"].items():
                    targets[name].copy_(value)
            self._generator.set_state(own["attack"])
            found = Place(**own["data"])
        if self.ended == "epochs":
            with _states.taken_apart(path):
                self._tuning.restore_copies(own["copies"])
            self._data.restore(path, found, self._tuning.epoch, same=same)
        with _states.taken_apart(path):
            if own["random"] is not None:
                set_global_random_state(own["random"], self._device)

    def asked(self) -> dict[str, bool]:
        """What this process asks of all of them: to save now, or, since it has been told to, to stop."""
        due = self._ranks.first and time.monotonic() - self._written >= self._every
        return {"save": due and self._path is not None, "stop": self._signals.noted is not None}

    def step_done(self, last: bool) -> None:
        """Writes a checkpoint after a step where it is time, and where a signal asks this process to end.

        ``last``: the epoch ends with it; its callbacks are to come.

        Raises:
            BNSurgeryError: parameters or statistics of several processes have become different.
        """
        asked = self.asked() if self._ranks.alone else dict(self._share.asked)
        if last:  # since the last exchange too: callbacks may take long
            asked["stop"] = self._ranks.any(self._signals.noted is not None)
        if asked["save"] or asked["stop"] or (last and self._before_callbacks):
            self._tuning.require_same()
            if self._path is not None:
                self._try_to_save(self._path)
        if asked["stop"]:
            self._end()

    def epoch_done(self) -> None:
        """Writes a checkpoint after an epoch and its callbacks.

        Raises:
            BNSurgeryError: parameters or statistics of several processes have become different.
        """
        self._tuning.require_same()
        if self._path is None:
            return
        self._try_to_save(self._path)
        if self._ranks.any(self._signals.noted is not None):
            self._end()

    def _end(self) -> None:
        """Lets a signal that has been held back do what it does; of several processes, those of all end.

        Returns where this process is alone and a handler of the caller's own does.
        """
        self._signals.deliver()
        if not self._ranks.alone:
            raise BNSurgeryError(
                "a process of this run has been told to end; starting all of them again goes on from the last "
                "checkpoint"
            )

    def _try_to_save(self, path: Path) -> None:
        """Writes a checkpoint; where that fails, the run goes on, and the one before it stays."""
        state = self._state()
        try:
            if self._ranks.first:
                self._write(path, state)
        except (OSError, BNSurgeryError) as error:
            self._written = time.monotonic()
            _states.warn_unwritten(path, error, "run", when=f" after step {self._tuning.step}", stacklevel=5)

    def _state(self) -> dict[str, Any]:
        """What the first process writes; each contributes its own."""
        targets = self._targets()
        own = {
            "attack": self._generator.get_state(),
            "data": asdict(self._data.state()),
            "random": global_random_state(self._device),
            "copies": self._tuning.copies(),
            "buffers": {} if self._ranks.alone else self._buffers(targets),
        }
        return {
            "configuration": self._configuration,
            "ended": self.ended,
            "history": [asdict(epoch) for epoch in self.history],
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "processes": self._ranks.gather(own),
            "tensors": targets,
            "split": self._share.split,
            "tuning": self._tuning.state(),
            "under_way": self._data.under_way,
        }

    def _buffers(self, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those that are each of several processes' own: that are not exchanged."""
        exchanged = {id(buffer) for buffer in self._share.exchanged()}
        own = {name: tensor for name, tensor in targets.items() if not isinstance(tensor, nn.Parameter)}
        return {name: tensor.detach().cpu() for name, tensor in own.items() if id(tensor) not in exchanged}

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        try:
            _states.save(path, _checkpoints.KIND, state)
        except TypeError as error:
            raise BNSurgeryError(f"the state of the run cannot be kept in a checkpoint: {error}") from error
        self._written = time.monotonic()

    def _own(self, processes: list[dict[str, Any]], *, split: bool) -> dict[str, Any]:
        """What the checkpoint holds for this process."""
        rank, world = self._ranks.rank, self._ranks.world
        if not processes:
            raise ValueError("it holds no process")
        if len(processes) == world:
            if split != self._share.split:
                was, now = ("rows of each batch" if each else "batches of its own" for each in (split, not split))
                raise CheckpointError(
                    f"the checkpoint {str(self._path)!r} is of a run in which each process was given {was}, and now it "
                    f"is {now} (shard=)"
                )
            return processes[rank]
        rows = (split or len(processes) == 1) and (self._share.split or self._ranks.alone)
        if not rows or self._share.sync == "none":
            raise CheckpointError(
                f"the checkpoint {str(self._path)!r} is of {len(processes)} processes, and these are {world}: another "
                'number can go on only where each takes its rows of every batch (shard="split") and the statistics are '
                "the same in all"
            )
        if self._ranks.first:
            warnings.warn(
                f"the checkpoint {str(self._path)!r} is of {len(processes)} processes, and these are {world}: the run "
                "goes on, and may not end with the same bits",
                BNSurgeryWarning,
                stacklevel=6,
            )
        if rank >= len(processes):
            seed_global(self._ranks.seed(self._seed))
            return {**processes[0], "random": None}
        return processes[rank]
