"""Draw records: plain values in, matplotlib axes out. Needs the extra ``plot``; never sees a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bnsurgery.analysis import Histogram
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
    for name, values in errors.items():
        if len(values) != len(epochs):
            raise ValueError(f"errors[{name!r}] must have {len(epochs)} values, one for each epoch, got {len(values)}")
    ax = _axes(ax)
    for name, values in errors.items():
        ax.plot(epochs, values, marker="o", ms=3, label=name)
    ax.set(xlabel="epoch", ylabel="error (%)", ylim=(0, 102))
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
