"""Draw records: plain values in, matplotlib axes out. Needs the extra ``plot``; never sees a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from bnsurgery.analysis import FeatureSet, GradientSimilarity, Histogram, TransferMatrix, WeightShift, histogram
from bnsurgery.errors import MissingExtraError
from bnsurgery.folding import Affine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = ("-", "--", ":", "-.")
"""Told apart in print without colours too."""


def plot_normalized_weights(folded: Mapping[str, Mapping[str, Affine]], *, ax: Axes | None = None) -> Axes:
    """Draws the normalized weight m of each BN layer: its mean, and the band from the 10th to the 90th percentile.

    The mean per layer is Figure 2 of Walter, Stutz and Schiele (arXiv 2204.12393).

    Args:
        folded: by the name that the legend shows, what :func:`bnsurgery.fold_bn` returned; same layers in each.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: nothing to draw, or the models' layers differ in number.

    Example:
        >>> import bnsurgery, torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4))
        >>> ax = plot_normalized_weights({"before": bnsurgery.fold_bn(model)})
        >>> ax.get_xlabel()
        'BN layer'
    """
    counts = {name: len(layers) for name, layers in folded.items()}
    if not counts or 0 in counts.values() or len(set(counts.values())) > 1:
        raise ValueError(f"folded must hold the same number of layers for each model, got {counts}")
    ax = _axes(ax)
    for index, (name, layers) in enumerate(folded.items()):
        positions = range(1, len(layers) + 1)
        weights = [affine.weight.detach().double().cpu() for affine in layers.values()]
        levels = torch.tensor([0.1, 0.9], dtype=torch.float64)
        low, high = torch.stack([torch.quantile(weight, levels) for weight in weights]).T.tolist()
        means = [weight.mean().item() for weight in weights]
        (line,) = ax.plot(positions, means, marker="o", ms=3, ls=_LINES[index % len(_LINES)], label=name)
        ax.fill_between(positions, low, high, color=line.get_color(), alpha=0.2, lw=0)
    ax.set(xlabel="BN layer", ylabel="normalized weight (mean, 10th to 90th percentile)")
    ax.xaxis.set_major_locator(_whole_numbers())
    ax.legend()
    return ax


def plot_errors(epochs: Sequence[float], errors: Mapping[str, Sequence[float]], *, ax: Axes | None = None) -> Axes:
    """Draws errors over the epochs.

    Args:
        epochs: epochs behind each value; 0 is before training.
        errors: by the name that the legend shows, errors in percent, one for each of ``epochs``.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: a curve has another length than ``epochs``.

    Example:
        >>> ax = plot_errors([0, 1, 2], {"clean": [9.0, 20.0, 22.0], "robust": [100.0, 90.0, 85.0]})
        >>> ax.get_ylabel()
        'error (%)'
    """
    _check_lengths("errors", epochs, errors)
    ax = plot_curves(epochs, errors, ylabel="error (%)", ax=ax)
    ax.set(ylim=(0, 102))
    return ax


def plot_curves(
    epochs: Sequence[float], curves: Mapping[str, Sequence[float]], *, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Draws anything that is measured over the epochs, such as LIGS; NaN leaves a gap.

    Args:
        epochs: epochs behind each value; 0 is before training.
        curves: by the name that the legend shows, one value for each of ``epochs``.
        ylabel: what the values are, and their unit.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: a curve has another length than ``epochs``, or there is none.

    Example:
        >>> ax = plot_curves([0, 1, 2], {"BN": [0.95, 0.7, 0.6], "no BN": [0.97, 0.85, 0.8]}, ylabel="LIGS")
        >>> ax.get_ylabel()
        'LIGS'
    """
    _check_lengths("curves", epochs, curves)
    ax = _axes(ax)
    for index, (name, values) in enumerate(curves.items()):
        ax.plot(epochs, values, marker="o", ms=3, ls=_LINES[index % len(_LINES)], label=name)
    ax.set(xlabel="epoch", ylabel=ylabel)
    ax.xaxis.set_major_locator(_whole_numbers())
    ax.legend()
    return ax


def plot_histograms(histograms: Mapping[str, Histogram], *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draws histograms as outlines over one another, each in percent of its own values.

    Values outside the edges are not drawn: the legend counts them.

    Args:
        histograms: by the name that the legend shows, what :func:`bnsurgery.analysis.histogram` returned.
        xlabel: what the values are, and their unit.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: there is no histogram.

    Example:
        >>> import torch
        >>> from bnsurgery.analysis import histogram
        >>> ax = plot_histograms({"NORMAL": histogram(torch.randn(100))}, xlabel="gamma")
        >>> ax.get_ylabel()
        'share of values (%)'
    """
    if not histograms:
        raise ValueError("histograms must hold at least one, got none")
    ax = _axes(ax)
    for index, (name, found) in enumerate(histograms.items()):
        label = f"{name} ({found.outside:,} outside)" if found.outside else name
        ax.stairs(found.shares, found.edges, label=label, lw=1.5, ls=_LINES[index % len(_LINES)])
    ax.set(xlabel=xlabel, ylabel="share of values (%)")
    ax.legend()
    return ax


def plot_similarities(found: Mapping[str, GradientSimilarity], *, bins: int = 40, ax: Axes | None = None) -> Axes:
    """Draws how cosines between input gradients are distributed; the legend has their mean, LIGS, and who has none.

    Args:
        found: by the name that the legend shows, what :func:`bnsurgery.analysis.input_gradient_similarity` returned.
        bins: how many, at least 1, from -1 to 1.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: there is nothing to draw, or a network for which no example counts.

    Example:
        >>> import torch
        >>> from bnsurgery.analysis import input_gradient_similarity
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        >>> found = input_gradient_similarity(model, (torch.rand(8, 3, 2, 2), torch.arange(8)))
        >>> ax = plot_similarities({"linear": found})
        >>> ax.get_xlabel()
        'cosine of the input gradients at x and at x + noise'
    """
    histograms = {}
    for name, similarity in found.items():
        left_out = similarity.examples - len(similarity.cosines)
        more = f", {left_out:,} left out" if left_out else ""
        histograms[f"{name} (LIGS {similarity.mean:.3f}{more})"] = histogram(
            similarity.cosines, bins=bins, bounds=(-1.0, 1.0)
        )
    return plot_histograms(histograms, xlabel="cosine of the input gradients at x and at x + noise", ax=ax)


def plot_transfer(found: TransferMatrix, *, of: Literal["error", "rate"] = "error", ax: Axes | None = None) -> Axes:
    """Draws a transfer matrix: a row for each network that was attacked, a column for each that was given the examples.

    Args:
        found: what :func:`bnsurgery.analysis.transfer_matrix` returned.
        of: ``"error"``: errors in percent of all examples; ``"rate"``: what was broken, in percent of what the network
            of the column gets right clean.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: ``of`` is neither.

    Example:
        >>> from bnsurgery.analysis import TransferMatrix
        >>> ax = plot_transfer(TransferMatrix(("BN", "no BN"), 100, (5, 8), ((99, 40), (60, 98)), ((94, 33), (55, 90))))
        >>> [text.get_text() for text in ax.texts]
        ['99', '40', '60', '98']
    """
    if of not in ("error", "rate"):
        raise ValueError(f"of must be 'error' or 'rate', got {of!r}")
    ax = _axes(ax)
    values = found.error if of == "error" else found.rate
    ax.imshow(values, cmap="viridis", vmin=0, vmax=100)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "black" if value > 60 else "white"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    places = range(len(found.models))
    ax.set_xticks(places, found.models, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(places, found.models)
    what = "error (%)" if of == "error" else "broken (% of what is right clean)"
    ax.set(xlabel=f"network that is given the examples: {what}", ylabel="network that was attacked")
    return ax


def plot_feature_set(
    made: FeatureSet, *, classes: Sequence[str] | None = None, count: int = 10, ax: Axes | None = None
) -> Axes:
    """Draws the first images of a set side by side, under each the label that it came with and the one that it has now.

    Args:
        made: what :func:`bnsurgery.analysis.feature_dataset` returned, of images (N, C, H, W) in [0, 1] with one or
            three channels.
        classes: names of the classes; numbers by default.
        count: how many, at least 1.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: ``count`` below 1; the images are of another shape or range, or there is none; a class has no name.

    Example:
        >>> import torch
        >>> from bnsurgery.analysis import feature_dataset
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        >>> data = torch.rand(4, 3, 8, 8), torch.arange(4)
        >>> made = feature_dataset(model, data, "deterministic", steps=2, progress=False)
        >>> ax = plot_feature_set(made, count=2)
        >>> [tick.get_text() for tick in ax.get_xticklabels()]
        ['0 to 1', '1 to 2']
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    images = made.images[:count].detach().float().cpu()
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"made must hold images (N, C, H, W) of 1 or 3 channels, got {tuple(made.images.shape)}")
    low, high = (float(value) for value in torch.aminmax(images))
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"made must hold images in [0, 1], got values from {low:.3g} to {high:.3g}: undo mean= and std="
        )
    most = int(max(made.sources[:count].max(), made.labels[:count].max()))
    if classes is not None and most >= len(classes):
        raise ValueError(f"classes must name {most + 1} classes at least, got {len(classes)}")
    ax = _axes(ax)
    side = images.expand(-1, 3, -1, -1).clamp(0, 1).permute(2, 0, 3, 1)
    ax.imshow(side.reshape(side.shape[0], -1, 3).numpy(), interpolation="nearest")
    width = images.shape[-1]
    pairs = zip(made.sources[:count].tolist(), made.labels[:count].tolist(), strict=True)
    words = [" to ".join(classes[label] if classes else str(label) for label in dict.fromkeys(pair)) for pair in pairs]
    ax.set_xticks([width * (place + 0.5) - 0.5 for place in range(len(words))], words)
    ax.set_yticks([])
    return ax


def plot_weight_shift(shifts: Mapping[str, WeightShift], *, ax: Axes | None = None) -> Axes:
    """Draws how far the mean normalized weight of each layer moved; the legend has the average over the layers.

    Args:
        shifts: by the name that the legend shows, what :func:`bnsurgery.analysis.weight_shift` returned; same number of
            layers in each.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: there is nothing to draw, or the numbers of layers differ.

    Example:
        >>> from bnsurgery.analysis import WeightShift
        >>> ax = plot_weight_shift({"BN PARAMS - NORMAL": WeightShift({"bn1": -0.2, "bn2": -0.1}, -0.15)})
        >>> ax.get_legend_handles_labels()[1]
        ['BN PARAMS - NORMAL (average -0.150)']
    """
    counts = {name: len(shift.layers) for name, shift in shifts.items()}
    if not counts or len(set(counts.values())) > 1:
        raise ValueError(f"shifts must hold the same number of layers each, and at least one shift, got {counts}")
    ax = _axes(ax)
    for index, (name, shift) in enumerate(shifts.items()):
        label, places = f"{name} (average {shift.mean:+.3f})", range(1, len(shift.layers) + 1)
        ax.plot(places, list(shift.layers.values()), marker="o", ms=3, ls=_LINES[index % len(_LINES)], label=label)
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(xlabel="BN layer", ylabel="shift of the mean normalized weight")
    ax.xaxis.set_major_locator(_whole_numbers())
    ax.legend()
    return ax


def _check_lengths(what: str, epochs: Sequence[float], curves: Mapping[str, Sequence[float]]) -> None:
    if not curves:
        raise ValueError(f"{what} must hold at least one curve, got none")
    for name, values in curves.items():
        if len(values) != len(epochs):
            raise ValueError(f"{what}[{name!r}] must have {len(epochs)} values, one for each epoch, got {len(values)}")


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing") from error
    # A figure of its own rather than pyplot's: no global state, no window, nothing to close.
    return Figure(layout="constrained").subplots()
