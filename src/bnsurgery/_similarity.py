"""How alike a network's input gradients are at an image and near it.

Benz, Zhang and Kweon (arXiv 2010.03316): local input gradient similarity (LIGS), for them a measure of how robust the
features are that a network uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery._allocator import keeping_memory
from bnsurgery._data import Data, check_bounds, check_labels, gather
from bnsurgery._evaluating import require_one_way
from bnsurgery._modes import global_state
from bnsurgery._replicas import Replicas
from bnsurgery.attacks import Loss, attacking, cross_entropy
from bnsurgery.engine import Engine, EngineLike, chosen_engine
from bnsurgery.layers import device_of, unwrap, widest


@dataclass(frozen=True, eq=False)
class GradientSimilarity:
    """Cosines between input gradients.

    Attributes:
        cosines: of the examples that count (M,), float64, on the CPU, in [-1, 1].
        examples: all of them, N.
        zero: examples left out because one of the two gradients is zero.
        nonfinite: examples left out because one of the two is not finite.
    """

    cosines: Tensor
    examples: int
    zero: int
    nonfinite: int

    @property
    def mean(self) -> float:
        """LIGS; NaN where no example counts."""
        return float(self.cosines.mean()) if len(self.cosines) else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean, over examples; NaN where fewer than two count."""
        count = len(self.cosines)
        return float(self.cosines.std()) / math.sqrt(count) if count > 1 else math.nan

    def record(self) -> dict[str, Any]:
        """Plain values, ready for JSON, without the single cosines; a mean or error of too few is None."""
        means = {"mean": self.mean, "standard_error": self.standard_error}
        plain = {name: value if math.isfinite(value) else None for name, value in means.items()}
        return plain | {"examples": self.examples, "zero": self.zero, "nonfinite": self.nonfinite}

    def __repr__(self) -> str:
        left_out = f"zero={self.zero}, nonfinite={self.nonfinite}"
        return f"GradientSimilarity(mean={self.mean:.4f}, examples={self.examples}, {left_out})"


def input_gradient_similarity(
    model: nn.Module,
    data: Data,
    *,
    sigma: float = 0.01,
    loss: Loss = cross_entropy,
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    max_examples: int | None = None,
    seed: int = 0,
    engine: Engine | EngineLike = "fast",
) -> GradientSimilarity:
    """Compares the gradient of the loss at each input with that at the input plus noise (LIGS); changes nothing.

    Source: Benz, Zhang and Kweon (arXiv 2010.03316): the mean over the test set of cos(grad_x L(F(x), y),
    grad_x L(F(x + d), y)), d ~ N(0, 0.01^2) for each pixel, without clamping, in evaluation mode, with respect to the
    image before normalisation. Look at it beside clean accuracy: it may be near 1 where nothing has been learned. BN
    that has seen no data yet does nothing; BN without running statistics normalises by the batch, so that
    ``batch_size`` decides too. Each gradient is one forward and one backward pass of a batch, in the model's own
    precision.

    Args:
        model: maps inputs to logits (N, K).
        data: an iterable of ``(x, y)`` batches, or one pair of tensors: inputs (N, ...) and labels (N,). The data is
            held in memory.
        sigma: standard deviation of the noise in pixel units, above 0.
        loss: logits (N, K) and labels (N,) to a loss for each example (N,).
        bounds: lowest and highest valid input, in pixel units; the noise may leave them.
        mean: per-channel mean by which ``data`` was normalised, if it was: noise and gradients are of the pixels.
        std: per-channel standard deviation likewise.
        batch_size: examples run at once.
        max_examples: use the first so many examples.
        seed: seeds the noise.
        engine: what gradients are taken on: ``"fast"``: a private copy, fused, in the same precision; ``"plain"``: the
            model itself.

    Returns:
        The cosines, and how many examples have none.

    Raises:
        ValueError: no data, wrong shapes, labels, inputs or an argument out of range.
        BNSurgeryError: examples take different branches of a split model.

    Example:
        >>> import torch
        >>> from bnsurgery.analysis import input_gradient_similarity
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        >>> found = input_gradient_similarity(model, (torch.rand(8, 3, 2, 2), torch.arange(8)))
        >>> found.examples, found.mean > 0.99
        (8, True)
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be finite and above 0, got {sigma}")
    for name, value in (("batch_size", batch_size), ("max_examples", max_examples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither")
    switches = chosen_engine(engine)
    root, device = unwrap(model), device_of(model)
    require_one_way(root)
    with global_state(device):
        x, y = gather(data, batch_size, max_examples)
    dtype = next((parameter.dtype for parameter in root.parameters() if parameter.is_floating_point()), x.dtype)
    wide = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    shift, scale = (_channels(name, given, x, wide) for name, given in (("mean", mean), ("std", std)))
    pixels = x.to(wide) * scale + shift
    check_bounds(pixels, bounds)
    generator = torch.Generator().manual_seed(seed)
    kept = keeping_memory(device, wanted=switches is not None and switches.keep_memory)
    found: list[tuple[Tensor, Tensor]] = []
    with attacking(root), torch.autocast(device.type, enabled=False), kept, global_state(device, seed):
        copies = None if switches is None else Replicas(root, switches, dtype=None, compile=False)
        shift, scale = shift.to(device), scale.to(device)
        for part, labels in zip(torch.split(pixels, batch_size), torch.split(y, batch_size), strict=True):
            noise = sigma * torch.randn(part.shape, generator=generator)
            pair = part.to(device), (part + noise).to(device)
            replica = None if copies is None else copies.fresh(((pair[0] - shift) / scale).to(dtype))
            net = root if replica is None else replica.net

            def logits(near: Tensor, net: nn.Module = net) -> Tensor:
                made: Tensor = net(((near - shift) / scale).to(dtype))
                return made.to(torch.promote_types(made.dtype, torch.float32))

            found.append(_cosines(*(_gradient(logits, near, labels.to(device), loss) for near in pair)))
    cosines, lengths = (torch.cat(values).cpu() for values in zip(*found, strict=True))
    finite = (lengths.isfinite() & cosines.isfinite()) | (lengths == 0)
    counts = finite & (lengths > 0)
    zero, nonfinite = int((lengths == 0).sum()), int((~finite).sum())
    return GradientSimilarity(cosines[counts], len(cosines), zero, nonfinite)


def _channels(name: str, given: Sequence[float] | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``mean`` or ``std`` in a shape that goes with x (N, C, ...); by default 0 or 1."""
    values = torch.as_tensor([float(name == "std")] if given is None else given, dtype=dtype).flatten()
    if len(values) not in (1, x.shape[1]):
        raise ValueError(f"{name} must hold {x.shape[1]} values to go with x {tuple(x.shape)}, got {len(values)}")
    if name == "std" and not bool((values > 0).all()):
        raise ValueError(f"std must be above 0, got {given}")
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _gradient(logits: Callable[[Tensor], Tensor], pixels: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Of the loss with respect to pixels (N, ...), of their shape, in float64 where the device has it."""
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        made = logits(pixels)
        check_labels(y, made)
        (gradient,) = torch.autograd.grad(loss(made, y).sum(), pixels)
    return gradient.to(widest(pixels.device))


def _cosines(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (N,), and the smaller of the lengths (N,), 0 or not finite where there is no cosine."""
    one, other = (gradient.flatten(1) for gradient in (one, other))
    # By the largest entry first: squares of small gradients underflow.
    largest = [gradient.abs().amax(1, keepdim=True) for gradient in (one, other)]
    units = [gradient / size for gradient, size in zip((one, other), largest, strict=True)]
    lengths = [unit.square().sum(1).sqrt() for unit in units]
    cosines = (units[0] * units[1]).sum(1) / (lengths[0] * lengths[1])
    return cosines.clamp(-1, 1), torch.minimum(*largest).flatten()
