"""Keep freed memory for the next step, instead of handing it back to the system page by page."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_BY_HAND = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_"}
_MOST = 2**31 - 1
_GROWN = 32 * 2**20
"""Where the C library's own thresholds stop growing: the state in which a process that frees large tensors ends."""

_lock = threading.Lock()
_depth = 0


@contextmanager
def keeping_memory(device: torch.device, *, wanted: bool = True) -> Iterator[None]:
    """For the block, memory that torch frees on the CPU stays with the process; afterwards it goes back.

    With glibc alone, whose default is to return the top of the heap at once, so that each large activation costs its
    page faults anew. Values do not change. Afterwards the library's thresholds are those that they would have grown to.
    """
    libc = _glibc() if wanted and device.type == "cpu" else None
    if libc is None:
        yield
        return
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


def _enter(libc: Any) -> None:
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            libc.mallopt(_MMAP_THRESHOLD, _GROWN)
            libc.mallopt(_TRIM_THRESHOLD, _MOST)


def _leave(libc: Any) -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            libc.mallopt(_TRIM_THRESHOLD, 2 * _GROWN)
            libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library, where it is glibc, and the user has not set its thresholds by hand; None elsewhere."""
    if _BY_HAND & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
