"""Figures of a size; matplotlib is loaded when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank(width: float, height: float) -> Figure:
    """A figure of its own, in inches: no global state, no window, nothing to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def with_one_legend(figure: Figure, labels: Sequence[str] | None = None) -> Figure:
    """A legend above all axes, where it covers no curve, in place of one in each; by default with the first one's."""
    handles, own = figure.axes[0].get_legend_handles_labels()
    labels = own if labels is None else labels
    for ax in figure.axes:
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure
