"""Several processes, on one machine or on many, that work on one run: ``torchrun`` and ``torch.distributed``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from bnsurgery._ranks import talking
from bnsurgery.errors import BNSurgeryError

__all__ = ["Processes", "processes"]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        world: how many there are; 1: this one alone.
        rank: which this is, from 0.
        device: where this one computes.
    """

    world: int
    rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0


@contextmanager
def processes(*, timeout: float = 600.0, device: torch.device | str | None = None) -> Iterator[Processes]:
    """Joins the processes that ``torchrun`` has started into one group, for the block; alone, does nothing.

    Within it, :func:`~bnsurgery.adv_finetune`, :func:`~bnsurgery.evaluate` and :func:`~bnsurgery.recalibrate_bn` work
    on one run together. A group that is there already is used, and stays.

    Args:
        timeout: seconds that a process waits for the others before it takes one of them for lost; above 0. A process
            that ends is noticed at once. Longer than the longest thing that one does while others wait, such as a
            callback on the first process alone.
        device: where to compute; by default the GPU whose number is that of the process on its machine, where there is
            one, else the CPU. Processes on GPUs talk by NCCL, on CPUs by gloo.

    Yields:
        How many there are, which this is, and its device.

    Raises:
        ValueError: ``timeout`` is not above 0.
        BNSurgeryError: the environment says how many processes there are, but not all that is needed to find them; or
            there are more processes on this machine than it has GPUs.
        LostProcessError: at the end of the block, another process is gone or has not come so far in time.

    Example:
        >>> with processes() as own:
        ...     print(own.world, own.rank, own.first)
        1 0 True
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0, got {timeout}")
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_world_size(), dist.get_rank(), _device(device))
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(1, 0, _device(device))
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise BNSurgeryError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} not set: start the script with "
            "torchrun"
        )
    own = _device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    wait = timedelta(seconds=timeout)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=wait)))  # type: ignore[attr-defined]
    # torchrun may start its processes again with the store of before, in which the addresses of the lost ones are.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    try:
        yield Processes(dist.get_world_size(), dist.get_rank(), own)
        with talking():
            dist.barrier()  # who leaves first may take along what the others still need
    finally:
        dist.destroy_process_group()


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if 0 < count <= local:
        raise BNSurgeryError(
            f"this is process {local} of its machine, from 0, which has {count} GPUs: start no more than one for each, "
            'or say device="cpu" in all of them'
        )
    return torch.device("cuda", local) if count else torch.device("cpu")
