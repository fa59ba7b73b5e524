"""Networks that are trained, measured after each epoch, and evaluated at the end: what reproductions share.

An example makes a subclass of :class:`Lab`: which rows there are, and of each what the network is, what it trains on,
how, and what is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from examples.common.data import Images
from examples.common.evaluating import evaluate
from examples.common.files import Pending, Problem, kept, load_weights, require_trained
from examples.common.records import look_at_tests, look_at_training
from examples.common.training import train
from examples.common.work import Work

Test: TypeAlias = Callable[[], dict[str, Any]]
"""Measures something, and returns plain values."""


@dataclass
class Lab(Work, ABC):
    """The rows of a paper, and what is done for each.

    Attributes:
        rows: by the name that the command line takes, each after what it needs. A row has a ``name``, ``epochs``, and
            ``needs``: the rows whose results it is made of.
        choices: by row, settings that are compared.
        networks: those that ``--network`` knows, the usual one first; none: there is but one.
    """

    rows: ClassVar[Mapping[str, Any]]
    choices: ClassVar[Mapping[str, tuple[Mapping[str, Any], ...]]] = {}
    networks: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def initial(self, row: Any) -> nn.Module:
        """The network that training starts from."""

    @abstractmethod
    def architecture(self, row: Any) -> nn.Module:
        """A network of a row's kind, to load weights into."""

    @abstractmethod
    def batches(self, row: Any, images: Images) -> Iterable[tuple[Tensor, Tensor]]:
        """What it trains on."""

    @abstractmethod
    def options(self, row: Any) -> dict[str, Any]:
        """How, in the words of :func:`bnsurgery.adv_finetune`."""

    @abstractmethod
    def measures(self, row: Any, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        """What is measured after each epoch, as plain values."""

    @abstractmethod
    def tests(self, row: Any, model: nn.Module, x: Tensor, y: Tensor) -> Mapping[str, Test]:
        """What the finished network is measured by, each under a name; what is done of it is not done again."""

    @classmethod
    def networks_of(cls) -> dict[str, Any]:
        """The rows that are networks: what can be evaluated."""
        return dict(cls.rows)

    def begins_as(self, row: Any) -> tuple[str, int] | None:  # noqa: ARG002 - for those who say otherwise
        """The row whose first epochs are this one's too, among those that it needs, and their number; None: no row."""
        return None

    def forks(self, key: str) -> set[int]:
        """The epochs after which other rows part from this one."""
        begun = [self.begins_as(row) for row in self.networks_of().values() if key in row.needs]
        return {start[1] for start in begun if start is not None and start[0] == key}

    def make(self, key: str) -> bool:
        """Trains a row, or goes on with it; whether it is finished."""
        return train(self, key)

    def test(self, key: str) -> bool:
        """Evaluates a row, or goes on with it; whether it is finished."""
        return evaluate(self, key)

    def settings(self, row: Any) -> dict[str, Any]:
        """What decides about the result of training a row, as plain values."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(row).items()}
        plain |= {"epochs": self.scale.epochs(row.epochs), "width": self.folder.width}
        if self.scale.rate != 1:
            plain["rate"] = self.scale.rate
        if self.folder.network:
            plain["network"] = self.folder.network
        return {name: value for name, value in plain.items() if name not in ("name", "paper")} | {
            "batch_size": self.scale.batch_size,
            "training_images": self.scale.training,
            "measured": self.scale.measured,
        }

    def test_settings(self, row: Any) -> dict[str, Any]:
        """What decides about the result of evaluating a row likewise."""
        return self.settings(row) | {"tested": self.scale.tested, "attacked": self.scale.attacked}

    def choice_settings(self, row: Any) -> dict[str, Any]:
        """What decides about how settings compare likewise."""
        more = {"training_images": self.scale.compared_training, "held_out": self.scale.held_out}
        return self.settings(row) | more

    def needed(self, keys: Iterable[str]) -> list[str]:
        """These rows and those that they need, each once, in an order in which those come first."""
        wanted = set(keys)
        for key in reversed(list(self.rows)):
            if key in wanted:
                wanted |= set(self.rows[key].needs)
        return [key for key in self.rows if key in wanted]

    def training(self, key: str) -> dict[str, Any] | None:
        """The record of a row's training; None where there is none yet.

        Raises:
            Problem: it is damaged, of another configuration, or made of other results than are here now.
        """
        path = self.folder.record(key, "train")
        record = kept(path, look_at_training, self.settings(self.rows[key]))
        if record is not None:
            self.require_needs(path, record, key)
        return record

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """The record of a row's evaluation likewise."""
        path = self.folder.record(key, "evaluate")
        record = kept(path, look_at_tests, self.test_settings(self.rows[key]))
        if record is not None:
            require_trained(path, record["sha256"], self.training(key), self.folder.record(key, "train"))
        return record

    def require_needs(self, path: Path, record: Mapping[str, Any], key: str) -> None:
        """Raises :class:`Problem` where a record was made of other results than are here now."""
        for need, now in self.hashes(key).items():
            if record["needs"].get(need) != now:
                what = "which is not here" if now is None else "and not of the one that is here"
                raise Problem(f"{path} was made of a result of {need}, {what}: remove it, and it is made again")

    def hashes(self, key: str) -> dict[str, str | None]:
        """The SHA-256 of each result that a row is made of; None where it is not here."""
        found = {need: self.training(need) for need in self.rows[key].needs}
        return {need: None if record is None else str(record["sha256"]) for need, record in found.items()}

    def trained(self, key: str) -> dict[str, Any]:
        """The record of a row's training; :class:`Pending` where there is none."""
        record = self.training(key)
        if record is None:
            raise Pending(f"{key} is not trained yet in {self.folder.path}")
        return record

    def tested(self, key: str) -> dict[str, Any]:
        """The record of a row's evaluation; :class:`Pending` where there is none."""
        record = self.evaluation(key)
        if record is None:
            raise Pending(f"{key} is not evaluated yet in {self.folder.path}")
        return record

    def network(self, key: str, epoch: int | None = None) -> nn.Module:
        """The network of a row that is trained, at the end or after so many epochs.

        Raises:
            Problem: its weights are missing, damaged, or of another network.
        """
        record = self.trained(key)
        model = self.architecture(self.rows[key])
        path, sha256 = self.folder.weights(key), record["sha256"]
        if epoch is not None:
            path, sha256 = self.folder.interim(f"{key}.epoch{epoch}.safetensors"), record["snapshots"][str(epoch)]
        load_weights(model, path, sha256, self.folder.record(key, "train"))
        return model.to(self.device).to(memory_format=torch.channels_last)
