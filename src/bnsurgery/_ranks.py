"""The processes of ``torch.distributed`` that work on one run, of which this is one; alone, none but this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError, LostProcessError

T = TypeVar("T")
_SIGNS = ("gloo", "NCCL", "onnection", "imed out", "imeout", "roken pipe", "ocket", "eer")
"""Parts of what backends say, some as plain RuntimeErrors, where another process cannot be reached."""


def distributed() -> bool:
    """Whether this is one of several processes of ``torch.distributed``."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Ranks:
    """What the processes tell one another. Each call is one that all of them make, in the same order.

    Attributes:
        world: how many there are.
        rank: which this is, from 0.
    """

    def __init__(self) -> None:
        together = distributed()
        self.world = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and shows progress."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """One for this process's own random numbers."""
        return (seed + 7919 * (self.rank + 1)) % 2**63

    def add_up(self, values: Tensor) -> None:
        """Replaces values by their sum over all processes, in place."""
        if not self.alone:
            with talking():
                dist.all_reduce(values)

    def largest(self, value: float) -> float:
        """The largest of what the processes say."""
        return max(self.gather(value))

    def any(self, value: bool) -> bool:
        """Whether any process says so."""
        return any(self.gather(value))

    def gather(self, value: T) -> list[T]:
        """What each process says, in order, on all of them."""
        if self.alone:
            return [value]
        gathered = [value] * self.world
        with talking():
            dist.all_gather_object(gathered, value)
        return gathered

    def of_first(self, value: T) -> T:
        """What the first process says, on all of them."""
        if self.alone:
            return value
        said = [value]
        with talking():
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def first_does(self, task: Callable[[], None]) -> None:
        """The first process does something; what it raises there is raised on all of them.

        Raises:
            OSError, BNSurgeryError: from the task.
        """
        failed: Exception | None = None
        if self.first:
            try:
                task()
            except (OSError, BNSurgeryError) as error:
                failed = error
        failed = self.of_first(failed)
        if failed is not None:
            raise failed

    def as_first(self, tensors: list[Tensor]) -> None:
        """Makes tensors on all processes what they are on the first, in place."""
        if self.alone:
            return
        with talking(), torch.no_grad():
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, src=0)
                if not self.first:
                    tensor.copy_(whole)


def waits_for_others(model: nn.Module) -> bool:
    """Whether a pass of a model waits for the other processes."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


@contextmanager
def talking() -> Iterator[None]:
    """Says, where processes cannot reach one another any more, what that means."""
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, getattr(dist, "DistError", ())) or any(sign in str(error) for sign in _SIGNS)
        if isinstance(error, torch.OutOfMemoryError) or not known:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LostProcessError(
            f"another process of this run is gone, or has not answered in time ({reason}): look for the error of the "
            "first that ended; with checkpoint=, starting all of them again goes on from the last checkpoint, and "
            "torchrun --max-restarts does so by itself"
        ) from error
