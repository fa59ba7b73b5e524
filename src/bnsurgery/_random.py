"""The random state of a process, put away and back; a stream apart for what draws from the global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

Source: TypeAlias = "torch.Generator | np.random.Generator | np.random.RandomState | random.Random"
"""What draws random numbers by itself."""

DEPTH = 8
"""So far into the attributes of data :func:`sources_of` looks."""
MOST = 20_000
"""So many objects it looks at."""


def global_random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The state of torch's, NumPy's and Python's global generators, as plain values, arrays and tensors.

    With a CUDA ``device`` that of its generator too.
    """
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_global_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Puts :func:`global_random_state` back."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def require_random_state(state: dict[str, Any]) -> None:
    """Raises where this is no state of the global generators, which are as before afterwards."""
    before = global_random_state()
    try:
        set_global_random_state(state)
    finally:
        set_global_random_state(before)


def seed_global(seed: int) -> None:
    """Seeds torch's (CPU and CUDA), NumPy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Stream:
    """Random numbers for what draws from the global generators of the CPU, apart from those of the rest."""

    def __init__(self) -> None:
        """Begins as the global generators are now."""
        self.state = global_random_state()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """The global generators go on where this stream was left, for the block; then they are as before it."""
        outside = global_random_state()
        set_global_random_state(self.state)
        try:
            yield
        finally:
            self.state = global_random_state()
            set_global_random_state(outside)


def sources_of(data: object) -> list[Source]:
    """The generators that data holds, itself or in its samplers, data sets and transforms, each once, in a fixed order.

    Found by following attributes, lists, tuples and dicts; what sits behind a function's closure is not.
    """
    found: list[Source] = []
    seen: set[int] = set()
    alive: list[object] = []  # an id is one object's for as long as that lives
    waiting: list[tuple[object, int]] = [(data, 0)]
    while waiting and len(seen) < MOST:
        value, depth = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        alive.append(value)
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found.append(value)
        elif depth < DEPTH:
            waiting += [(part, depth + 1) for part in _parts(value)]
    return found


def source_state(source: Source) -> Any:
    """Where a generator is, as plain values, arrays and tensors."""
    if isinstance(source, torch.Generator):
        return source.get_state()
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.get_state(legacy=False) if isinstance(source, np.random.RandomState) else source.getstate()


def set_source_state(source: Source, state: Any) -> None:
    """Puts :func:`source_state` back."""
    if isinstance(source, torch.Generator):
        source.set_state(state)
    elif isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    elif isinstance(source, np.random.RandomState):
        source.set_state(state)
    else:
        source.setstate(state)


def _parts(value: object) -> list[object]:
    """What a value holds that may hold generators."""
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= MOST else []
    if isinstance(value, (list, tuple)):
        return [part for part in value if not _is_plain(part)] if len(value) <= MOST else []
    if _is_plain(value) or isinstance(value, (type, ModuleType)):
        return []
    held = getattr(value, "__dict__", None)
    parts = [part for part in held.values() if not _is_plain(part)] if isinstance(held, dict) else []
    bound = getattr(value, "__self__", None)
    if bound is not None and not isinstance(bound, ModuleType):
        parts.append(bound)
    return parts


def _is_plain(value: object) -> bool:
    """Whether a value holds nothing else."""
    return isinstance(value, (str, bytes, int, float, complex, torch.Tensor, nn.Parameter, np.ndarray, np.generic))
