"""Records about networks: normalized weights, outputs under attack, input gradients, transfer, and sets of features.

They hold plain numbers and tensors on the CPU; :mod:`bnsurgery.plots` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnsurgery._data import Data, check_bounds
from bnsurgery._evaluating import percent, refuse_normalising, running
from bnsurgery._features import FeatureSet, feature_dataset
from bnsurgery._similarity import GradientSimilarity, input_gradient_similarity
from bnsurgery._transfer import TransferMatrix, transfer_matrix
from bnsurgery.adapters import check_attack, describe_attack
from bnsurgery.engine import Engine, EngineLike, chosen_engine
from bnsurgery.errors import BNSurgeryError
from bnsurgery.folding import Affine

__all__ = [
    "FeatureSet",
    "GradientSimilarity",
    "Histogram",
    "Outputs",
    "TransferMatrix",
    "WeightShift",
    "feature_dataset",
    "histogram",
    "input_gradient_similarity",
    "outputs",
    "transfer_matrix",
    "weight_shift",
]


@dataclass(frozen=True)
class WeightShift:
    """How far normalized weights moved from one network to another.

    Attributes:
        layers: by layer, the mean of m over its channels in the second network, minus that in the first.
        mean: the average of these over the layers, each counting alike.
    """

    layers: dict[str, float]
    mean: float


def weight_shift(before: Mapping[str, Affine], after: Mapping[str, Affine]) -> WeightShift:
    """Compares the normalized weights m of two networks, layer by layer; changes nothing.

    Walter, Stutz and Schiele (arXiv 2204.12393, Figure 2) find an average difference of -0.177 between a network whose
    BN was fine-tuned adversarially and the one that it started from.

    Args:
        before: what :func:`bnsurgery.fold_bn` returned of the first network.
        after: of the second, with the same layers.

    Returns:
        Differences of the means over channels, computed in float64.

    Raises:
        ValueError: there are no layers, or the networks' differ in names or channels.

    Example:
        >>> import torch
        >>> from bnsurgery import fold_bn
        >>> from bnsurgery.analysis import weight_shift
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(4, eps=0.0))
        >>> before = fold_bn(model)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.mul_(0.5)
        >>> weight_shift(before, fold_bn(model)).mean
        -0.5
    """
    if not before:
        raise ValueError("before holds no layer")
    other = sorted(before.keys() ^ after.keys())
    if other:
        raise ValueError(f"before and after must have the same layers, got {', '.join(map(repr, other))} in one alone")
    layers = {}
    for name, first in before.items():
        weights = [affine.weight.detach().double().cpu() for affine in (first, after[name])]
        if weights[0].shape != weights[1].shape:
            shapes = " and ".join(str(tuple(weight.shape)) for weight in weights)
            raise ValueError(f"{name!r} must have the same channels before and after, got {shapes}")
        layers[name] = float(weights[1].mean() - weights[0].mean())
    return WeightShift(layers, sum(layers.values()) / len(layers))


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a network says of examples.

    Attributes:
        logits: (N, K), on the CPU.
        labels: (N,), int64, on the CPU.
    """

    logits: Tensor
    labels: Tensor

    def __repr__(self) -> str:
        return f"Outputs(logits={tuple(self.logits.shape)}, labels={tuple(self.labels.shape)})"

    @property
    def confidence(self) -> Tensor:
        """The largest probability of each example, (N,), in [0, 1]."""
        return self.logits.double().softmax(1).amax(1)

    @property
    def loss(self) -> Tensor:
        """The cross-entropy of each example, (N,), in float64."""
        return F.cross_entropy(self.logits.double(), self.labels, reduction="none")

    @property
    def error(self) -> float:
        """The share of misclassified examples, in percent."""
        return percent(self.logits.argmax(1) != self.labels)


def outputs(
    model: nn.Module,
    data: Data,
    *,
    attack: Any = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    max_examples: int | None = None,
    seed: int = 0,
    engine: Engine | EngineLike = "fast",
) -> Outputs:
    """Runs a model in evaluation mode on clean or adversarial examples, and keeps its logits; changes nothing.

    Unlike :func:`bnsurgery.evaluate` this attacks every example, those that are misclassified already included, so that
    the loss under attack is that of the whole set.

    Args:
        model: maps inputs to logits (N, K).
        data: an iterable of ``(x, y)`` batches, or one pair of tensors: inputs (N, ...) and labels (N,). The data is
            held in memory.
        attack: a :class:`bnsurgery.PGD`, a torchattacks or AutoAttack object, or a callable ``attack(model, x, y)``;
            ``None``: clean examples.
        bounds: lowest and highest valid input, in pixel units.
        mean: per-channel mean by which ``data`` was normalised, if it was: attacks then work on the pixels.
        std: per-channel standard deviation likewise.
        batch_size: examples run at once.
        max_examples: use the first so many examples.
        seed: seeds the attack.
        engine: as for :func:`bnsurgery.evaluate`: what attacks run on. Logits are the model's own.

    Returns:
        Logits and labels; confidence, cross-entropy and error follow from them.

    Raises:
        ValueError: no data, wrong shapes, labels or inputs out of range, an argument out of range, an attack that
            normalises by itself or is bound to a module around the model, where :func:`bnsurgery.evaluate` refuses it.
        TypeError: ``attack`` is none.
        BNSurgeryError: the attack returned inputs of another shape, or out of bounds.

    Example:
        >>> import torch
        >>> from bnsurgery import PGD
        >>> from bnsurgery.analysis import outputs
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        >>> x, y = torch.rand(8, 3, 2, 2), torch.arange(8)
        >>> clean, adversarial = outputs(model, (x, y)), outputs(model, (x, y), attack=PGD(eps=0.1))
        >>> bool(adversarial.loss.mean() > clean.loss.mean())
        True
    """
    if attack is not None:
        check_attack(attack)
        if mean is not None:
            refuse_normalising(attack, "outputs")
    ready = running(
        model,
        data,
        bounds=bounds,
        mean=mean,
        std=std,
        batch_size=batch_size,
        max_examples=max_examples,
        switches=chosen_engine(engine),
    )
    with ready as run:
        if attack is not None:
            run.refuse_around(describe_attack(attack), attack)
        generator = torch.Generator().manual_seed(seed)
        logits = []
        for rows in torch.split(torch.arange(len(run.y)), batch_size):
            made = run.x[rows] if attack is None else run.craft(attack, rows, generator)
            try:
                check_bounds(made, bounds)
            except ValueError as error:
                raise BNSurgeryError(f"{describe_attack(attack)} returned what is no input: {error}") from None
            logits.append(run.logits(rows, made))
    return Outputs(torch.cat(logits), run.y)


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges.

    Attributes:
        edges: B + 1 ascending numbers; each bin holds its lower edge, the last one its upper edge too.
        counts: B counts.
        outside: values below the first edge or above the last.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    outside: int = 0

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of all values that each bin holds, in percent."""
        total = sum(self.counts) + self.outside
        return tuple(100 * count / total if total else 0.0 for count in self.counts)

    def record(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``Histogram(**record)`` reads them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def histogram(values: Tensor, *, bins: int = 40, bounds: tuple[float, float] | None = None) -> Histogram:
    """Counts values in bins of equal width; changes nothing.

    Args:
        values: any shape, at least one, finite.
        bins: how many, at least 1.
        bounds: the first edge and the last; by default the smallest value and the largest.

    Returns:
        Edges and counts; values outside the bounds are counted apart.

    Raises:
        ValueError: there is no value, one is not finite, or an argument is out of range.

    Example:
        >>> import torch
        >>> from bnsurgery.analysis import histogram
        >>> histogram(torch.tensor([0.1, 0.2, 0.9, 3.0]), bins=2, bounds=(0.0, 1.0))
        Histogram(edges=(0.0, 0.5, 1.0), counts=(2, 1), outside=1)
    """
    flat = values.detach().double().cpu().flatten()
    finite = int(torch.isfinite(flat).sum())
    if not len(flat) or finite < len(flat):
        raise ValueError(f"values must be finite and at least one, got {len(flat)}, {finite} of them finite")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    low, high = bounds if bounds is not None else (float(flat.min()), float(flat.max()))
    if bounds is None and low == high:
        low, high = low - 0.5, high + 0.5
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"bounds must be finite, (low, high) with low < high, got {bounds}")
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    counts = torch.histogram(flat, edges).hist
    inside = [int(count) for count in counts]
    return Histogram(tuple(edges.tolist()), tuple(inside), len(flat) - sum(inside))
