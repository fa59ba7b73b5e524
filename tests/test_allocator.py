"""Keeping memory: what the C library is told, once however calls nest, and taken back whatever happens."""

from __future__ import annotations

import platform

import pytest
import torch

from bnsurgery import _allocator
from bnsurgery._allocator import keeping_memory

CPU = torch.device("cpu")


class Library:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.told.append((option, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.told.append(("trim", pad))
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(_allocator, "_glibc", lambda: library)
    return library


def test_is_told_once_and_taken_back_by_the_outermost(library: Library) -> None:
    with keeping_memory(CPU):
        told = list(library.told)
        with keeping_memory(CPU):
            pass
        assert library.told == told
    assert told == [(-3, 2**25), (-1, 2**31 - 1)]
    assert library.told[len(told) :] == [(-1, 2**26), ("trim", 0)]


def test_is_taken_back_after_an_exception(library: Library) -> None:
    with pytest.raises(KeyboardInterrupt), keeping_memory(CPU):
        raise KeyboardInterrupt
    assert library.told[-1] == ("trim", 0)
    with keeping_memory(CPU):
        assert library.told[-1] == (-1, 2**31 - 1)


def test_nothing_is_told_where_it_is_not_wanted_or_on_another_device(library: Library) -> None:
    with keeping_memory(CPU, wanted=False), keeping_memory(torch.device("meta")):
        pass
    assert library.told == []


@pytest.mark.parametrize("libc", [("musl", "1.2"), ("", "")])
def test_other_c_libraries_are_left_alone(libc: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    assert _allocator._glibc() is None
    with keeping_memory(CPU):
        pass


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1")]
)
def test_thresholds_set_by_hand_are_left_alone(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert _allocator._glibc() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_real_library_takes_it() -> None:
    libc = _allocator._glibc()
    assert libc.mallopt(-3, _allocator._GROWN) == 1
    assert libc.mallopt(-1, 2 * _allocator._GROWN) == 1
