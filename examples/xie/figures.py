"""The figures: errors over the epochs, and over depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnsurgery.plots import plot_curves
from examples.common.drawing import blank, with_one_legend
from examples.xie.rows import DEPTHS, KINDS, ROWS, key_of
from examples.xie.work import Xie

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(lab: Any) -> dict[str, Figure]:
    """Those for which there are results."""
    made = {f"epochs-{depth}": epochs(lab, depth) for depth in DEPTHS} | {"depth": depths(lab)}
    return {name: figure for name, figure in made.items() if figure is not None}


def epochs(lab: Xie, depth: int) -> Figure | None:
    """Clean and robust error over the epochs, of mixture BN through each branch."""
    curves: dict[str, dict[str, list[float]]] = {"clean": {}, "pgd": {}}
    for kind, (name, _, _) in KINDS.items():
        key = key_of(kind, depth)
        record = lab.training(key)
        if record is None:
            continue
        for branch in ROWS[key].branches or ("",):
            title = {"": name, "clean": f"{name}: clean BN", "adv": f"{name}: adversarial BN"}[branch]
            prefix = f"{branch}: " if branch else ""
            for what, of in curves.items():
                of[title] = [found[f"{prefix}{what}"] for found in record["measures"]]
    if not curves["clean"]:
        return None
    figure = blank(9, 3.6)
    titles = {"clean": "clean error (%)", "pgd": "robust error (%), PGD-10"}
    for ax, (what, of) in zip(figure.subplots(1, 2).flat, curves.items(), strict=True):
        plot_curves(range(len(next(iter(of.values())))), of, ylabel=f"{titles[what]}, ResNet-{depth}", ax=ax)
    return with_one_legend(figure)


def depths(lab: Xie) -> Figure | None:
    """Robust error over depth, of kinds that are there at two depths or more."""
    curves = {}
    for kind, (name, _, _) in KINDS.items():
        for consistent in (False, True):
            records = [lab.evaluation(key_of(kind, depth, consistent=consistent)) for depth in DEPTHS]
            if sum(record is not None for record in records) > 1:
                test = "adv: pgd-20" if kind == "mbn" else "pgd-20"
                title = f"{name}{', consistent' if consistent else ''}"
                curves[title] = [
                    float("nan") if record is None else record["tests"][test]["error"] for record in records
                ]
    if not curves:
        return None
    figure = blank(5, 3.6)
    ax = plot_curves(DEPTHS, curves, ylabel="robust error (%), PGD-20", ax=figure.subplots())
    ax.set(xlabel="depth", xticks=DEPTHS)
    return figure
