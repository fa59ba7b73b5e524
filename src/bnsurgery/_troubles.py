"""What keeps a training step from being made, in this process or in another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._data import given


class OneValue(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """A BN layer in training mode was given one value per channel."""


class NotFinite(Exception):  # noqa: N818 - not an error to the caller, unless it is asked to be
    """A number is NaN or infinite; the message says which."""


def kind_of(trouble: OneValue | NotFinite | None) -> str | None:
    """As counts and records have it."""
    return None if trouble is None else "left out" if isinstance(trouble, OneValue) else "skipped"


def of_all(own: OneValue | NotFinite | None, troubles: dict[str, int]) -> OneValue | NotFinite | None:
    """What is in the way of all processes, the same in all: of two kinds a number that is not finite."""
    if troubles["skipped"]:
        return own if isinstance(own, NotFinite) else NotFinite("a number in another process")
    if troubles["left out"]:
        return own or OneValue("a BN layer of another process was given one value per channel")
    return None


@contextmanager
def one_value_ends(root: nn.Module) -> Iterator[None]:
    """Watches for BN layers that would have to take the variance of one value.

    Raises:
        OneValue: inside it, at the first such layer.
    """

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = given(inputs, named)
        if layer.training and x.numel() == x.shape[1]:
            raise OneValue(f"a BN layer was given one value per channel, {tuple(x.shape)}")

    with ExitStack() as stack:
        for module in root.modules():
            if isinstance(module, _BatchNorm):
                stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        yield
