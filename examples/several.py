"""Several processes that do one thing together, started by torchrun: the first reads the clock, prints and writes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from bnsurgery import processes

TIMEOUT = 1800.0
"""Seconds that a process waits for the others: the first draws figures while they do."""
T = TypeVar("T")


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the one that prints and writes; alone, it is."""
    return world() == 1 or dist.get_rank() == 0


def command(script: str, options: Sequence[str]) -> str:
    """What starts a script as it has been started."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = ["--nnodes", str(world() // here)] if world() > here else []
    start = ["torchrun", *nodes, "--nproc-per-node", str(here)] if world() > 1 else ["python"]
    return shlex.join([*start, script, *options])


def alone(script: str) -> None:
    """Ends a script that torchrun has started in several processes, and that has work for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(f"{script} works in one process: start it with python, without torchrun")


def of_first(find: Callable[[], T]) -> T:
    """What the first process finds or raises, on all of them, once all have come this far."""
    if world() == 1:
        return find()
    dist.barrier()  # none still reads what the first is about to change
    said: list[tuple[T | None, Exception | None]] = [(None, None)]
    if first():
        try:
            said[0] = find(), None
        except Exception as error:  # raised below, on all processes
            said[0] = None, error
    dist.broadcast_object_list(said, src=0)
    found, error = said[0]
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun has started, for the block; yields this one's device.

    All but the first are silent on standard output.
    """
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device == torch.device("cuda") else device
    with ExitStack() as stack:
        joined_ = stack.enter_context(processes(timeout=TIMEOUT, device=own))
        if not joined_.first:
            null = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(null))
        yield joined_.device
