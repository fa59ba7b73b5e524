"""Several BN layers in one place, and which of them each example of a batch goes through."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import PARAMETERS, STATISTICS, label

Share = Literal["none", "parameters", "statistics"]
SHARES: tuple[Share, ...] = ("none", "parameters", "statistics")


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
        self._stacks: dict[int, list[Routing]] = {}  # of all threads that have chosen something

    @property
    def chosen(self) -> Routing | None:
        """What this thread has chosen by :meth:`choosing`, if anything."""
        own = getattr(self._own, "stack", None)
        return own[-1] if own else None

    def selected(self) -> Routing:
        """Where passes of this thread go."""
        own = getattr(self._own, "stack", None)
        if own:
            return own[-1]  # type: ignore[no-any-return]
        if self._stacks and not torch.compiler.is_compiling() and _of_the_system():
            return self._on_behalf()
        return self.default

    @contextmanager
    def choosing(self, routing: Routing) -> Iterator[None]:
        """Sends the passes of this thread there, for the block."""
        if not hasattr(self._own, "stack"):
            self._own.stack = []
        stack: list[Routing] = self._own.stack
        stack.append(routing)
        self._stacks[threading.get_ident()] = stack
        try:
            yield
        finally:
            stack.pop()
            if not stack:
                self._stacks.pop(threading.get_ident(), None)

    def _on_behalf(self) -> Routing:
        """For a thread that works for another one, which it cannot name: what is in force there."""
        chosen = [stack[-1] for stack in list(self._stacks.values()) if stack]
        if len({_key(routing) for routing in chosen}) > 1:
            raise BNSurgeryError(
                "threads use several branches at once, and a part of the model is run again in a backward pass on an "
                "accelerator, which does not know for which of them: leave activation checkpointing out, or use one "
                "thread"
            )
        return chosen[0] if chosen else self.default

    def __getstate__(self) -> dict[str, Any]:
        return {"branches": self.branches, "default": self.selected()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _of_the_system() -> bool:
    """Whether Python has not started this thread, as autograd's on accelerators: it works for one that Python has."""
    return isinstance(threading.current_thread(), threading._DummyThread)


class SplitBatchNorm(nn.Module):
    """BN layers in one place, under the names of their branches; see :func:`bnsurgery.split_bn`.

    Attributes:
        router: says which of them runs; the same in all split layers of a model.
        share: what all of them hold together.
        place: the qualified name of the layer that was split, for messages.
    """

    def __init__(self, branches: dict[str, nn.Module], router: Router, *, share: Share, place: str) -> None:
        super().__init__()
        self.router, self.share, self.place = router, share, place
        for name, layer in branches.items():
            self.add_module(name, layer)
        self.training = next(iter(branches.values())).training
        self.register_load_state_dict_post_hook(_tie)  # type: ignore[no-untyped-call]
        self.tie()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        """BN of x (N, C, ...), each example through its branch."""
        routing = self.router.selected()
        if isinstance(routing, str):
            outputs: Tensor = self.branch(routing)(input)
            return outputs
        if len(input) != routing.count:
            raise ValueError(
                f"{label(self.place, self)} was given a batch of {len(input)}, and use_branch one of {routing.count} "
                "entries: give it one entry for each example, or the name of a branch"
            )
        if routing.order is not None:
            input = _picked(input, routing.order)  # noqa: A001
        parts = torch.split(input, [size for _, size in routing.runs])
        made = [self.branch(name)(part) for (name, _), part in zip(routing.runs, parts, strict=True)]
        joined = torch.cat(made) if len(made) != 1 else made[0]
        return joined if routing.back is None else _picked(joined, routing.back)

    def branch(self, name: str) -> nn.Module:
        """The BN layer of this name."""
        layer = self._modules[name]
        assert layer is not None
        return layer

    def tie(self) -> None:
        """Lets all branches hold what they share: the tensors of the first."""
        first, *others = (self.branch(name) for name in self.router.branches)
        for other in others:
            if self.share == "statistics":
                for name in STATISTICS:
                    if name in other._buffers:
                        other._buffers[name] = first._buffers[name]
            elif self.share == "parameters":
                for name in PARAMETERS:
                    if name in other._parameters:
                        other._parameters[name] = first._parameters[name]
                if "parametrizations" in other._modules:
                    other._modules["parametrizations"] = first._modules["parametrizations"]

    def extra_repr(self) -> str:
        return f"share={self.share!r}"

    def _apply(self, fn: Any, recurse: bool = True) -> SplitBatchNorm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # it makes a buffer anew for each who holds it
        self.tie()
        return self

    def _replicate_for_data_parallel(self) -> SplitBatchNorm:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.router = Router(self.router.branches, self.router.selected())  # it runs in a thread of its own
        return replica  # type: ignore[no-any-return]


def _picked(x: Tensor, rows: Tensor) -> Tensor:
    """Examples of x (N, C, ...) in another order, in the same memory format."""
    rows, moved = rows.to(x.device), x.movedim(1, -1)
    if moved.is_contiguous() and not x.is_contiguous():
        return moved.index_select(0, rows).movedim(-1, 1)
    return x.index_select(0, rows)


def _tie(layer: SplitBatchNorm, _incompatible: object) -> None:
    layer.tie()  # load_state_dict(assign=True) gives each branch tensors of its own


def routers(model: nn.Module) -> list[Router]:
    """What decides about the branches of a model: usually one, or none where nothing is split."""
    found = (module.router for module in model.modules() if isinstance(module, SplitBatchNorm))
    return list({id(router): router for router in found}.values())


@contextmanager
def routed(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Sends the passes of this thread through a model there, for the block."""
    with ExitStack() as stack:
        for router in routers(model):
            stack.enter_context(router.choosing(routing))
        yield


def route_of(model: nn.Module) -> tuple[Any, ...]:
    """Equal only where the passes of this thread take the same way through the split layers of a model."""
    return tuple(_key(router.selected()) for router in routers(model))


def by_example(model: nn.Module) -> bool:
    """Whether examples of a batch take different branches now."""
    return any(isinstance(router.selected(), Rows) for router in routers(model))


def _key(routing: Routing) -> Any:
    return routing if isinstance(routing, str) else routing.key
