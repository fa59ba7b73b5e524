"""Attacks: projected gradient descent, and the one way in which any attack is run without leaving a trace.

An attack is called as ``attack(model, x, y)`` and returns adversarial examples of the shape of ``x``. Whatever runs,
afterwards the model's modes, ``requires_grad`` flags, gradients and buffers, and the process's random state are
as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnsurgery._data import check_bounds, check_labels, check_pair
from bnsurgery._geometry import GEOMETRIES, Norm, check_norm, column
from bnsurgery._modes import global_state, preserved, seed_of
from bnsurgery.errors import BNSurgeryError
from bnsurgery.layers import bn_layers, has_statistics

BNMode = Literal["eval", "batch", "train"]
Loss = Callable[[Tensor, Tensor], Tensor]
Search = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Pixels (N, ...), labels (N,) and the first iterate (N, ...) to adversarial examples (N, ...)."""
Advance = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""An iterate (N, ...), pixels (N, ...) and labels (N,) to losses (N,) and the next iterate."""


class Attack(Protocol):
    """What this library accepts as an attack: a callable that makes adversarial examples."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, /) -> Tensor:
        """Adversarial examples of the shape of ``x`` (N, ...) with labels ``y`` (N,)."""
        ...  # pragma: no cover - a protocol


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example: logits (N, K) and labels (N,) to (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


class PGD:
    """Projected gradient descent (Madry et al., 2018): one loop, L-infinity or L2, untargeted or targeted.

    Each step goes by ``step_size`` along the steepest ascent of the loss, back into the eps-ball around the input, and
    into the bounds. Gradients are taken with respect to the input alone; parameters get none.

    Args:
        eps: radius of the ball in pixel units (bounds are pixel units too), at least 0.
        steps: number of steps, at least 0.
        step_size: length of a step in pixel units, at least 0.
        norm: ``"linf"`` or ``"l2"``.
        random_start: start at random inside the ball, else at the input.
        best: return the iterate of highest loss instead of the last one, for each example (Stutz's code; one more
            forward pass).
        targeted: take the labels as targets and lower the loss.
        loss: logits (N, K) and labels (N,) to a loss for each example (N,).
        bounds: lowest and highest valid input, in pixel units.
        mean: per-channel mean by which the data was normalised, if it was; eps stays in pixel units.
        std: per-channel standard deviation likewise.
        bn: ``"eval"``: the model is attacked in evaluation mode. ``"batch"``: the same, but BN layers normalise by the
            batch. ``"train"``: the whole model in training mode. In each, the statistics end as they were.
        seed: seeds the attack's own generator, from which random starts are drawn call after call; torch's global
            generator is neither read nor moved.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        >>> x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
        >>> attack = PGD(eps=8 / 255, steps=10, step_size=2 / 255)
        >>> x_adv = attack(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        steps: int = 10,
        step_size: float = 2 / 255,
        norm: Norm = "linf",
        *,
        random_start: bool = True,
        best: bool = False,
        targeted: bool = False,
        loss: Loss = cross_entropy,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        bn: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        for name, value in (("eps", eps), ("steps", steps), ("step_size", step_size)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if int(steps) != steps:
            raise ValueError(f"steps must be a whole number, got {steps}")
        check_norm(norm)
        if bn not in ("eval", "batch", "train"):
            raise ValueError(f"bn must be 'eval', 'batch' or 'train', got {bn!r}")
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together: give both or neither")
        if std is not None and not bool((torch.as_tensor(std) > 0).all()):
            raise ValueError(f"std must be above 0, got {std}")
        self.eps, self.steps, self.step_size, self.norm = float(eps), int(steps), float(step_size), norm
        self.random_start, self.best, self.targeted, self.loss = random_start, best, targeted, loss
        self.bounds, self.bn, self.seed = (float(bounds[0]), float(bounds[1])), bn, seed
        self.mean = None if mean is None else torch.as_tensor(mean, dtype=torch.float64)
        self.std = None if std is None else torch.as_tensor(std, dtype=torch.float64)
        self._generator: torch.Generator | None = None

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Makes adversarial examples; the model and ``x`` are as before afterwards.

        Args:
            model: maps inputs to logits (N, K).
            x: inputs (N, ...) on the model's device, within the bounds (before ``mean`` and ``std``).
            y: labels (N,), or targets where ``targeted``.
            generator: draws the random start instead of the attack's own.
            start: the first iterate, (N, ...) like ``x``, instead of a random start; projected where it lies outside.

        Returns:
            Adversarial examples like ``x``, detached, within eps of ``x`` and within the bounds.

        Raises:
            ValueError: wrong shapes, inputs that are not finite or out of bounds, labels out of range.
        """

        def search(pixels: Tensor, labels: Tensor, begin: Tensor) -> Tensor:
            with attacking(model, self.bn):
                return self.search(model, pixels, labels, begin, x.dtype)

        return self.run(search, x, y, generator=generator, start=start)

    def run(
        self,
        search: Search,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """All but the loop: checks, pixel units, the first iterate, the random state.

        Args:
            search: does the loop: takes inputs (N, ...) in pixel units, labels (N,) and the first iterate (N, ...), and
                returns the adversarial examples (N, ...) in pixel units.
            x: as for a call of the attack.
            y: likewise.
            generator: likewise.
            start: likewise.

        Returns:
            As a call of the attack does.

        Raises:
            ValueError: as a call of the attack does.
        """
        check_pair(x, y)
        if start is not None and start.shape != x.shape:
            raise ValueError(f"start must have the shape of x, {tuple(x.shape)}, got {tuple(start.shape)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and values.dim() == 1 and len(values) not in (1, x.shape[1]):
                raise ValueError(
                    f"{name} must hold {x.shape[1]} values to go with x {tuple(x.shape)}, got {len(values)}"
                )
        # Half precision has too few digits to keep to the eps-ball.
        pixels = self._pixels(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
        check_bounds(pixels, self.bounds)
        if not len(x):
            return x.clone()
        generator = generator or self._own_generator()
        if start is not None:
            begin = self._pixels(start.detach().to(pixels.dtype))
        elif self.random_start:
            begin = pixels + GEOMETRIES[self.norm].start(pixels, self.eps, generator)
        else:
            begin = pixels
        # A model that is random itself (dropout with bn="train") draws from the global generator.
        with global_state(x.device, seed_of(generator)):
            adversarial = search(pixels, y.long(), self._within(begin, pixels))
        return self._inputs(adversarial).to(x.dtype)

    def search(
        self,
        model: Callable[[Tensor], Tensor],
        pixels: Tensor,
        y: Tensor,
        begin: Tensor,
        dtype: torch.dtype,
        advance: Advance | None = None,
    ) -> Tensor:
        """The loop itself, all in pixel units, on a model that is ready to be attacked.

        Args:
            model: maps inputs (N, ...), normalised where ``mean`` and ``std`` are set, to logits (N, K).
            pixels: clean inputs (N, ...) in pixel units, in at least float32.
            y: labels (N,), int64.
            begin: the first iterate (N, ...), within eps and the bounds.
            dtype: what the model takes.
            advance: stands in for :meth:`advance`: the same step, captured or compiled.

        Returns:
            The last iterate (N, ...), or, where ``best``, of each example the one with the largest loss; detached.
        """
        current, best, best_loss = begin, begin, torch.full_like(y, -math.inf, dtype=pixels.dtype)
        for step in range(self.steps):
            if advance is None:
                losses, ahead = self.advance(model, current, pixels, y, dtype, check=step == 0)
            else:
                losses, ahead = advance(current, pixels, y)
            if self.best:
                best, best_loss = _better(best, best_loss, current, losses)
            current = ahead
        if self.best:
            with torch.no_grad():
                losses = self.losses(model, current, y, dtype, check=self.steps == 0)
                best, _ = _better(best, best_loss, current, losses)
        return best if self.best else current.detach()

    def advance(
        self,
        model: Callable[[Tensor], Tensor],
        current: Tensor,
        pixels: Tensor,
        y: Tensor,
        dtype: torch.dtype,
        *,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One step, with arguments as for :meth:`search`: the losses (N,) at ``current``, and the iterate after it.

        With ``check`` labels that are out of range raise a :class:`ValueError`.
        """
        current = current.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(model, current, y, dtype, check=check)
            (gradient,) = torch.autograd.grad(losses.sum(), current)
        current = current.detach()
        return losses.detach(), self._within(current + self.step_size * GEOMETRIES[self.norm].step(gradient), pixels)

    def losses(
        self,
        model: Callable[[Tensor], Tensor],
        current: Tensor,
        y: Tensor,
        dtype: torch.dtype,
        *,
        check: bool = False,
    ) -> Tensor:
        """What the attack raises: for each example (N,) the loss at ``current``, or its negative where ``targeted``.

        Arguments as for :meth:`advance`.
        """
        logits = model(self._inputs(current).to(dtype))
        if check:
            check_labels(y, logits)
        logits = evened(logits) if logits.dtype == torch.float16 else logits
        losses = self.loss(logits.to(current.dtype), y)
        return -losses if self.targeted else losses

    def __repr__(self) -> str:
        options = f"eps={self.eps:.6g}, steps={self.steps}, step_size={self.step_size:.6g}, norm={self.norm!r}"
        defaults = PGD.__init__.__kwdefaults__ or {}
        for name, default in defaults.items():
            value = getattr(self, name)
            if name in ("mean", "std"):
                value = None if value is None else [round(number, 6) for number in value.flatten().tolist()]
            if name == "loss":
                value, default = getattr(value, "__name__", repr(value)), "cross_entropy"
            if value != default:
                options += f", {name}={value!r}"
        return f"PGD({options})"

    def _within(self, moved: Tensor, pixels: Tensor) -> Tensor:
        delta = GEOMETRIES[self.norm].project(moved - pixels, self.eps)
        return (pixels + delta).clamp(*self.bounds)

    def _own_generator(self) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        return self._generator

    def __deepcopy__(self, memo: object) -> PGD:
        return self._copy()

    def _copy(self) -> PGD:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _generator=None)
        return other

    def _pixels(self, x: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return x
        return x * _channels(self.std, x) + _channels(self.mean, x)

    def _inputs(self, pixels: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return pixels
        return (pixels - _channels(self.mean, pixels)) / _channels(self.std, pixels)


@dataclass(frozen=True)
class Part:
    """Rows of a larger batch, of which other processes have the rest.

    Attributes:
        rows: which ones.
        whole: how many there are in all.
    """

    rows: slice
    whole: int


def start_of(attack: PGD, x: Tensor, part: Part, generator: torch.Generator) -> Tensor | None:
    """The random start of x (N, ...), part of a larger batch, as if the whole batch were attacked; None: no such."""
    if not attack.random_start:
        return None
    pixels = attack._pixels(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
    like = pixels.new_empty(part.whole, *pixels.shape[1:])
    return attack._inputs(pixels + GEOMETRIES[attack.norm].start(like, attack.eps, generator)[part.rows])


@contextmanager
def attacking(model: nn.Module, bn: BNMode = "eval") -> Iterator[None]:
    """Holds a model ready to be attacked, and puts it back afterwards.

    Modes as ``bn`` says; no parameter asks for a gradient, which spares their share of the backward pass.
    """
    if torch.is_inference_mode_enabled():
        raise BNSurgeryError("an attack needs gradients: leave torch.inference_mode(); torch.no_grad() is fine")
    with preserved(model):
        if bn == "train":
            model.train()
        else:
            model.eval()
        if bn == "batch":
            for layer in bn_layers(model, strict=False).values():
                layer.training = True
                if has_statistics(layer):
                    layer.track_running_stats = False
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


def evened(logits: Tensor) -> Tensor:
    """Logits (N, K) in float32, whose gradient comes back divided by each example's largest entry.

    In float16, small gradients of examples that are right by far would vanish; steps go by the direction alone.
    """
    logits = logits.float()
    if logits.requires_grad:
        logits.register_hook(_evened)  # type: ignore[no-untyped-call]
    return logits


def _evened(gradient: Tensor) -> Tensor:
    largest = gradient.abs().amax(1, keepdim=True)
    return gradient / largest.where(largest > 0, 1)


def _better(best: Tensor, best_loss: Tensor, current: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    better = losses > best_loss
    return torch.where(column(better, current), current, best), torch.where(better, losses, best_loss)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    values = values.to(x.device, x.dtype)
    return values.view(-1, *[1] * (x.dim() - 2)) if values.dim() == 1 else values
