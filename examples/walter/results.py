"""Results as they are kept, and numbers from them: errors, how far apart two rows are, normalized weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnsurgery import Affine, PatchError, fold_bn, load_bn_patch
from bnsurgery.analysis import Histogram
from examples.resnet import ResNet, resnet20
from examples.common.checks import Estimate, paired, share
from examples.common.files import Folder, Pending, Problem, kept, require_same, require_trained
from examples.walter.rows import ROWS, Row
from examples.walter.scales import FULL, Scale

PAPER_SHIFT = -0.177
"""Average difference of the normalized weights, BN PARAMS - NORMAL, in the paper."""


class OtherStart(Problem):
    """A result is of a network that started from another one than is here."""


@dataclass(frozen=True)
class Results:
    """What is finished of one width and seed.

    Attributes:
        folder: where.
        scale: of the results; those of another are refused.
    """

    folder: Folder
    scale: Scale = FULL

    def training(self, key: str) -> dict[str, Any] | None:
        """The record of a row's training; None where there is none yet.

        Raises:
            Problem: it is damaged, of another configuration, or of another start than is here now.
        """
        path = self.folder.record(key, "train")
        record = kept(path, _look_at_training, self.scale.of_training(ROWS[key], self.folder.width))
        return self._of_this_start(key, path, record)

    def choice(self, key: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was found of one of several settings of a row; None where it is not compared yet.

        Raises:
            Problem: as :meth:`training`.
        """
        path = self.folder.choice(key, settings)
        record = kept(path, _look_at_choice, self.scale.of_choice(ROWS[key], settings, self.folder.width))
        if record is not None:
            require_same(path, record, {"examples": [self.scale.held_out, self.scale.robust]})
        return self._of_this_start(key, path, record)

    def _of_this_start(self, key: str, path: Path, record: dict[str, Any] | None) -> dict[str, Any] | None:
        start = ROWS[key].start
        if record is not None and start is not None:
            now = self.training(start)
            if now is None or now["sha256"] != record["start_sha256"]:
                what = "which is not here" if now is None else "and not from the one that is here"
                raise OtherStart(f"{path} started from a network of {start}, {what}: remove it, and it is made again")
        return record

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """The record of a row's evaluation likewise.

        Raises:
            Problem: it is damaged, of another configuration, or of another network than is here now.
        """
        path = self.folder.record(key, "evaluate")
        record = kept(path, _look_at_evaluation, self.scale.of_evaluation(ROWS[key], self.folder.width))
        if record is None:
            return None
        require_trained(path, record["sha256"], self.training(key), self.folder.record(key, "train"))
        return record

    def seconds_an_epoch(self, row: Row) -> float | None:
        """How long an epoch of a row takes, judged by the rows that are trained; None where none is."""
        records = self._readable("training")
        alike = {key: record for key, record in records.items() if ROWS[key].adversarial == row.adversarial} or records
        made = sum(ROWS[key].passes * len(record["history"]) for key, record in alike.items())
        seconds = sum(epoch["seconds"] for record in alike.values() for epoch in record["history"])
        return row.passes * seconds / made if made else None

    def seconds_a_chunk(self) -> float | None:
        """How long AutoAttack takes for a chunk of examples, judged by the rows that are evaluated."""
        records = self._readable("evaluation").values()
        chunks = [seconds for record in records for seconds in record["autoattack"]["chunk_seconds"]]
        return sum(chunks) / len(chunks) if chunks else None

    def _readable(self, kind: str) -> dict[str, dict[str, Any]]:
        """The records that can be read; what is wrong with others is said where they matter."""
        found = {}
        for key in ROWS:
            try:
                record = getattr(self, kind)(key)
            except Problem:
                continue
            if record is not None:
                found[key] = record
        return found

    def evaluated(self, key: str) -> dict[str, Any]:
        """The record of a row's evaluation.

        Raises:
            Problem: there is none, or as :meth:`evaluation`.
        """
        record = self.evaluation(key)
        if record is None:
            raise Pending(f"{key} is not evaluated yet in {self.folder.path}")
        return record

    def clean(self, key: str) -> Estimate:
        """Clean error in percent on the most test images."""
        count, error = max((int(count), error) for count, error in self.evaluated(key)["clean_error"].items())
        return share(round(error * count / 100), count)

    def more_robust(self, key: str, than: str) -> Estimate:
        """By how many points a row's robust error is below another's, on the same examples.

        The standard error is that of pairs: of examples that one of the two holds and the other does not.
        """
        one, other = (self.evaluated(row)["autoattack"]["held"] for row in (key, than))
        return paired(one, other)

    def folded(self, key: str) -> dict[str, Affine]:
        """Normalized weights and biases of a row's BN layers, read from its patch.

        Raises:
            Problem: there is no patch, or it is damaged or of another width.
        """
        return fold_bn(self.with_bn_of(key))

    def with_bn_of(self, key: str) -> ResNet:
        """A network with a row's BN layers; nothing else in it is the row's.

        Raises:
            Problem: as :meth:`folded`.
        """
        if self.training(key) is None:
            raise Pending(f"{key} is not trained yet in {self.folder.path}")
        model = resnet20(self.folder.width)
        try:
            load_bn_patch(model, self.folder.patch(key))
        except (FileNotFoundError, PatchError) as error:
            remedy = f"remove {self.folder.record(key, 'train')}, and it is trained again"
            raise Problem(f"{str(error).splitlines()[0]}: {remedy}") from None
        return model


def at(record: dict[str, Any], eps: float) -> dict[str, Any]:
    """What PGD-20 found at a radius."""
    for found in record["pgd20"]:
        if abs(found["eps"] - eps) < 1e-9:
            return found  # type: ignore[no-any-return]
    raise ValueError(f"PGD-20 was not run at eps {255 * eps:.3g}/255")


def look_at_chunk(found: dict[str, Any]) -> None:
    """Goes over what the record of an AutoAttack is to hold."""
    if len(found["held"]) != found["examples"] or set(found["held"]) - {"0", "1"}:
        raise ValueError("held does not say of each example whether it is right")
    _ = [float(found[name]) for name in ("clean_error", "robust_error", "standard_error")]
    for row in found["rows"]:
        _ = row["attack"], [float(row[name]) for name in ("tried", "broken", "rejected", "seconds")]


def _look_at_choice(record: dict[str, Any]) -> None:
    """Goes over what the record of one of several settings is to hold."""
    _ = record["configuration"]["lr"], [int(count) for count in record["examples"]], record["start_sha256"]
    _ = None if record["cross_entropy"] is None else float(record["cross_entropy"])  # None: it diverged
    _ = [float(record[name]) for name in ("clean_error", "robust_error", "standard_error", "seconds")]


def _look_at_training(record: dict[str, Any]) -> None:
    _ = record["sha256"], record["start_sha256"], record["trains"]["parameters"], record["configuration"]["width"]
    _ = [float(epoch["seconds"]) for epoch in record["history"]], float(record["seconds"])


def _look_at_evaluation(record: dict[str, Any]) -> None:
    found = record["autoattack"]
    look_at_chunk(found)
    if found["examples"] != record["configuration"]["evaluation"]["robust"]:
        raise ValueError(f"{found['examples']} examples were attacked")
    _ = [float(seconds) for seconds in found["chunk_seconds"]], record["sha256"], float(record["seconds"])
    _ = [float(record["clean_error"][str(count)]) for count in record["configuration"]["evaluation"]["clean"]]
    for eps in record["configuration"]["evaluation"]["robust_eps"]:
        under = at(record, eps)
        _ = [float(under[name]) for name in ("robust_error", "standard_error", "cross_entropy")]
        _ = float(under["cross_entropy_standard_error"])
    for kind in ("clean", "adversarial"):
        _ = [Histogram(**record["histograms"][kind][what]).shares for what in ("confidence", "logits")]
