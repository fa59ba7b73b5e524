"""Data sets in which only some features go with the labels.

Ilyas et al., "Adversarial Examples Are Not Bugs, They Are Features" (arXiv 1905.02175), as Benz, Zhang and Kweon (arXiv
2010.03316) use them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bnsurgery._data import Data
from bnsurgery._evaluating import Run, running
from bnsurgery._geometry import Norm
from bnsurgery._tracing import leaves
from bnsurgery.attacks import PGD
from bnsurgery.engine import Engine, EngineLike, Precision, check_precision, chosen_engine, dtype_for
from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import named_modules, select, unwrap

FeatureKind = Literal["random", "deterministic", "conflicting", "matched"]
KINDS: tuple[FeatureKind, ...] = ("random", "deterministic", "conflicting", "matched")
_EVERYWHERE = 1e6
"""Radius of the ball in which features are matched: there is none but the bounds."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Images with labels, of which only some features go with them.

    Attributes:
        images: (M, ...) like the inputs that they were made of, on the CPU.
        labels: (M,), int64: what to train with.
        sources: (M,), int64: labels of the inputs.
        kind: which kind.
        examples: inputs, N.
        nonfinite: of these, those left out because the image or the network's outputs of it are not finite.
        reached: how many the network takes for their labels now; None of ``"matched"``.
        distance: of ``"matched"``, the mean distance to the features that were to be matched, relative to their mean
            length, before and after; else None.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor
    kind: FeatureKind
    examples: int
    nonfinite: int
    reached: int | None = None
    distance: tuple[float, float] | None = None

    def record(self) -> dict[str, Any]:
        """Plain values, ready for JSON, without the images."""
        names = ("kind", "examples", "nonfinite", "reached")
        plain = {name: getattr(self, name) for name in names}
        return plain | {"distance": None if self.distance is None else list(self.distance)}

    def __repr__(self) -> str:
        return f"FeatureSet({', '.join(f'{name}={value!r}' for name, value in self.record().items())})"


def feature_dataset(
    model: nn.Module,
    data: Data,
    kind: FeatureKind,
    *,
    eps: float = 0.5,
    steps: int | None = None,
    step_size: float = 0.1,
    norm: Norm = "l2",
    features: str | None = None,
    starts: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    max_examples: int | None = None,
    seed: int = 0,
    progress: bool = True,
    engine: Engine | EngineLike = "fast",
    precision: Precision = "auto",
) -> FeatureSet:
    """Makes a training set out of another, in which only some features go with the labels; changes nothing.

    Source: Ilyas et al. (arXiv 1905.02175), with the settings of Benz, Zhang and Kweon (arXiv 2010.03316) as defaults.

    Args:
        model: maps inputs to logits (N, K); its features are the ones that count.
        data: an iterable of ``(x, y)`` batches, or one pair of tensors: inputs (N, ...) and labels (N,). The data is
            held in memory.
        kind: ``"random"`` (D_rand): each input attacked towards a target, drawn from all classes alike, and labelled
            with it: of what goes with the labels there are but the non-robust features. ``"deterministic"`` (D_det):
            the same with the class after the input's own as target, so that robust features go with another label.
            ``"conflicting"``: the same again, of other data: given the images and labels y of a ``"matched"`` set that
            a robust network made, and made on a standard one, robust features go with y, and non-robust ones with
            y + 1, which is the label. A network trained on it says y + 1 of ordinary images where it goes by robust
            features, and y where by the others.
            ``"matched"`` (D_R of a robust network, D_NR of a standard one): from another input, the features of this
            one, and its label: only what the network itself uses goes with the labels.
        eps: radius of the attack in pixel units; ``"matched"`` has none but the bounds.
        steps: by default 100, of ``"matched"`` 1000.
        step_size: length of a step in pixel units.
        norm: of the attack, ``"l2"`` or ``"linf"``.
        features: of ``"matched"``, the layer whose input is matched; by default the last linear one, so that these are
            the penultimate features.
        starts: of ``"matched"``, what to start from (N, ...), like the inputs; by default these in random order.
        bounds: lowest and highest valid input, in pixel units.
        mean: per-channel mean by which ``data`` was normalised, if it was.
        std: per-channel standard deviation likewise.
        batch_size: examples worked on at once.
        max_examples: use the first so many examples.
        seed: draws targets and starts.
        progress: show a progress bar on standard error.
        engine: as for :func:`bnsurgery.adv_finetune`: what gradients are taken on.
        precision: likewise.

    Returns:
        The images, in the units of ``data``, and their labels.

    Raises:
        ValueError: an unknown kind, no data, wrong shapes, labels, inputs or an argument out of range, no such layer.
        BNSurgeryError: the layer is not reached.

    Example:
        >>> import torch
        >>> from bnsurgery.analysis import feature_dataset
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        >>> made = feature_dataset(model, (torch.rand(8, 3, 2, 2), torch.arange(8)), "deterministic", progress=False)
        >>> made.labels.tolist()
        [1, 2, 3, 4, 5, 6, 7, 8]
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if kind != "matched" and (features is not None or starts is not None):
        raise ValueError(f"features and starts go with kind='matched', got kind={kind!r}")
    switches = chosen_engine(engine)
    check_precision(precision, switches)
    root = unwrap(model)
    if kind == "matched":
        eps, norm = _EVERYWHERE, "l2"
        root = Penultimate(root, _layer(root, features))
    steps = steps if steps is not None else (1000 if kind == "matched" else 100)
    attack = PGD(eps, steps, step_size, norm, random_start=False, targeted=True, bounds=bounds)
    generator = torch.Generator().manual_seed(seed)
    ready = running(
        root,
        data,
        bounds=bounds,
        mean=mean,
        std=std,
        batch_size=batch_size,
        max_examples=max_examples,
        switches=switches,
        precision=None if switches is None else dtype_for(root, precision, lower=True),
    )
    with ready as run, tqdm(total=len(run.y), desc=kind, unit="img", disable=not progress, leave=False) as bar:
        make = (
            _Matched(run, attack, starts, generator) if kind == "matched" else _Targeted(run, attack, kind, generator)
        )
        made = []
        for rows in torch.split(torch.arange(len(run.y)), batch_size):
            made.append(make(rows))
            bar.update(len(rows))
        images, labels = torch.cat(made), make.labels
        finite = images.flatten(1).isfinite().all(1)
        images, labels, sources = images[finite], labels[finite], run.y[finite]
        if run.inside is not None:
            images = run.inside.inputs(images)
        return FeatureSet(images, labels, sources, kind, len(finite), int((~finite).sum()), make.reached, make.distance)


class Penultimate(nn.Module):
    """The features of a network: inputs (N, ...) to what goes into one of its layers, (N, D)."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, D)."""
        found: list[Tensor] = []
        layer = dict(named_modules(self.model))[self.layer]
        handle = layer.register_forward_pre_hook(
            lambda _module, inputs, named: found.extend([*leaves((inputs, named), Tensor)][:1]), with_kwargs=True
        )
        try:
            self.model(x)
        finally:
            handle.remove()
        if not found:
            raise BNSurgeryError(f"{self.layer!r} is not reached by a forward pass: name another layer, features=")
        return found[-1].flatten(1)


def _layer(model: nn.Module, features: str | None) -> str:
    names = {name: module for name, module in named_modules(model) if name}
    if features is None:
        linear = [name for name, module in names.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError("the model has no linear layer: say features=, the layer whose input is to be matched")
        return linear[-1]
    found = [*select(names, features, "features")]
    if len(found) > 1:
        raise ValueError(f"features={features!r} must be one layer, and is {len(found)}, {found[0]!r} among them")
    return found[0]


class _Making:
    """Makes images of some rows."""

    labels: Tensor
    reached: int | None = None
    distance: tuple[float, float] | None = None

    def __init__(self, run: Run, attack: PGD) -> None:
        self._run, self._attack = run, attack

    def _search(self, attack: PGD, x: Tensor, y: Tensor) -> Tensor:
        """Lets an attack run from x (N, ...) in pixels, on the copy where there is one; the result is on the CPU."""
        run = self._run
        x, y = x.to(run.device), y.to(run.device)

        def search(pixels: Tensor, labels: Tensor, begin: Tensor) -> Tensor:
            if run.replica is None:
                return attack.search(run.model, pixels, labels, begin, x.dtype)
            return run.replica.search(attack, pixels, labels, begin, x.dtype)

        return attack.run(search, x, y).cpu()


def _left_out(made: Tensor, which: Tensor) -> Tensor:
    """Images (N, ...) with NaN where they are not to count, which is then found and counted."""
    made[which] = math.nan
    return made


class _Targeted(_Making):
    """By an attack towards other labels."""

    def __init__(self, run: Run, attack: PGD, kind: FeatureKind, generator: torch.Generator) -> None:
        super().__init__(run, attack)
        first = torch.arange(min(len(run.y), run.batch_size))
        run.right(first, run.x[first])  # which finds out how many classes there are, and checks the labels
        after = (run.y + 1) % run.classes
        self.labels = torch.randint(run.classes, run.y.shape, generator=generator) if kind == "random" else after
        self.reached = 0

    def __call__(self, rows: Tensor) -> Tensor:
        made = self._search(self._attack, self._run.x[rows], self.labels[rows])
        logits = self._run.logits(rows, made)
        finite = logits.isfinite().all(1)
        self.reached = (self.reached or 0) + int(((logits.argmax(1) == self.labels[rows]) & finite).sum())
        return _left_out(made, ~finite)


class _Matched(_Making):
    """By going from another image towards its features."""

    def __init__(self, run: Run, attack: PGD, starts: Tensor | None, generator: torch.Generator) -> None:
        super().__init__(run, attack)
        self.labels = run.y
        if starts is None:
            starts = run.x[torch.randperm(len(run.y), generator=generator)]
        elif starts.shape != run.x.shape:
            raise ValueError(
                f"starts must have the shape of the inputs, {tuple(run.x.shape)}, got {tuple(starts.shape)}"
            )
        else:
            starts = starts.float() if run.inside is None else run.inside.pixels(starts)
            low, high = (float(value) for value in torch.aminmax(starts))
            if not (attack.bounds[0] - 1e-4 <= low and high <= attack.bounds[1] + 1e-4):
                raise ValueError(f"starts must lie in bounds={attack.bounds}, got values from {low:.4g} to {high:.4g}")
            starts = starts.clamp(*attack.bounds)
        self._starts = starts
        self._lengths: list[list[float]] = []

    @property
    def distance(self) -> tuple[float, float] | None:  # type: ignore[override]
        """Before and after, relative to the length of what was to be matched."""
        if not self._lengths:
            return None
        length, before, after = (sum(values) for values in zip(*self._lengths, strict=True))
        return before / max(length, 1e-12), after / max(length, 1e-12)

    def __call__(self, rows: Tensor) -> Tensor:
        run, start = self._run, self._starts[rows].cpu()
        wanted = self._features(run.x[rows])

        def loss(features: Tensor, _labels: Tensor) -> Tensor:
            return (features - wanted.to(features)).square().sum(1)

        attack = PGD(
            self._attack.eps,
            self._attack.steps,
            self._attack.step_size,
            self._attack.norm,
            random_start=False,
            targeted=True,
            loss=loss,
            bounds=self._attack.bounds,
        )
        made = self._search(attack, start, torch.zeros_like(rows))
        lengths = torch.stack([wanted.norm(dim=1), *((self._features(x) - wanted).norm(dim=1) for x in (start, made))])
        finite = lengths.isfinite().all(0)
        self._lengths += lengths[:, finite].T.tolist()
        return _left_out(made, ~finite.cpu())

    def _features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = self._run.model(x.to(self._run.device))
        return features.float()
