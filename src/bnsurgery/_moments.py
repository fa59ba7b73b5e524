"""Counts, means and sums of squared deviations per channel, merged exactly however the elements were grouped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnsurgery._ranks import Ranks
from bnsurgery.layers import widest


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
        wide = widest(x.device)
        if not count:
            zeros = torch.zeros(x.shape[1], dtype=wide, device=x.device)
            return cls(0, zeros, zeros)
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return cls(count, mean.to(wide), variance.to(wide) * count)

    @classmethod
    def of_sample(cls, sample: Sample) -> Moments:
        """From what a layer has computed."""
        wide = widest(sample.mean.device)
        return cls(sample.count, sample.mean.to(wide), sample.variance.to(wide) * (sample.count - 1))

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


@dataclass(frozen=True)
class Sample:
    """What a BN layer computes of its input.

    Attributes:
        count: elements per channel, at least two.
        mean: (C,).
        variance: unbiased (C,).
    """

    count: int
    mean: Tensor
    variance: Tensor


class Joined:
    """Layers that take part in one batch after the other together."""

    def __init__(self, total: dict[str, Moments]) -> None:
        """Of the layers by name, in ``total`` in the end."""
        self._total = total
        self._last: dict[torch.device, tuple[list[str], _EndToEnd]] = {}

    def add(self, samples: dict[str, Sample]) -> None:
        """Merges those of a batch."""
        for device in dict.fromkeys(sample.mean.device for sample in samples.values()):
            own = {name: sample for name, sample in samples.items() if sample.mean.device == device}
            if device not in self._last or self._last[device][0] != list(own):  # another path through the model
                self._write(device)
                self._last[device] = list(own), _EndToEnd([len(sample.mean) for sample in own.values()], device)
            self._last[device][1].add(list(own.values()))

    def end(self) -> None:
        """Merges into the total what has not been."""
        for device in list(self._last):
            self._write(device)

    def _write(self, device: torch.device) -> None:
        if device in self._last:
            names, moments = self._last.pop(device)
            for name, own in zip(names, moments.split(), strict=True):
                merge(self._total, name, own)


def merge(total: dict[Any, Moments], key: Any, moments: Moments) -> None:
    """Merges moments into those under a key."""
    total[key] = total[key].merge(moments) if key in total else moments


def over_ranks(value: dict[Any, Moments], device: torch.device) -> dict[Any, Moments]:
    """The moments of all ranks of ``torch.distributed`` merged, key by key, in the order of the ranks."""
    ranks = Ranks()
    if ranks.alone:
        return value
    gathered = ranks.gather({key: moments.to(torch.device("cpu")) for key, moments in value.items()})
    total: dict[Any, Moments] = {}
    for part in gathered:
        for key, moments in part.items():
            merge(total, key, moments)
    return {key: moments.to(device) for key, moments in total.items()}


def sum_over_ranks(value: int) -> int:
    """The sum of a count over all ranks."""
    return sum(Ranks().gather(value))


class _EndToEnd:
    """The moments of several layers of one device, their channels end to end: few operations where there are many."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._sizes, self._device, self._wide = list(sizes), device, widest(device)
        layers = torch.arange(len(self._sizes)).repeat_interleave(torch.tensor(self._sizes))
        self._layer_of = layers.to(device)
        self._counts = [0] * len(self._sizes)
        self._mean = torch.zeros(len(layers), dtype=self._wide, device=device)
        self._m2 = torch.zeros_like(self._mean)

    def add(self, samples: Sequence[Sample]) -> None:
        """Merges one of each layer."""
        counts = [sample.count for sample in samples]
        totals = [count + more for count, more in zip(self._counts, counts, strict=True)]
        parts = [more / total for more, total in zip(counts, totals, strict=True)]
        # In turn: of what is added, the share, the elements but one, and Chan's factor.
        share, freedom, factor = self._per_channel(
            parts,
            [more - 1 for more in counts],
            [count * part for count, part in zip(self._counts, parts, strict=True)],
        )
        delta = torch.cat([sample.mean for sample in samples]).to(self._wide) - self._mean
        self._mean += delta * share
        variance = torch.cat([sample.variance for sample in samples]).to(self._wide)
        self._m2 += variance * freedom + delta.square() * factor
        self._counts = totals

    def split(self) -> Iterator[Moments]:
        """Those of each layer, in memory of their own: a view would be sent between processes with all the rest."""
        for count, *parts in zip(
            self._counts, *(torch.split(joined, self._sizes) for joined in (self._mean, self._m2)), strict=True
        ):
            yield Moments(count, *(part.clone() for part in parts))

    def _per_channel(self, *values: Sequence[float]) -> Tensor:
        """A row for each list, with the value of a layer for each of its channels."""
        layers = torch.tensor(values, dtype=self._wide)
        if self._device.type == "cuda":  # from pinned memory, the host need not wait for the device
            layers = layers.pin_memory()
        return layers.to(self._device, non_blocking=True)[:, self._layer_of]
