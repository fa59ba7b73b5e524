"""One fine-tuning run under way: its data, its steps, its epochs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeAlias

from torch import nn
from tqdm.auto import tqdm

from bnsurgery._data import unpack
from bnsurgery._records import EpochRecord, StepCallback, StepRecord, Tally, Undone, require_numbers
from bnsurgery._source import END, Data
from bnsurgery._step import At, Step
from bnsurgery.errors import BNSurgeryWarning

Schedule: TypeAlias = Callable[[float], float]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda _progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    # Epochs 60, 90 and 120 of 150, as in the code that Walter et al. build on.
    "step": lambda progress: 0.1 ** sum(progress >= milestone for milestone in (0.4, 0.6, 0.8)),
}
"""By name: progress from 0 to 1 to a factor on the learning rate."""


class Tuning:
    """The loop.

    Attributes:
        step: steps behind it.
        epoch: the one under way, from 0.
        stopped: a callback has ended the run.
        tally: of the epoch under way.
    """

    def __init__(
        self,
        step: Step,
        data: Data,
        *,
        schedule: Schedule,
        epochs: int,
        max_steps: int | None,
        eps_warmup: int,
        consistent_bn_after: int | None,
        on_step: StepCallback | None,
        progress: bool,
    ) -> None:
        self._step, self._data, self._schedule = step, data, schedule
        self._epochs, self._max_steps, self._on_step = epochs, max_steps, on_step
        self._eps_warmup, self._consistent_bn_after = eps_warmup, consistent_bn_after
        self.step = self.epoch = 0
        self.stopped = False
        self.tally = Tally()
        self._on_step_in_any = step.share.ranks.any(on_step is not None)
        self._warned: set[str] = set()
        total = None if data.length is None else epochs * data.length
        self._total = max_steps if total is None else min(total, max_steps or total)
        self._bar = tqdm(total=self._total, desc="fine-tuning", unit="step", disable=not progress)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Closes the progress bar and puts the learning rates back on leaving the block."""
        try:
            with self._step.ready():
                yield
        finally:
            self._bar.close()

    @property
    def root(self) -> nn.Module:
        """The model, without wrappers."""
        return self._step.root

    def state(self) -> dict[str, Any]:
        """Where the run is, but for its data, as plain values."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "stopped": self.stopped,
            "tally": asdict(self.tally),
        }

    def restore(self, state: dict[str, Any], epochs: int) -> None:
        """Goes on from there; so many epochs have ended.

        Raises:
            ValueError: this is no place in the run.
        """
        epoch, step, tally = state["epoch"], state["step"], Tally(**state["tally"])
        require_numbers(asdict(tally) | {"step": step})
        if epoch != epochs or not isinstance(step, int) or step < 0 or not isinstance(state["stopped"], bool):
            raise ValueError(f"step {step!r} of epoch {epoch!r}, after {epochs} epochs")
        self.epoch, self.step, self.tally, self.stopped = epoch, step, tally, state["stopped"]
        self._bar.update(self.step)

    def copies(self) -> dict[str, Any]:
        """What this process knows of the copies that it attacks, as plain values."""
        make = self._step.make
        return {} if make is None else make.copies()

    def restore_copies(self, copies: dict[str, Any]) -> None:
        """Goes on knowing it.

        Raises:
            ValueError: it is something else.
        """
        if self._step.make is not None:
            self._step.make.restore_copies(copies)

    def run_epoch(self, after: Callable[[bool], None], asked: Callable[[], dict[str, bool]]) -> EpochRecord:
        """An epoch, or what is left of it, or less where ``max_steps`` or a callback ends it.

        Args:
            after: called after each step with whether the epoch ends with it, and once after the last batch.
            asked: what this process asks of all, called in each step.
        """
        if not self._data.under_way:
            self._data.begin(self.epoch)
            self.tally = Tally()
        began = time.perf_counter() - self.tally.seconds
        make = self._step.make
        if make is not None:
            make.strength = min(1.0, (self.epoch + 1) / (self._eps_warmup + 1))
        more = True
        while more and not (self.stopped or self.done):
            batch = self._data.draw()
            more = batch is not END
            self._data.check_processes(batch)
            if more:
                self._count(self._take(batch, asked))
            else:
                self._step.ended()
            last = not more or self.stopped or self.done
            if last:
                self._data.check_same()
            self.tally.seconds = time.perf_counter() - began
            after(last)
        self._check_length(ended=not more)
        self._data.end()
        self.tally.seconds = time.perf_counter() - began
        return self.tally.record(self.epoch, self._step.lr)

    def require_same(self) -> None:
        """Raises :class:`BNSurgeryError` where what trains, or statistics, differ from process to process."""
        self._step.require_same()

    @property
    def done(self) -> bool:
        """Whether ``max_steps`` are behind us."""
        return self._max_steps is not None and self.step >= self._max_steps

    def _take(self, batch: object, asked: Callable[[], dict[str, bool]]) -> StepRecord | Undone:
        x, y = unpack(batch)
        if not len(x):
            raise ValueError(f"data yielded a batch without examples in epoch {self.epoch}")
        done = self.step / self._total if self._total else self.epoch / self._epochs
        after = self._consistent_bn_after
        at = At(
            self.epoch,
            self.step,
            factor=self._schedule(min(done, 1.0)),
            consistent=after is not None and self.epoch >= after,
        )
        outcome = self._step.take(x, y, at, asked)
        self.step += 1
        self.tally.add(outcome)
        return outcome

    def _count(self, outcome: StepRecord | Undone) -> None:
        """Shows a step, and tells the callback."""
        self._bar.update()
        stop = False
        if isinstance(outcome, StepRecord):
            loss, error = f"{outcome.loss:.3f}", f"{outcome.error:.1f}%"
            self._bar.set_postfix(epoch=self.epoch + 1, loss=loss, error=error)
            stop = self._on_step is not None and bool(self._on_step(outcome, self.root))
        else:
            what = "the step is skipped" if outcome.kind == "skipped" else "that batch is left out"
            self._warn(outcome.kind, f"step {self.step - 1}: {outcome.reason}; {what}")
        if self._on_step_in_any:  # also where a step is undone in this process alone
            self.stopped = self._step.share.ranks.any(stop)

    def _check_length(self, *, ended: bool) -> None:
        """Raises :class:`ValueError` where the data gave no batch, or fewer than it said; warns where it gave more."""
        given, said = self._data.position, self._data.length
        if not given:
            raise ValueError(
                f"data yielded no batch in epoch {self.epoch}: it must be an iterable that can be gone over each epoch"
            )
        if said is not None and ended and given < said:
            raise ValueError(
                f"data said that it has {said} batches, and yielded {given} in epoch {self.epoch}: the schedule goes "
                "by its length; correct that, or give data without one"
            )
        if said is not None and given > said:
            self._warn("longer", f"data said that it has {said} batches, and yielded {given} in epoch {self.epoch}")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{message} (said once)", BNSurgeryWarning, stacklevel=5)
