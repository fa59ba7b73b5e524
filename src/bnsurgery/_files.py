"""Write a file whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: Path, *, keep: Path | None = None) -> Iterator[Path]:
    """Yields another path in the same folder; what the block writes there becomes ``target`` when it ends well.

    The bytes are on the disk before the rename; after an exception the partial file is gone and ``target`` is as it
    was. What was ``target`` before becomes ``keep``, where one is given; there is always a whole ``target``.
    """
    partial = _partial(target)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and target.exists():
            _also(target, keep)
        partial.replace(target)
        _write_through(target.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def clear_partials(target: Path) -> None:
    """Removes what processes that are gone have left of their attempts to write ``target``."""
    for partial in target.parent.glob(f".{_escaped(target.name)}.*.partial"):
        owner = partial.name.split(".")[-2]
        if owner.isdigit() and not _is_alive(int(owner)):
            with suppress(OSError):
                partial.unlink()


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


def _also(target: Path, name: Path) -> None:
    """Gives a file a second name, in place of the file that had it."""
    second = _partial(name)
    with suppress(OSError):
        second.unlink()
    try:
        try:
            os.link(target, second)
        except OSError:  # a file system without hard links
            shutil.copyfile(target, second)
        second.replace(name)
    except BaseException:
        with suppress(OSError):
            second.unlink()
        raise


def _write_through(folder: Path) -> None:
    """Sees that a rename is on the disk, where the system can say so of a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _escaped(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere, asking is not harmless
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
