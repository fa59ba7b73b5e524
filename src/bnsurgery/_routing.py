"""Which branch of split layers each pass, and each example of a batch, goes through."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bnsurgery.errors import BNSurgeryError


class Rows:
    """Which branch each example of a batch takes.

    Attributes:
        runs: branches with how many examples each takes, one after the other.
        order: the examples (N,) in the order of the runs; None: as they come.
        back: where among these each example is (N,); None likewise.
        count: how many examples.
    """

    def __init__(
        self, runs: Sequence[tuple[str, int]], order: Tensor | None = None, back: Tensor | None = None
    ) -> None:
        self.runs, self.order, self.back = tuple(run for run in runs if run[1]), order, back
        self.count = sum(size for _, size in runs)

    @classmethod
    def of(cls, index: Tensor, branches: Sequence[str]) -> Rows:
        """By the number of the branch that each example takes (N,)."""
        numbers, sizes = torch.unique_consecutive(index, return_counts=True)
        if len(numbers) == len(numbers.unique()):  # nothing need be sorted, as where a batch is in two parts
            return cls(
                [(branches[number], size) for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True)]
            )
        order = torch.argsort(index, stable=True)
        counts = torch.bincount(index, minlength=len(branches)).tolist()
        return cls(list(zip(branches, counts, strict=True)), order, torch.argsort(order))

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for those alone that route alike."""
        return self.runs, None if self.order is None else tuple(self.order.tolist())

    def __repr__(self) -> str:
        return f"Rows({', '.join(f'{size} to {branch!r}' for branch, size in self.runs)})"


_MANY = 64
"""Threads that are kept in mind before those that are gone are forgotten."""

Routing: TypeAlias = str | Rows


class Router:
    """Which branch passes take, in each thread; one for all split layers of a model.

    Copies and pickles are for good as the original is at that moment.

    Attributes:
        branches: their names, in order.
        default: where passes go that nothing else is said for.
    """

    def __init__(self, branches: Sequence[str], default: Routing) -> None:
        self.branches, self.default = tuple(branches), default
        self._own = threading.local()
        self._last: dict[int, Routing] = {}  # by thread, where its last pass went

    @property
    def chosen(self) -> Routing | None:
        """What this thread has chosen by :meth:`choosing`, if anything."""
        own = getattr(self._own, "stack", None)
        return own[-1][0] if own else None

    def selected(self) -> Routing:
        """Where passes of this thread go."""
        own = getattr(self._own, "stack", None)
        if own:
            return own[-1][0]  # type: ignore[no-any-return]
        if self._last and not torch.compiler.is_compiling() and _of_the_system():
            return self._on_behalf()
        return self.default

    def passing(self) -> Routing:
        """As :meth:`selected`, for a pass that is being made; threads that work for this one follow it."""
        routing = self.selected()
        if not torch.compiler.is_compiling() and not _of_the_system():
            if len(self._last) >= _MANY:
                self._forget()
            self._last[threading.get_ident()] = routing
        return routing

    @contextmanager
    def choosing(self, routing: Routing) -> Iterator[None]:
        """Sends the passes of this thread there, for the block."""
        if not hasattr(self._own, "stack"):
            self._own.stack = []
        stack: list[tuple[Routing]] = self._own.stack
        entry = (routing,)
        stack.append(entry)
        try:
            yield
        finally:  # blocks of generators may end in another order than they began
            stack[:] = [held for held in stack if held is not entry]

    def _on_behalf(self) -> Routing:
        """For a thread that works for another one, which it cannot name: where the last passes went."""
        self._forget()
        routings = {key_of(routing): routing for routing in self._last.values()}
        if len(routings) > 1:
            raise BNSurgeryError(
                "threads use several branches at once, and a part of the model is run again in a backward pass on an "
                "accelerator, which does not know for which of them: leave activation checkpointing out, or use one "
                "thread"
            )
        return next(iter(routings.values()), self.default)

    def _forget(self) -> None:
        """Leaves out threads that are gone."""
        alive = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        self._last = {thread: routing for thread, routing in list(self._last.items()) if thread in alive}

    def __getstate__(self) -> dict[str, Any]:
        return {"branches": self.branches, "default": self.selected()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _of_the_system() -> bool:
    """Whether Python has not started this thread, as autograd's on accelerators: it works for one that Python has."""
    return isinstance(threading.current_thread(), threading._DummyThread)


def key_of(routing: Routing) -> Any:
    """Equal for those alone that route alike."""
    return routing if isinstance(routing, str) else routing.key
