"""One recalibration of BN statistics: the three estimators, from observing the layers to writing the buffers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._data import describe, given
from bnsurgery._modes import Snapshot, preserved
from bnsurgery._moments import Joined, Moments, Sample, merge, over_ranks, sum_over_ranks
from bnsurgery.adapters import craft
from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning
from bnsurgery.layers import device_of, has_statistics, label, require_statistics, statistics

Estimator = Literal["pooled", "exact", "ema"]
Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True)
class Recalibration:
    """What :func:`recalibrate_bn` did.

    Attributes:
        layers: names of the layers whose statistics were written.
        kept: names of the layers that were never reached or hold no statistics, and kept what they had.
        batches: batches that count.
        left_out: batches that a layer saw with one value per channel, which have no variance and were left out.
        elements: how many values per channel each written layer's statistics rest on.
        estimator: which one.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    batches: int
    left_out: int
    elements: dict[str, int] = field(repr=False)
    estimator: Estimator


Seen = Callable[[str, Tensor], None]
"""Called with a layer's name and its input, before the layer runs."""


class _OneValue(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """A layer in training mode was given one value per channel."""


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """An exact pass has come to the layer that it is for."""


class Found(NamedTuple):
    """What is to be written to one layer.

    Attributes:
        mean: (C,).
        variance: unbiased (C,).
        elements: values per channel behind them.
        tracked: the counter, where torch has kept it itself.
    """

    mean: Tensor
    variance: Tensor
    elements: int
    tracked: Tensor | None = None


class Run:
    """One recalibration: its layers, how a batch is run, and what has been counted."""

    def __init__(self, model: nn.Module, layers: dict[str, _BatchNorm], forward: Forward) -> None:
        self.model, self.layers, self._forward = model, layers, forward
        self.device = device_of(model)
        self.batches = self.left_out = 0
        self._before = Snapshot(buffer for layer in layers.values() for buffer in statistics(layer).values())
        self._seen: Seen | None = None
        self._done: Seen | None = None

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Looks at what each layer is given, for the block; attacks in between are not looked at."""

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _layer, inputs, named: None if self._seen is None else self._seen(name, given(inputs, named))

        def after(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
            return lambda _layer, inputs, named, _outputs: (
                None if self._done is None else self._done(name, given(inputs, named))
            )

        with ExitStack() as stack:
            for name, layer in self.layers.items():  # the model's own hooks are called outside of these
                stack.callback(layer.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after(name), with_kwargs=True, prepend=True).remove)
            # Compiled submodules would run past hooks that they were compiled without.
            if hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def craft(self, attack: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Adversarial examples of the model as it was."""
        with preserved(self.model):
            self._before.restore()
            return craft(attack, self.model, x, y, generator=generator)

    def forward(self, batch: Any, seen: Seen, done: Seen | None = None) -> None:
        """One forward pass, in which ``seen`` is told what each layer is given, ``done`` when it has run."""
        self._seen, self._done = seen, done
        try:
            with torch.no_grad():
                self._forward(self.model, batch)
        finally:
            self._seen = self._done = None

    def pooled(self, source: Iterable[Any]) -> dict[str, Found]:
        """One pass in which BN normalises by the batch; the buffers end as they were."""
        total: dict[str, Moments] = {}
        joined = Joined(total)
        recording = {name for name, layer in self.layers.items() if _records(layer)}
        lent: dict[str, dict[str, Tensor]] = {}  # while a layer runs, its own running statistics

        def give_back(name: str) -> tuple[Tensor, Tensor]:
            taken = _moving(self.layers[name])
            self.layers[name]._buffers.update(lent.pop(name))
            return taken

        for name, layer in self.layers.items():
            layer.training = True
            if name in recording:
                # What it writes as running statistics are those of the batch, at no cost: it computes them anyway.
                layer.momentum, layer.track_running_stats = 1.0, True
            elif has_statistics(layer):
                layer.track_running_stats = False
        for batch in source:
            own: dict[str, Moments] = {}
            last: dict[str, Sample] = {}  # of each layer's last call

            def add(name: str, x: Tensor, own: dict[str, Moments] = own, last: dict[str, Sample] = last) -> None:
                _more_than_one(x)
                if name in last:
                    merge(own, name, Moments.of_sample(last.pop(name)))
                layer = self.layers[name]
                if name not in recording or not layer.training or not x.numel():
                    merge(own, name, Moments.of(x))
                    return
                # Others may read its running statistics in this pass: those that it writes to are for its call alone.
                lent[name] = dict(zip(("running_mean", "running_var"), _moving(layer), strict=True))
                layer._buffers.update({key: torch.zeros_like(value) for key, value in lent[name].items()})

            def read(name: str, x: Tensor, last: dict[str, Sample] = last) -> None:
                if name in lent:
                    last[name] = Sample(x.numel() // x.shape[1], *give_back(name))

            try:
                if self._counts(batch, add, read):
                    for name, moments in own.items():
                        merge(total, name, moments)
                    joined.add(last)
            finally:
                for name in list(lent):  # of a layer that failed
                    give_back(name)
        joined.end()
        self.batches = sum_over_ranks(self.batches)
        return _found(self._together(over_ranks(total, self.device)))

    def ema(self, source: Iterable[Any]) -> dict[str, Found]:
        """One pass of torch's own running update; what it wrote is read back."""
        elements: dict[str, int] = {}
        for layer in self.layers.values():
            layer.training = True
            if has_statistics(layer):
                layer.track_running_stats = True
        for batch in source:
            own: dict[str, int] = {}
            before = Snapshot(buffer for layer in self.layers.values() for buffer in statistics(layer).values())

            def add(name: str, x: Tensor, own: dict[str, int] = own) -> None:
                _more_than_one(x)
                own[name] = own.get(name, 0) + x.numel() // x.shape[1]

            if self._counts(batch, add):
                for name, count in own.items():
                    elements[name] = elements.get(name, 0) + count
            else:
                before.restore()
        # The variance that torch keeps is unbiased already.
        held = {name: statistics(self.layers[name]) for name in elements if has_statistics(self.layers[name])}
        return {
            name: Found(
                buffers["running_mean"].clone(),
                buffers["running_var"].clone(),
                elements[name],
                _tracked(buffers),
            )
            for name, buffers in held.items()
        }

    def exact(self, source: Callable[[], Iterable[Any]]) -> dict[str, Found]:
        """Call by call, each pass normalising by the whole-set statistics that the passes before it found."""
        for name, layer in self.layers.items():
            require_statistics(name, layer, "estimator='exact'")
        for group in self._sharing():
            if len(group) > 1:
                names = " and ".join(label(name, self.layers[name]) for name in group[:2])
                raise BNSurgeryError(f"{names} hold the same statistics: use estimator='pooled'")
        known: dict[tuple[str, int], Moments] = {}
        while True:
            found: dict[tuple[str, int], Moments] = {}
            count = 0
            for batch in source():
                calls: dict[str, int] = {}

                def look(name: str, x: Tensor, calls: dict[str, int] = calls) -> None:
                    call = name, calls.get(name, 0)
                    calls[name] = call[1] + 1
                    if call not in known:
                        merge(found, call, Moments.of(x))  # noqa: B023 - called within this pass
                        raise _Reached
                    layer = self.layers[name]
                    cast("Tensor", layer.running_mean).copy_(known[call].mean)
                    # Training normalises by the biased variance; the unbiased one is what it records.
                    cast("Tensor", layer.running_var).copy_(known[call].variance(unbiased=False))

                with suppress(_Reached):
                    self.forward(batch, look)
                count += 1
            self.batches = sum_over_ranks(count)
            found = over_ranks(found, self.device)
            if len(found) > 1:
                names = ", ".join(label(name, self.layers[name]) for name, _ in found)
                raise BNSurgeryError(f"the order of the layers depends on the data ({names}): use estimator='pooled'")
            if not found:
                break
            known.update(found)
        total: dict[str, Moments] = {}
        for (name, _), moments in known.items():
            merge(total, name, moments)
        return _found(total)

    def write(self, found: dict[str, Found], estimator: Estimator) -> Recalibration:
        """Writes the statistics, all or, where one is not finite, none."""
        written = {
            name: value._replace(mean=self._fitted(name, value.mean), variance=self._fitted(name, value.variance))
            for name, value in found.items()
            if has_statistics(self.layers[name])
        }
        for name, (mean, variance, elements, _) in written.items():
            if elements < 2 or not bool((torch.isfinite(mean) & torch.isfinite(variance)).all()):
                raise BNSurgeryError(
                    f"the statistics of {label(name, self.layers[name])} over {elements} values per channel are "
                    "not finite: look for NaN or infinite inputs, or give more data; nothing was written"
                )
        with torch.no_grad():
            for name, (mean, variance, _, tracked) in written.items():
                buffers = statistics(self.layers[name])
                buffers["running_mean"].copy_(mean)
                buffers["running_var"].copy_(variance)
                if "num_batches_tracked" in buffers:
                    buffers["num_batches_tracked"].copy_(torch.as_tensor(self.batches if tracked is None else tracked))
        counts = {name: value.elements for name, value in written.items()}
        for group in self._sharing():  # whose statistics are written with those of another
            reached = [name for name in group if name in written]
            counts.update({name: counts[reached[0]] for name in group if reached and name not in written})
        return Recalibration(
            layers=tuple(name for name in self.layers if name in counts),
            kept=tuple(name for name in self.layers if name not in counts),
            batches=self.batches,
            left_out=self.left_out,
            elements={name: counts[name] for name in self.layers if name in counts},
            estimator=estimator,
        )

    def _sharing(self) -> list[list[str]]:
        """The layers with statistics, those together that hold the same: branches of a split layer may."""
        groups: dict[tuple[int, int], list[str]] = {}
        for name, layer in self.layers.items():
            if has_statistics(layer):
                mean, variance = _moving(layer)
                groups.setdefault((id(mean), id(variance)), []).append(name)
        return list(groups.values())

    def _together(self, total: dict[str, Moments]) -> dict[str, Moments]:
        """The moments of each layer; of layers that hold the same statistics those of all of them."""
        joined = dict(total)
        for group in self._sharing():
            first, *others = [name for name in group if name in total] or [""]
            for other in others:
                merge(joined, first, total[other])
            for other in others:
                joined[other] = joined[first]
        return joined

    def _fitted(self, name: str, value: Tensor) -> Tensor:
        buffer = statistics(self.layers[name])["running_mean"]
        if value.shape != buffer.shape:
            raise BNSurgeryError(
                f"{label(name, self.layers[name])} was given {len(value)} channels, expected {len(buffer)}; "
                "nothing was written"
            )
        return value.to(buffer.dtype)

    def _counts(self, batch: Any, seen: Seen, done: Seen | None = None) -> bool:
        """Runs a batch; False, with one warning a run, where a layer saw one value per channel."""
        try:
            self.forward(batch, seen, done)
        except _OneValue as error:
            if not self.left_out:
                warnings.warn(f"{error}: that batch is left out", BNSurgeryWarning, stacklevel=4)
            self.left_out += 1
            return False
        self.batches += 1
        return True


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch's tensors on a device: a tensor, or tuples, lists and dicts of them."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(part, device) for part in batch)
    if isinstance(batch, dict):
        return {key: to_device(part, device) for key, part in batch.items()}
    return batch


def default_forward(model: nn.Module, batch: Any) -> object:
    inputs = batch[0] if isinstance(batch, tuple) else batch
    if not isinstance(inputs, Tensor):
        raise ValueError(f"data must yield tensors or tuples that begin with one, got {describe(batch)}: say forward=")
    return model(inputs)


def _tracked(buffers: dict[str, Tensor]) -> Tensor | None:
    tracked = buffers.get("num_batches_tracked")
    return None if tracked is None else tracked.clone()


def _more_than_one(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise _OneValue(f"a BN layer was given one value per channel, {tuple(x.shape)}, which has no variance")


def _records(layer: _BatchNorm) -> bool:
    """Whether a layer's running statistics can be had to be those of a batch alone, with all digits."""
    if type(layer).forward is not _BatchNorm.forward or "forward" in vars(layer) or not has_statistics(layer):
        return False
    return all(buffers.dtype in (torch.float32, torch.float64) for buffers in _moving(layer))


def _moving(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    return cast("Tensor", layer.running_mean), cast("Tensor", layer.running_var)


def _found(total: dict[str, Moments]) -> dict[str, Found]:
    return {name: Found(value.mean, value.variance(unbiased=True), value.count) for name, value in total.items()}
