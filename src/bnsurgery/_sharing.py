"""What several processes share of a training step: rows of a batch, statistics of BN layers, one sum of gradients."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from bnsurgery import _states
from bnsurgery._ranks import Ranks, waits_for_others
from bnsurgery._synchronized import synchronized
from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import has_statistics, statistics

Sync = Literal["buffers", "batch", "none"]
SYNC: tuple[Sync, ...] = ("buffers", "batch", "none")
Shard = Literal["auto", "split", "none"]
SHARD: tuple[Shard, ...] = ("auto", "split", "none")
SCALE = 2.0**20
"""Numbers of examples are divided by this where values are multiplied by them, lest large values overflow."""


def splits(shard: Shard, model: nn.Module, data: object, ranks: Ranks) -> bool:
    """Whether each process takes its rows of every batch, rather than the batches that it is given."""
    if ranks.alone or shard == "none":
        return False
    samplers = [getattr(data, name, None) for name in ("sampler", "batch_sampler")]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    own = any(isinstance(sampler, DistributedSampler) for sampler in samplers)
    return shard == "split" or not (own or _wrapped(model))


def without_ddp(model: nn.Module) -> nn.Module:
    """What a DistributedDataParallel runs: gradients are summed here, once a step, and not once more by it."""
    inside, found = model, model
    while True:
        if isinstance(inside, DistributedDataParallel):
            found = inside = inside.module
        elif hasattr(inside, "_orig_mod") and isinstance(inside._orig_mod, nn.Module):
            inside = inside._orig_mod
        else:
            return found


def _wrapped(model: nn.Module) -> bool:
    return without_ddp(model) is not model


@dataclass(frozen=True)
class Rows:
    """Those of a batch that are this process's.

    Attributes:
        x: inputs (n, ...).
        y: labels (n,).
        clean: so many of them, from the front, stay clean.
        first: in the whole batch's adversarial part, the row that is this part's first.
        every: and so many rows on, the next.
        whole: rows of the whole batch's adversarial part.
        alone: each process has all rows, and works on them by itself.
    """

    x: Tensor
    y: Tensor
    clean: int
    first: int
    every: int
    whole: int
    alone: bool


@dataclass(frozen=True)
class Sum:
    """Of one step, over all processes.

    Attributes:
        loss: mean over the examples.
        wrong: share of them misclassified.
        examples: all of them.
        troubles: how many processes had which trouble.
    """

    loss: float
    wrong: float
    examples: int
    troubles: dict[str, int]


class Share:
    """This process's part in the steps of a run.

    Attributes:
        split: each batch is the whole one, on all processes, and each takes its rows.
        asked: what a process may ask of all, once the step is made: by name, whether any has.
    """

    TROUBLES = ("left out", "skipped")
    ASKED = ("save", "stop")

    def __init__(self, ranks: Ranks, root: nn.Module, *, split: bool, sync: Sync) -> None:
        self.ranks, self._root, self.split, self.sync = ranks, root, split, sync
        self.asked = dict.fromkeys(self.ASKED, False)
        self._passes_together = not ranks.alone and (sync == "batch" or waits_for_others(root))
        self._before: list[Tensor] = []

    def note(self) -> None:
        """A step begins: remembers the statistics as they are now, the same in all processes."""
        if not (self.ranks.alone or self.sync == "none"):
            self._before = [buffer.detach().clone() for buffer in _moving(self._root)]

    def rows(self, x: Tensor, y: Tensor, clean: int, *, parted: bool) -> Rows:
        """This process's rows of a batch whose first ``clean`` examples stay clean.

        Each process has at least two rows (of each part, where these go through branches), or all have all.
        """
        world, rank = self.ranks.world, self.ranks.rank
        parts = (clean, len(x) - clean) if parted else (len(x),)
        if not self.split or any(0 < part < 2 * world for part in parts):
            return Rows(x, y, clean, 0, 1, len(x) - clean, alone=self.split)
        own = slice(rank, None, world)
        return Rows(
            x=x[own],
            y=y[own],
            clean=len(range(rank, clean, world)),
            first=(rank - clean) % world,
            every=world,
            whole=len(x) - clean,
            alone=False,
        )

    def normalising(self, rows: Rows) -> AbstractContextManager[Any]:
        """While a batch and its gradients pass, BN layers in training normalise by that of all (``sync="batch"``)."""
        together = self.sync == "batch" and not self.ranks.alone and not rows.alone
        return synchronized(self._root, self.ranks.world) if together else nullcontext()

    def agree(self, rows: Rows, trouble: bool, device: torch.device, *, parted: bool) -> tuple[float | None, bool]:
        """Before a pass in which processes wait for one another: whether all of them are to make it.

        Returns:
            What this process's mean loss is multiplied by before its backward pass (None: nothing, as each passes by
            itself), and whether any process has a trouble: then none is to pass.

        Raises:
            ValueError: the data of another process has ended; or (``parted``: clean and adversarial rows go through
                branches) only some processes have rows for a branch.
        """
        if not self._passes_together:
            return None, False
        parts = [parted and rows.clean > 0, parted and rows.clean < len(rows.x)]
        told = torch.tensor([len(rows.x), trouble, False, *parts], dtype=torch.float64, device=device)
        self.ranks.add_up(told)
        count, troubles, ended, *through = told.tolist()
        self._require_batches(ended)
        if any(0 < having < self.ranks.world for having in through):
            raise ValueError(
                f"of {self.ranks.world} processes {round(through[0])} have clean examples in a batch, and "
                f'{round(through[1])} have adversarial ones: where BN normalises together (sync="batch"), each needs '
                "rows for the same branches; give larger batches"
            )
        return None if rows.alone else len(rows.x) / count, troubles > 0

    def ended(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        """The first exchange of a step for which this process has no batch: its data has ended.

        Raises:
            ValueError: that of another process has not.
        """
        self.asked = dict.fromkeys(self.ASKED, False)
        if self.ranks.alone:
            return
        if self._passes_together:
            told = torch.tensor([0, False, True, False, False], dtype=torch.float64, device=device)
        else:
            targets = list(parameters)
            moving = self.exchanged()
            size = 3 + len(self.TROUBLES) + len(self.ASKED) + len(targets)
            size += sum(tensor.numel() for tensor in (*targets, *moving))
            told = torch.zeros(1 + size, dtype=_wide(targets, moving), device=device)
            told[0] = 1.0
        self.ranks.add_up(told)
        self._require_batches(float(told[2 if self._passes_together else 0]))

    def _require_batches(self, ended: float) -> None:
        if 0 < ended < self.ranks.world:
            raise ValueError(
                f"the data of {round(ended)} of {self.ranks.world} processes has ended before that of the others: give "
                "all of them equally many batches (see DistributedSampler)"
            )

    def require_same(self, parameters: Iterable[nn.Parameter]) -> None:
        """Parameters and statistics are to be the same in all processes, to the bit, after any number of steps.

        Statistics not with ``sync="none"``.

        Raises:
            BNSurgeryError: they are not.
        """
        if self.ranks.alone:
            return
        tensors = [*parameters, *self.exchanged()]
        own = _states.fingerprint((str(number), tensor) for number, tensor in enumerate(tensors))
        if len(set(self.ranks.gather(own))) > 1:
            raise BNSurgeryError(
                "the parameters or statistics of the processes have become different, though each is to make the same "
                "updates: look for what one of them does alone (an optimizer that draws random numbers or gives NaN, a "
                "callback that changes parameters, statistics or the optimizer's options); a checkpoint on disk is of "
                "before that"
            )

    def exchanged(self) -> list[Tensor]:
        """The statistics that become those of all in each step."""
        return [] if self.sync == "none" else _moving(self._root)

    def add_up(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        rows: Rows,
        weighted: bool,
        loss: float,
        wrong: float,
        trouble: str | None,
        asked: dict[str, bool],
        device: torch.device,
    ) -> Sum:
        """The one exchange of a step: gradients and statistics become those of all processes.

        By how much statistics have moved is averaged over the processes, by their examples (those that have not moved
        keep their bits); not so with ``sync="none"``. ``weighted``: the gradients are those of a loss multiplied by
        what :meth:`agree` gave. ``loss`` and ``wrong`` are means over this process's
        rows, ``trouble`` is what keeps it from making the step, and ``asked`` what it asks of all.

        Raises:
            ValueError: the data of another process has ended.
        """
        count = len(rows.x) / (self.ranks.world if rows.alone else 1)
        by = 1.0 if weighted else count / SCALE  # gradients of a mean that has its weight already add up as they are
        gradients = [] if trouble else [p for p in parameters if p.grad is not None]
        # A parameter that no loss reaches has no gradient, on this process; others may have one.
        targets = list(parameters)
        moving = self.exchanged()
        wide = _wide(targets, moving)
        have = {id(p) for p in gradients}
        said = [0.0, count, loss * count, wrong * count]
        said += [float(trouble == name) for name in self.TROUBLES] + [float(asked[name]) for name in self.ASKED]
        said += [float(id(p) in have) for p in targets]
        flat = torch.cat(
            [
                torch.tensor(said, dtype=wide, device=device),
                *(
                    p.grad.to(device, wide).flatten() * by
                    if id(p) in have and p.grad is not None
                    else torch.zeros(p.numel(), dtype=wide, device=device)
                    for p in targets
                ),
                *(
                    _moved(buffer, before).to(device, wide).flatten() * (count / SCALE)
                    for buffer, before in zip(moving, self._before, strict=True)
                ),
            ]
        )
        self.ranks.add_up(flat)
        sizes = [len(said), *(p.numel() for p in targets), *(buffer.numel() for buffer in moving)]
        head, *parts = torch.split(flat, sizes)
        numbers = head.tolist()
        self._require_batches(numbers[0])
        total, scaled = numbers[1], numbers[1] / SCALE
        begin = 4 + len(self.TROUBLES)
        troubles = dict(zip(self.TROUBLES, map(int, numbers[4:begin]), strict=True))
        self.asked = {name: value > 0 for name, value in zip(self.ASKED, numbers[begin:], strict=False)}
        if not any(troubles.values()):
            reached = numbers[begin + len(self.ASKED) :]
            for parameter, gradient, any_has in zip(targets, parts, reached, strict=False):
                if any_has:
                    mean = gradient if weighted else gradient / scaled
                    parameter.grad = mean.view_as(parameter).to(parameter.device, parameter.dtype)
            with torch.no_grad():
                for buffer, before, by_how_much in zip(moving, self._before, parts[len(targets) :], strict=True):
                    buffer.copy_(before + (by_how_much / scaled).view_as(buffer).to(before.device))
        return Sum(numbers[2] / total, numbers[3] / total, round(total), troubles)


def _moving(root: nn.Module) -> list[Tensor]:
    """The running means and variances of a model, of BN and InstanceNorm layers, each once."""
    layers = [layer for layer in root.modules() if isinstance(layer, _BatchNorm) and has_statistics(layer)]
    buffers = [statistics(layer)[name] for layer in layers for name in ("running_mean", "running_var")]
    others = [layer for layer in root.modules() if isinstance(layer, _InstanceNorm)]
    buffers += [own for layer in others for own in (layer.running_mean, layer.running_var) if own is not None]
    return list({id(buffer): buffer for buffer in buffers}.values())


def _moved(buffer: Tensor, before: Tensor) -> Tensor:
    """By how much values have moved; infinity, which may be there on purpose, by nothing where it is still there."""
    return torch.where(buffer == before, torch.zeros_like(before), buffer - before)


def _wide(parameters: list[nn.Parameter], moving: list[Tensor]) -> torch.dtype:
    """What the exchange is in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in (*parameters, *moving)) else torch.float32


__all__ = ["SHARD", "SYNC", "Rows", "Shard", "Share", "Sum", "Sync", "splits", "without_ddp"]
