"""Finished results as numbers: errors, how far apart two rows are, normalized weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bnsurgery import Affine, PatchError, fold_bn, load_bn_patch
from examples.resnet import resnet20
from examples.walter.files import Folder, Problem, read_json

PAPER_SHIFT = -0.177
"""Average difference of the normalized weights, BN PARAMS - NORMAL, in the paper."""


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, both in the same unit."""

    value: float
    error: float

    def beyond(self, bound: float) -> float:
        """How far above a bound, in standard errors."""
        return (self.value - bound) / self.error if self.error else math.copysign(math.inf, self.value - bound)


@dataclass(frozen=True)
class Results:
    """What is finished of one width and seed."""

    folder: Folder

    def evaluation(self, row: str) -> dict[str, Any] | None:
        """The record of a row's evaluation; None where there is none yet.

        Raises:
            Problem: it is damaged.
        """
        return self._read(row, "evaluate", ("autoattack", "clean_error", "pgd20", "histograms"))

    def training(self, row: str) -> dict[str, Any] | None:
        """The record of a row's training likewise."""
        return self._read(row, "train", ("configuration", "trains", "history"))

    def _read(self, row: str, kind: str, holds: tuple[str, ...]) -> dict[str, Any] | None:
        path = self.folder.record(row, kind)
        if not path.exists():
            return None
        record = read_json(path)
        missing = [name for name in holds if name not in record]
        if missing:
            raise Problem(
                f"{path} is not a whole result, it lacks {', '.join(missing)}: remove it, and it is made again"
            )
        return record

    def held(self, row: str) -> list[bool]:
        """Whether each attacked example is right under AutoAttack.

        Raises:
            Problem: the row is not evaluated yet.
        """
        record = self.evaluation(row)
        if record is None:
            raise Problem(f"{row} is not evaluated yet in {self.folder.path}")
        return [flag == "1" for flag in record["autoattack"]["held"]]

    def clean(self, row: str) -> Estimate:
        """Clean error in percent on the most test images."""
        record = self.evaluation(row)
        if record is None:
            raise Problem(f"{row} is not evaluated yet in {self.folder.path}")
        count, error = max((int(count), error) for count, error in record["clean_error"].items())
        share = (error * count / 100 + 1) / (count + 2)
        return Estimate(error, 100 * math.sqrt(share * (1 - share) / count))

    def more_robust(self, row: str, than: str) -> Estimate:
        """By how many points a row's robust error is below another's, on the same examples.

        The standard error is that of pairs: of examples that one of the two holds and the other does not.
        """
        pairs = list(zip(self.held(row), self.held(than), strict=True))
        won, lost = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
        # One more each way: with no pair that differs, as for two rows that are broken wholly, it would be 0.
        spread = (won + 1) + (lost + 1) - (won - lost) ** 2 / len(pairs)
        return Estimate(100 * (won - lost) / len(pairs), 100 * math.sqrt(spread) / len(pairs))

    def folded(self, row: str) -> dict[str, Affine]:
        """Normalized weights and biases of a row's BN layers, read from its patch.

        Raises:
            Problem: there is no patch, or it is damaged or of another width.
        """
        return fold_bn(self.network(row))

    def network(self, row: str) -> Any:
        """A network with a row's BN layers; nothing else in it is the row's."""
        model = resnet20(self.folder.width)
        try:
            load_bn_patch(model, self.folder.patch(row))
        except FileNotFoundError:
            raise Problem(f"{row} is not trained yet in {self.folder.path}: there is no BN patch") from None
        except PatchError as error:
            raise Problem(str(error)) from None
        return model
