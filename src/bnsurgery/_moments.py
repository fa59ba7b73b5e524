"""Counts, means and sums of squared deviations per channel, merged exactly however the elements were grouped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """The first two moments of the elements of each channel, in float64.

    Attributes:
        count: elements per channel.
        mean: (C,).
        m2: sum of squared deviations from the mean (C,).
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of x (N, C, ...), taken in at least float32."""
        x = x.detach()
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        count = x.numel() // x.shape[1]
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        if not count:
            zeros = torch.zeros(x.shape[1], dtype=wide, device=x.device)
            return cls(0, zeros, zeros)
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return cls(count, mean.to(wide), variance.to(wide) * count)

    @classmethod
    def of_sample(cls, count: int, mean: Tensor, variance: Tensor) -> Moments:
        """From the mean and the unbiased variance (C,) of so many elements, which are copied."""
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        return cls(count, mean.detach().to(wide, copy=True), variance.detach().to(wide) * (count - 1))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of elements together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta.square() * (self.count * other.count / count))

    def variance(self, *, unbiased: bool) -> Tensor:
        """The variance (C,): divided by the count, or by one less where ``unbiased``."""
        return self.m2 / (self.count - 1 if unbiased else self.count)

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        return Moments(self.count, self.mean.to(device), self.m2.to(device))


def over_ranks(value: dict[Any, Moments], device: torch.device) -> dict[Any, Moments]:
    """The moments of all ranks of ``torch.distributed`` merged, key by key, in the order of the ranks."""
    if not distributed():
        return value
    gathered: list[dict[Any, Moments]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, {key: moments.to(torch.device("cpu")) for key, moments in value.items()})
    total: dict[Any, Moments] = {}
    for part in gathered:
        for key, moments in part.items():
            total[key] = total[key].merge(moments) if key in total else moments
    return {key: moments.to(device) for key, moments in total.items()}


def sum_over_ranks(value: int) -> int:
    """The sum of a count over all ranks."""
    if not distributed():
        return value
    gathered: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return sum(gathered)


def distributed() -> bool:
    """Whether this is one of several processes of ``torch.distributed``."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
