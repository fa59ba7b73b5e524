"""Hypothesis strategies: ways to split samples, freezes and orders to undo them, damage to a file."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy


@st.composite
def splits(draw: DrawFn, total: int, least: int = 1) -> list[int]:
    """Sizes of consecutive batches, each at least ``least``, that add up to ``total``."""
    sizes: list[int] = []
    while (left := total - sum(sizes)) > 0:
        most = left if left < 2 * least else left - least
        sizes.append(draw(st.sampled_from([*range(least, most + 1), left])) if left >= 2 * least else left)
    assert sum(sizes) == total
    return sizes


def bounds_of(sizes: list[int]) -> list[tuple[int, int]]:
    """First and last-but-one index of each batch."""
    return list(pairwise(accumulate(sizes, initial=0)))


def freeze_options() -> SearchStrategy[dict[str, Any]]:
    """Keyword arguments of ``freeze_except_bn`` for the network ``small``."""
    return st.fixed_dictionaries(
        {
            "weight": st.booleans(),
            "bias": st.booleans(),
            "stats": st.sampled_from(["update", "frozen", "batch"]),
            "also": st.sampled_from([(), ("0",), ("10.bias",), ("0", "3", "10.*")]),
        }
    )


@st.composite
def nested_freezes(draw: DrawFn, most: int = 4) -> tuple[list[dict[str, Any]], list[int]]:
    """Some freezes of one model, and the order in which they are removed."""
    options = draw(st.lists(freeze_options(), min_size=1, max_size=most))
    return options, draw(st.permutations(range(len(options))))


@st.composite
def damaged(draw: DrawFn, data: bytes) -> bytes:
    """A file cut short, or with some of its bytes replaced, mostly in its first part (where formats keep a header)."""
    if draw(st.booleans()):
        return data[: draw(st.integers(0, len(data) - 1))]
    changed = bytearray(data)
    places = st.integers(0, min(len(data), 1200) - 1) | st.integers(0, len(data) - 1)
    for place in draw(st.lists(places, min_size=1, max_size=4)):
        changed[place] = draw(st.integers(0, 255))
    return bytes(changed)
