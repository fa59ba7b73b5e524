"""Signals that ask a process to end, held back until what is under way has been saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """SIGINT and SIGTERM for the length of a block: the first that comes in :meth:`held` waits, all others do not.

    Who had the signals before has them again afterwards. Outside the main thread, where Python lets nobody handle
    signals, and where it is not ``wanted``, nothing is held.
    """

    def __init__(self, *, wanted: bool = True, before: Callable[[], None] | None = None) -> None:
        """``before`` is called before a signal is passed on, outside of :meth:`held`."""
        self._save = before
        self._wanted = wanted and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._holding = False
        self.noted: int | None = None

    def __enter__(self) -> Signals:
        if self._wanted:
            for number in NUMBERS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # None: not Python's, and cannot be put back
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        noted, self.noted = self.noted, None
        if noted is not None:
            signal.raise_signal(noted)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """A signal that comes in the block, itself inside of :meth:`held`, does what it always did, at once."""
        self._holding = False
        try:
            yield
        finally:
            self._holding = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes in the block is noted; a second one does what it always did, at once."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def deliver(self) -> None:
        """Does what the noted signal does where nobody holds it; returns where a handler of the caller's own does."""
        noted, self.noted = self.noted, None
        if noted is not None:
            self._pass_on(noted, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Processes that were forked in the block have this handler too, and nothing to save.
        if self._holding and self.noted is None and os.getpid() == self._process:
            self.noted = number
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._save is not None and not self._holding and os.getpid() == self._process:
            with self.held():  # another one does not come in between
                self._save()
        before: Callable[[int, FrameType | None], Any] | signal.Handlers = self._before[number]
        if not isinstance(before, signal.Handlers):
            before(number, frame)
            return
        signal.signal(number, before)
        signal.raise_signal(number)
