"""The figures: what is measured over the epochs, the two readouts of the conflicting set, transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnsurgery.plots import plot_curves, plot_transfer
from examples.common.drawing import blank, with_one_legend
from examples.benz.rows import ROWS
from examples.benz.work import Benz
from examples.common.files import Pending

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMS = ("bn", "none", "gn", "ln", "in")


def figures(lab: Any) -> dict[str, Figure]:
    """Those for which there are results."""
    made = {"epochs": epochs(lab), "conflicting": readouts(lab), "transfer": transfer(lab)}
    return {name: figure for name, figure in made.items() if figure is not None}


def epochs(lab: Benz) -> Figure | None:
    """Clean error, robust errors and LIGS of the networks that are trained on CIFAR-10, over the epochs."""
    trained = {key: record for key in NORMS if (record := lab.training(key)) is not None}
    if not trained:
        return None
    figure = blank(8, 6)
    axes = figure.subplots(2, 2).flat
    for ax, (name, title) in zip(
        axes,
        (
            ("clean", "clean error (%)"),
            ("ligs", "LIGS"),
            ("l2", "robust error (%), L2 0.25"),
            ("linf", "robust error (%), L-infinity 1/255"),
        ),
        strict=True,
    ):
        curves = {
            ROWS[key].name: [_value(found, name) for found in record["measures"]] for key, record in trained.items()
        }
        counts = {len(curve) for curve in curves.values()}
        plot_curves(range(max(counts)), curves, ylabel=title, ax=ax)
    return with_one_legend(figure)


def _value(found: dict[str, Any], name: str) -> float:
    value = found[name]["mean"] if name == "ligs" else found[name]
    return float("nan") if value is None else float(value)


def readouts(lab: Benz) -> Figure | None:
    """What networks trained on the conflicting set take ordinary images for."""
    keys = [key for key in ("conflicting-bn", "conflicting-none") if lab.training(key) is not None]
    if not keys:
        return None
    figure = blank(4 * len(keys), 3.2)
    for ax, key in zip(figure.subplots(1, len(keys), squeeze=False).flat, keys, strict=True):
        measures = lab.trained(key)["measures"]
        curves = {
            "t + 1 (robust features)": [found["next"] for found in measures],
            "t (non-robust features)": [100 - found["clean"] for found in measures],
        }
        plot_curves(range(len(measures)), curves, ylabel="test images (%)", ax=ax)
        ax.set_title(ROWS[key].name)
    return figure


def transfer(lab: Benz) -> Figure | None:
    """Errors on each other's adversarial examples."""
    try:
        found = lab.matrix()
    except Pending:
        return None
    figure = blank(6.5, 6)
    plot_transfer(found, ax=figure.subplots())
    return figure
