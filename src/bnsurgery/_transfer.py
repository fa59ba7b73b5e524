"""Which network's adversarial examples another network gets wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery._data import Data, check_bounds, gather
from bnsurgery._evaluating import Run, refuse_normalising, running
from bnsurgery._modes import global_state
from bnsurgery.adapters import check_attack, describe_attack
from bnsurgery.engine import Engine, EngineLike, chosen_engine
from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import device_of


@dataclass(frozen=True)
class TransferMatrix:
    """Counts of examples; rows are the networks that were attacked, columns those that were given the examples.

    Attributes:
        models: their names.
        examples: how many, N.
        clean_wrong: for each model, those that it gets wrong clean.
        wrong: ``wrong[i][j]``: adversarial examples of model i that model j gets wrong.
        broken: of these, the ones that model j gets right clean.
    """

    models: tuple[str, ...]
    examples: int
    clean_wrong: tuple[int, ...]
    wrong: tuple[tuple[int, ...], ...]
    broken: tuple[tuple[int, ...], ...]

    @property
    def error(self) -> tuple[tuple[float, ...], ...]:
        """Error of model j on the adversarial examples of model i, in percent of all examples."""
        return tuple(tuple(100 * count / self.examples for count in row) for row in self.wrong)

    @property
    def rate(self) -> tuple[tuple[float, ...], ...]:
        """The share broken, in percent of what model j gets right clean (the rest is left out); NaN of none."""
        right = [self.examples - wrong for wrong in self.clean_wrong]
        return tuple(
            tuple(100 * count / of if of else math.nan for count, of in zip(row, right, strict=True))
            for row in self.broken
        )

    def record(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``TransferMatrix.read`` takes them."""
        listed = {name: _lists(value) for name, value in asdict(self).items()}
        return listed

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> TransferMatrix:
        """What :meth:`record` wrote."""
        return cls(
            tuple(record["models"]),
            record["examples"],
            tuple(record["clean_wrong"]),
            *(tuple(tuple(row) for row in record[name]) for name in ("wrong", "broken")),
        )


def transfer_matrix(
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    attack: Any,
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    max_examples: int | None = None,
    seed: int = 0,
    engine: Engine | EngineLike = "fast",
) -> TransferMatrix:
    """Attacks each network, and gives the adversarial examples to all; changes nothing.

    Benz, Zhang and Kweon (arXiv 2010.03316) find that adversarial examples of networks without BN, and of networks
    early in training, transfer better: those rest on robust features, which networks share. Each model is attacked from
    the same random start.

    Args:
        models: by name, modules that map the same inputs to logits (N, K).
        data: an iterable of ``(x, y)`` batches, or one pair of tensors: inputs (N, ...) and labels (N,). The data is
            held in memory.
        attack: a :class:`bnsurgery.PGD`, a torchattacks or AutoAttack object, or a callable ``attack(model, x, y)``.
        bounds: lowest and highest valid input, in pixel units.
        mean: per-channel mean by which ``data`` was normalised, if it was: attacks then work on the pixels.
        std: per-channel standard deviation likewise.
        batch_size: examples run at once.
        max_examples: use the first so many examples.
        seed: seeds the attack, alike for each model.
        engine: as for :func:`bnsurgery.evaluate`: what attacks run on. Predictions are the models' own.

    Returns:
        Counts, from which errors and rates follow.

    Raises:
        ValueError: no models, no data, wrong shapes, labels or inputs out of range, or an argument out of range.
        TypeError: ``attack`` is none, or a model no module.
        BNSurgeryError: the attack returned inputs of another shape, or out of bounds.

    Example:
        >>> import torch
        >>> from bnsurgery import PGD
        >>> from bnsurgery.analysis import transfer_matrix
        >>> models = {
        ...     name: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10)) for name in ("one", "other")
        ... }
        >>> found = transfer_matrix(models, (torch.rand(8, 3, 2, 2), torch.arange(8)), attack=PGD(eps=0.1))
        >>> found.models, len(found.wrong), found.examples
        (('one', 'other'), 2, 8)
    """
    if not isinstance(models, Mapping) or not models:
        got = "none" if isinstance(models, Mapping) else f"a {type(models).__name__}"
        raise ValueError(f"models must be a mapping from names to modules, at least one, got {got}")
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"models[{name!r}] must be a torch.nn.Module, got a {type(model).__name__}")
    check_attack(attack)
    if mean is not None:
        refuse_normalising(attack, "transfer_matrix")
    if batch_size < 1 or (max_examples is not None and max_examples < 1):
        raise ValueError(f"batch_size and max_examples must be at least 1, got {batch_size} and {max_examples}")
    switches = chosen_engine(engine)
    with global_state(device_of(next(iter(models.values())))):
        pair = gather(data, batch_size, max_examples)

    def opened(model: nn.Module) -> Any:
        return running(
            model, pair, bounds=bounds, mean=mean, std=std, batch_size=batch_size, max_examples=None, switches=switches
        )

    everything = torch.arange(len(pair[1]))
    right: dict[str, Tensor] = {}
    for name, model in models.items():
        try:
            with opened(model) as run:
                right[name] = run.clean()
        except ValueError as error:  # noqa: PERF203 - of a few models
            raise ValueError(f"models[{name!r}]: {error}") from None
    wrong, broken = [], []
    for source in models.values():
        with opened(source) as run:
            run.refuse_around(describe_attack(attack), attack)
            made = _crafted(run, attack, batch_size, bounds, seed)
        row = []
        for target in models.values():
            with opened(target) as run:
                row.append(~run.right(everything, made))
        wrong.append(tuple(int(flags.sum()) for flags in row))
        broken.append(tuple(int((flags & right[name]).sum()) for name, flags in zip(models, row, strict=True)))
    clean_wrong = tuple(int((~flags).sum()) for flags in right.values())
    return TransferMatrix(tuple(models), len(everything), clean_wrong, tuple(wrong), tuple(broken))


def _crafted(run: Run, attack: Any, batch_size: int, bounds: tuple[float, float], seed: int) -> Tensor:
    """Adversarial examples of all that there is, in pixels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rows in torch.split(torch.arange(len(run.y)), batch_size):
        made.append(run.craft(attack, rows, generator))
        try:
            check_bounds(made[-1], bounds)
        except ValueError as error:
            raise BNSurgeryError(f"{describe_attack(attack)} returned what is no input: {error}") from None
    return torch.cat(made)


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, tuple) else value
