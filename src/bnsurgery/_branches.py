"""Several BN layers in one place: what a split model holds where it held one."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._routing import Router, Routing, Rows, key_of
from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import PARAMETERS, STATISTICS, label

Share = Literal["none", "parameters", "statistics"]
SHARES: tuple[Share, ...] = ("none", "parameters", "statistics")


class SplitBatchNorm(nn.Module):
    """BN layers in one place, under the names of their branches; see :func:`bnsurgery.split_bn`.

    Attributes:
        router: says which of them runs; the same in all split layers of a model.
        share: what all of them hold together.
        place: the qualified name of the layer that was split, for messages.
    """

    def __init__(self, router: Router, *, share: Share, place: str) -> None:
        super().__init__()
        self.router, self.share, self.place = router, share, place
        self.register_load_state_dict_post_hook(_tie)  # type: ignore[no-untyped-call]

    def fill(self, branches: dict[str, nn.Module]) -> None:
        """Takes its layers."""
        for name, layer in branches.items():
            self.add_module(name, layer)
        self.training = next(iter(branches.values())).training
        self.tie()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """BN of x (N, C, ...), each example through its branch; a branch for all is called as this is."""
        routing = self.router.passing()
        if isinstance(routing, str):
            return self.branch(routing)(*inputs, **named)
        if len(inputs) + len(named) != 1:
            raise BNSurgeryError(
                f"{label(self.place, self)} was called with {len(inputs) + len(named)} arguments, and takes one where "
                "examples take different branches: choose one for all of them by its name"
            )
        (input,) = (*inputs, *named.values())  # noqa: A001
        if len(input) != routing.count:
            raise ValueError(
                f"{label(self.place, self)} was given a batch of {len(input)}, and use_branch one of {routing.count} "
                "entries: give it one entry for each example, or the name of a branch"
            )
        if routing.order is not None:
            input = _picked(input, routing.order)  # noqa: A001
        parts = torch.split(input, [size for _, size in routing.runs])
        made = [self.branch(name)(part) for (name, _), part in zip(routing.runs, parts, strict=True)]
        if not made:  # of no examples at all
            made = [self.branch(self.router.branches[0])(input)]
        joined = torch.cat(made) if len(made) != 1 else made[0]
        return joined if routing.back is None else _picked(joined, routing.back)

    def branch(self, name: str) -> nn.Module:
        """The BN layer of this name."""
        layer = self._modules[name]
        assert layer is not None
        return layer

    def tie(self) -> None:
        """Lets all branches hold what they share: the tensors of the first that has them."""
        layers = [self.branch(name) for name in self.router.branches]
        layers = [layer for layer in layers if isinstance(layer, _BatchNorm)]  # of a fused copy one may be none
        for name in self.shared:
            for held in ("_parameters", "_buffers", "_modules"):
                having = [getattr(layer, held) for layer in layers if name in getattr(layer, held)]
                for other in having[1:]:
                    other[name] = having[0][name]

    @property
    def shared(self) -> tuple[str, ...]:
        """The names of what the branches hold together."""
        return {"none": (), "parameters": (*PARAMETERS, "parametrizations"), "statistics": STATISTICS}[self.share]

    def extra_repr(self) -> str:
        return f"share={self.share!r}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            first = next(iter(self.__dict__.get("_modules", {}).items()), None)
            if first is None or not hasattr(first[1], name):
                raise
            raise AttributeError(
                f"{label(self.place, self)} has no {name!r} of its own, its branches have: take "
                f"{'.'.join(filter(None, (self.place, first[0], name)))}, or that of another branch"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        kept = _KEPT.get()
        if kept is not None:
            layer: nn.Module = copy.deepcopy(self.branch(kept), memo)
            return layer
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return made

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors: list[str] = list(args).pop()
        values: dict[str, Tensor] = {}
        for key in (key for key in state_dict if key.startswith(prefix)):
            local = key.removeprefix(prefix).partition(".")[2]
            if local.partition(".")[0] not in self.shared:
                continue
            if not torch.equal(values.setdefault(local, state_dict[key]).cpu(), state_dict[key].cpu()):
                errors.append(
                    f"{label(self.place, self)} shares {self.share}, and {key!r} differs from another branch's"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

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


@contextmanager
def keeping(branch: str) -> Iterator[None]:
    """While a model is copied in the block, this branch takes the place of each split layer."""
    token = _KEPT.set(branch)
    try:
        yield
    finally:
        _KEPT.reset(token)


_KEPT: ContextVar[str | None] = ContextVar("kept branch", default=None)


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
    return tuple(key_of(router.selected()) for router in routers(model))


def layout_of(model: nn.Module) -> dict[str, Any]:
    """What the passes of this thread depend on beside the tensors, as plain values; nothing where nothing is split."""
    shares = [module.share for module in model.modules() if isinstance(module, SplitBatchNorm)]
    if not shares:
        return {}
    return {
        "share": {share: shares.count(share) for share in sorted(set(shares))},
        "use_branch": [_described(router.chosen) for router in routers(model)],
    }


def _described(routing: Routing | None) -> str | None:
    """Equal only for those that route alike; of routing by example, in a few words and a hash."""
    if not isinstance(routing, Rows):
        return routing
    return f"{routing}, {hashlib.sha256(repr(routing.key).encode()).hexdigest()[:16]}"


def by_example(model: nn.Module) -> bool:
    """Whether examples of a batch take different branches now."""
    return any(isinstance(router.selected(), Rows) for router in routers(model))
