"""Figures 1 to 3 of the paper, from patches and records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnsurgery import bn_layers, fold_bn
from bnsurgery.analysis import Histogram, histogram, weight_shift
from bnsurgery.plots import plot_histograms, plot_normalized_weights
from examples.common.drawing import blank, with_one_legend
from examples.common.files import write
from examples.walter.results import PAPER_SHIFT, Results
from examples.walter.rows import ROWS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("normal", "adv", "bn-params")
"""The rows of the paper's figures."""
LAYER = 8
"""The BN layer of Figure 1, counted from 1 in the order of registration."""


def draw(results: Results) -> list[Path]:
    """Draws all figures; returns their files.

    Raises:
        Problem: a row is missing or damaged, or a disk is full.
    """
    figures = {"figure1": weights(results), "figure2": means(results), "figure3": predictions(results)}
    paths = []
    for name, figure in figures.items():
        path = results.folder.path / f"{name}.png"
        write(path, lambda partial, figure=figure: figure.savefig(partial, dpi=200, format="png"))  # type: ignore[misc]
        paths.append(path)
    return paths


def weights(results: Results) -> Figure:
    """Figure 1: gamma, beta, normalized weight and bias of the 8th BN layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in SHOWN:
        model = results.with_bn_of(key)
        name, layer = list(bn_layers(model).items())[LAYER - 1]
        affine = fold_bn(model)[name]
        found[ROWS[key].name] = {
            "gamma": layer.weight.detach(),
            "beta": layer.bias.detach(),
            "normalized weight m": affine.weight,
            "normalized bias b": affine.bias,
        }
    figure = blank(8, 6)
    names = list(found[ROWS[SHOWN[0]].name])
    for ax, name in zip(figure.subplots(2, 2).flat, names, strict=True):
        together = torch.cat([values[name] for values in found.values()]).double()
        edges = histogram(together, bins=12).edges
        bounds = (edges[0], edges[-1])
        same = {row: histogram(values[name], bins=12, bounds=bounds) for row, values in found.items()}
        plot_histograms(same, xlabel=f"{name}, BN layer {LAYER}", ax=ax)
        ax.set_ylabel("share of channels (%)")
    return with_one_legend(figure, [ROWS[key].name for key in SHOWN])


def means(results: Results) -> Figure:
    """Figure 2: the mean normalized weight of each layer."""
    folded = {key: results.folded(key) for key in SHOWN}
    shift = weight_shift(folded["normal"], folded["bn-params"])
    figure = blank(8, 4)
    ax = plot_normalized_weights({ROWS[key].name: folded[key] for key in SHOWN}, ax=figure.subplots())
    ax.set_title(
        f"BN PARAMS - NORMAL: {shift.mean:+.3f} on average over the layers (paper: {PAPER_SHIFT:+.3f})",
        fontsize="medium",
    )
    return figure


def predictions(results: Results) -> Figure:
    """Figure 3: confidences and logits, clean and under PGD-20."""
    figure = blank(8, 6)
    axes = figure.subplots(2, 2)
    for row, (what, label) in zip(axes, (("confidence", "confidence"), ("logits", "logit")), strict=True):
        for ax, kind in zip(row, ("clean", "adversarial"), strict=True):
            found = {}
            for key in SHOWN:
                record = results.evaluated(key)
                found[ROWS[key].name] = Histogram(**record["histograms"][kind][what])
            plot_histograms(found, xlabel=f"{label}, {kind} examples", ax=ax)
            outside = [f"{counts.outside:,} of {name}" for name, counts in found.items() if counts.outside]
            if outside:
                ax.set_title(f"not drawn, outside the axis: {', '.join(outside)}", fontsize="small")
    return with_one_legend(figure, [ROWS[key].name for key in SHOWN])
