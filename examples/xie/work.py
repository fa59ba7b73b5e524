"""What is done for each row: a network with one BN or with two is trained and measured, through each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery import PGD, evaluate, split_bn, use_branch
from bnsurgery.analysis import outputs
from examples.cifar10 import Batches
from examples.common.data import Images
from examples.common.lab import Lab, Test
from examples.common.records import held, require_finite
from examples.resnet import ResNet
from examples.xie.rows import CHOICES, EPS, ROWS, Row


@dataclass
class Xie(Lab):
    """The rows of the paper."""

    program = "xie"
    rows = ROWS
    choices = CHOICES

    def architecture(self, row: Row) -> nn.Module:
        model: nn.Module = ResNet(self.depth(row), self.folder.width)
        return split_bn(model, row.branches) if row.branches else model

    def initial(self, row: Row) -> nn.Module:
        torch.manual_seed(self.folder.seed)
        return self.architecture(row).to(self.device).to(memory_format=torch.channels_last)

    def batches(self, row: Row, images: Images) -> Iterable[tuple[Tensor, Tensor]]:
        size = self.scale.batch_size
        own = Batches(*images.train, batch_size=size, augment=True, drop_last=True, device=self.device)
        return own if row.images == "adversarial" else Doubled(own)

    def options(self, row: Row) -> dict[str, Any]:
        return {
            "train": "all",
            "attack": PGD(EPS, row.steps, 2.5 * EPS / row.steps),
            "clean_fraction": 0.0 if row.images == "adversarial" else 0.5,
            "consistent_bn_after": None if row.consistent is None else self.consistent_after(row),
            "lr": row.lr * self.scale.rate,
            "weight_decay": row.weight_decay,
            "schedule": parts,
        }

    def depth(self, row: Row) -> int:
        """How deep a network is at this scale."""
        return min(row.depth, self.scale.deepest or row.depth)

    def consistent_after(self, row: Row) -> int:
        """After how many epochs BN is consistent: the same part of fewer."""
        assert row.consistent is not None
        return row.consistent * self.scale.epochs(row.epochs) // row.epochs

    def begins_as(self, row: Row) -> tuple[str, int] | None:
        """Until BN is consistent, what is trained is the row without."""
        epochs = 0 if row.consistent is None else self.consistent_after(row)
        return (row.needs[0], epochs) if epochs else None

    def measures(self, row: Row, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for prefix, through in ways(row, model):
            with through():
                clean = outputs(model, (x, y))
                require_finite(row.name, clean.logits)
                under = evaluate(model, (x, y), attacks=["pgd-10"], eps=EPS, progress=False)
            found |= {f"{prefix}clean": clean.error, f"{prefix}pgd": under.robust_error}
        return found | ({"clean": found["clean: clean"]} if row.branches else {})

    def tests(self, row: Row, model: nn.Module, x: Tensor, y: Tensor) -> Mapping[str, Test]:
        tests: dict[str, Test] = {}
        for prefix, through in ways(row, model):

            def clean(through: Any = through) -> dict[str, Any]:
                with through():
                    found = outputs(model, (x, y))
                require_finite(row.name, found.logits)
                return held(found.logits.argmax(1) == y)

            def under(attack: str, count: int, through: Any = through) -> dict[str, Any]:
                with through():
                    found = evaluate(model, (x[:count], y[:count]), attacks=[attack], eps=EPS, progress=False)
                return held(found.robust)

            tests[f"{prefix}clean"] = clean
            tests[f"{prefix}pgd-20"] = lambda under=under: under("pgd-20", len(y))  # type: ignore[misc]
            tests[f"{prefix}autoattack"] = lambda under=under: under("autoattack", self.scale.attacked)  # type: ignore[misc]
        return tests

    def settings(self, row: Row) -> dict[str, Any]:
        after = None if row.consistent is None else self.consistent_after(row)
        return super().settings(replace(row, consistent=after, depth=self.depth(row)))


class Doubled:
    """Each batch twice: its images and labels once to stay clean, and once more to be attacked."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.batches:
            yield torch.cat([x, x]), torch.cat([y, y])


def ways(row: Row, model: nn.Module) -> Iterator[tuple[str, Callable[[], AbstractContextManager[object]]]]:
    """Through one BN, or through each branch: the beginning of what a measure is called, and how to choose it."""
    if not row.branches:
        yield "", nullcontext
    for branch in row.branches:
        yield f"{branch}: ", lambda branch=branch: use_branch(model, branch)  # type: ignore[misc]


def parts(progress: float) -> float:
    """Factor 0.1 after 35, 70 and 95 of 110 epochs."""
    return 0.1 ** sum(progress >= milestone for milestone in (35 / 110, 70 / 110, 95 / 110))
