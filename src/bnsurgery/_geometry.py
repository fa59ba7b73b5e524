"""What sets the norms apart: where an attack starts, which way a step goes, and what the ball around an input is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


class Geometry(Protocol):
    """The three pieces in which norms differ; deltas are (N, ...) in pixel units."""

    def start(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """A random perturbation within eps."""
        ...  # pragma: no cover - a protocol

    def step(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent, of norm 1."""
        ...  # pragma: no cover - a protocol

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """The nearest perturbation within eps."""
        ...  # pragma: no cover - a protocol


class _Linf:
    def start(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        return _random(torch.rand, like, generator).mul_(2 * eps).sub_(eps)

    def step(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def project(self, delta: Tensor, eps: float) -> Tensor:
        return delta.clamp(-eps, eps)


class _L2:
    def start(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        direction = self.step(_random(torch.randn, like, generator))
        radius = torch.rand(len(like), generator=generator, device=generator.device, dtype=like.dtype)
        return direction.mul_(eps * column(radius.to(like.device), like))

    def step(self, gradient: Tensor) -> Tensor:
        # Largest entry first: the squares of small gradients underflow, and a constant would shorten the step.
        gradient = gradient.nan_to_num(0, 0, 0)
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / column(gradient.flatten(1).abs().amax(1), gradient).clamp_min(tiny)
        return scaled / column(_length(scaled), scaled).clamp_min(tiny)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        return delta * column((eps / _length(delta).clamp_min(1e-20)).clamp(max=1), delta)


GEOMETRIES: dict[Norm, Geometry] = {"linf": _Linf(), "l2": _L2()}


def check_norm(norm: str) -> None:
    """Raises :class:`ValueError` for a norm that this library does not know."""
    if norm not in GEOMETRIES:
        raise ValueError(f"norm must be one of {', '.join(map(repr, GEOMETRIES))}, got {norm!r}")


def distance(x: Tensor, other: Tensor, norm: Norm) -> Tensor:
    """The norm of each example's difference: (N, ...) and (N, ...) to (N,)."""
    delta = (other - x).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else _length(delta)


def _random(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    numbers = draw(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return numbers.to(like.device)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) in a shape that goes with examples (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _length(delta: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return length
