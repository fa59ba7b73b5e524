"""What is done for each row: networks trained and measured, sets of images made, adversarial examples passed on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery import PGD, Engine, evaluate, replace_bn
from bnsurgery.analysis import (
    TransferMatrix,
    input_gradient_similarity,
    outputs,
    transfer_matrix,
)
from examples.benz import sets
from examples.benz.rows import CHOICES, L2, LINF, ROWS, AnyRow, Row, SetRow, TransferRow
from examples.cifar10 import Batches
from examples.common.data import Images
from examples.common.files import Pending, kept, origin, write_json
from examples.common.lab import Lab, Test
from examples.common.work import float32
from examples.common.records import held, require_finite
from examples.resnet import ResNet


@dataclass
class Benz(Lab):
    """The rows of the paper."""

    program = "benz"
    rows = ROWS
    choices = CHOICES
    networks = ("resnet20", "resnet18")

    def architecture(self, row: Row) -> nn.Module:
        large = self.folder.network == "resnet18"
        model: nn.Module = ResNet(18, self.folder.width, stages=4) if large else ResNet(20, self.folder.width)
        for module in model.modules():
            # He's initialisation, of which activations grow from block to block, needs a normalization.
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()
        if row.norm != "batch":
            # As the 32 groups of 64 channels and more that the paper has.
            model, _ = replace_bn(model, row.norm, groups=max(1, self.folder.width // 2))
        return model

    def initial(self, row: Row) -> nn.Module:
        torch.manual_seed(self.folder.seed)
        layout = torch.channels_last if self._channels_last(row) else torch.contiguous_format
        return self.architecture(row).to(self.device).to(memory_format=layout)

    def batches(self, row: Row, images: Images) -> Iterable[tuple[Tensor, Tensor]]:
        x, y = images.train if row.data is None else self.images_of(row.data)
        return Batches(x, y, batch_size=self.scale.batch_size, augment=True, drop_last=True, device=self.device)

    def options(self, row: Row) -> dict[str, Any]:
        attack = PGD(row.eps, steps=7, step_size=row.eps / 5, norm="l2") if row.eps else None
        return {
            "train": "all",
            "attack": attack,
            "lr": row.lr * self.scale.rate,
            "weight_decay": row.weight_decay,
            "schedule": thirds,
            "engine": Engine(channels_last=self._channels_last(row)),
        }

    def _channels_last(self, row: Row) -> bool:
        """On a CPU two norms are slow where channels are innermost and half of the operations in bfloat16."""
        return not (self.device.type == "cpu" and row.norm in ("group", "instance"))

    def measures(self, row: Row, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        clean = outputs(model, (x, y))
        require_finite(row.name, clean.logits)
        found = {"clean": clean.error, "next": next_label(clean.logits, y), "l2": 100.0, "linf": 100.0}
        for name, attack in attacks().items():
            found[name] = robust(model, x, y, attack).robust_error
        return found | {"ligs": input_gradient_similarity(model, (x, y)).record()}

    def tests(self, row: Row, model: nn.Module, x: Tensor, y: Tensor) -> Mapping[str, Test]:
        def clean() -> dict[str, Any]:
            found = outputs(model, (x, y))
            require_finite(row.name, found.logits)
            return held(found.logits.argmax(1) == y) | {"next": next_label(found.logits, y)}

        tests: dict[str, Test] = {"clean": clean}
        for name, attack in attacks().items():
            tests[name] = lambda attack=attack: held(robust(model, x, y, attack).robust)  # type: ignore[misc]
        return tests | {"ligs": lambda: input_gradient_similarity(model, (x, y)).record()}

    def settings(self, row: AnyRow) -> dict[str, Any]:
        if isinstance(row, Row):
            return super().settings(row)
        plain = {name: _listed(value) for name, value in asdict(row).items() if name not in ("name", "epochs")}
        images = min(row.images, self.scale.training if isinstance(row, SetRow) else self.scale.measured)
        steps = {"steps": min(row.steps, 5) if self.scale.most_epochs else row.steps} if isinstance(row, SetRow) else {}
        network = {"network": self.folder.network} if self.folder.network else {}
        return plain | steps | network | {"images": images, "width": self.folder.width}

    def training(self, key: str) -> dict[str, Any] | None:
        row = self.rows[key]
        if isinstance(row, Row):
            return super().training(key)
        path = self.folder.record(key, "set" if isinstance(row, SetRow) else "matrix")
        record = kept(path, sets.look_at_set if isinstance(row, SetRow) else look_at_matrix, self.settings(row))
        if record is not None:
            self.require_needs(path, record, key)
        return record

    def make(self, key: str) -> bool:
        row = self.rows[key]
        if isinstance(row, Row):
            return super().make(key)
        if self.training(key) is not None:
            return True
        if not self.fits(None):
            return False
        with self.folder.locked(key), float32():
            if self.training(key) is not None:
                return True
            needs = self.hashes(key)
            for need in (need for need, sha256 in needs.items() if sha256 is None):
                raise Pending(f"{need} is not finished yet in {self.folder.path}, and {key} needs it")
            return sets.make(self, key, row, needs) if isinstance(row, SetRow) else self._pass_on(key, row, needs)

    @classmethod
    def networks_of(cls) -> dict[str, Any]:
        return {key: row for key, row in cls.rows.items() if isinstance(row, Row)}

    def test(self, key: str) -> bool:
        return super().test(key) if isinstance(self.rows[key], Row) else True

    def images_of(self, key: str) -> tuple[Tensor, Tensor]:
        """The images, uint8 (N, 3, 32, 32), and labels (N,) of a set.

        Raises:
            Problem: it is not made yet, or its images are missing or damaged.
        """
        return sets.images_of(self, key)

    def matrix(self, key: str = "transfer") -> TransferMatrix:
        """What was found of adversarial examples that are passed on."""
        record = self.training(key)
        if record is None:
            raise Pending(f"{key} is not made yet in {self.folder.path}")
        return TransferMatrix.read(record["matrix"])

    def _pass_on(self, key: str, row: TransferRow, needs: dict[str, str | None]) -> bool:
        self.worked = True
        began = time.perf_counter()
        networks = {}
        for name, epoch in row.networks:
            of = self.rows[name]
            at = min(epoch, self.scale.epochs(of.epochs)) if epoch else None
            networks[title_of(name, epoch)] = self.network(name, at)
        x, y = self.images.tests(self.settings(row)["images"])
        attack = PGD(row.eps, steps=10, step_size=row.eps / 4)
        found = transfer_matrix(networks, (x, y), attack=attack, seed=self.folder.seed)
        made = origin(self.program, self.folder.seed, self.device)
        write_json(
            self.folder.record(key, "matrix"),
            {
                "row": row.name,
                "configuration": self.settings(row),
                "needs": needs,
                "attack": repr(attack),
                "matrix": found.record(),
                "seconds": round(time.perf_counter() - began, 1),
                "calls": [made],
                **made,
            },
        )
        return True


def title_of(key: str, epoch: int) -> str:
    """How a matrix names a network."""
    return f"{ROWS[key].name}, {f'epoch {epoch}' if epoch else 'end'}"


def thirds(progress: float) -> float:
    """Factor 0.1 after 50 and 100 of 150 epochs."""
    return 0.1 ** sum(progress >= milestone for milestone in (1 / 3, 2 / 3))


def attacks() -> dict[str, PGD]:
    """What networks are measured by: 10 steps without a random start."""
    return {
        "l2": PGD(L2, steps=10, step_size=0.1, norm="l2", random_start=False),
        "linf": PGD(LINF, steps=10, step_size=0.001, random_start=False),
    }


def robust(model: nn.Module, x: Tensor, y: Tensor, attack: PGD) -> Any:
    """Errors under an attack; what is wrong clean counts as wrong."""
    return evaluate(model, (x, y), attacks=[attack], eps=attack.eps, norm=attack.norm, progress=False)


def next_label(logits: Tensor, y: Tensor) -> float:
    """The share of examples that are taken for the class after their own, in percent."""
    return 100 * float((logits.argmax(1) == (y + 1) % logits.shape[1]).double().mean())


def look_at_matrix(record: dict[str, Any]) -> None:
    """Goes over what the record of a matrix is to hold."""
    found = TransferMatrix.read(record["matrix"])
    if not len(found.models) == len(found.clean_wrong) == len(found.wrong) == len(found.broken):
        raise ValueError("its rows are not as many as its models")
    _ = dict(record["needs"]), record["configuration"]["width"], float(record["seconds"])


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value
