"""The figures of the result files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import BASELINE, COMPILED
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter, NullLocator

SHOWN = {"bnsurgery": "bnsurgery", "bnsurgery float32": "bnsurgery, float32", COMPILED: "bnsurgery, compiled"}
SHOWN |= {"careful": "careful PyTorch", "foolbox": "foolbox + loop", "ART": "ART + loop"}


def bars(record: Mapping[str, Any], order: Sequence[str], path: Path) -> None:
    """Bars of the ratio to torchattacks with the plain loop, and how far the rounds are apart."""
    models = {name: record["models"][name]["summary"]["contenders"] for name in order if name in record["models"]}
    models = {name: rows for name, rows in models.items() if any(row["ratio"] for row in rows.values())}
    if not models:
        print(f"nothing to draw: no ratio to {BASELINE}")
        return
    contenders = [name for name in SHOWN if any(name in rows for rows in models.values())]
    colors = dict(zip(SHOWN, ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999"), strict=True))
    hatches = dict(zip(SHOWN, ("", "//", "xx", "", "..", "\\\\"), strict=True))
    height = 0.8 / len(contenders)
    figure = Figure(figsize=(7, 1 + 0.19 * (len(contenders) + 1.2) * len(models)), layout="constrained")
    ax = figure.subplots()
    for place, name in enumerate(contenders):
        rows = [(line, own[name]["ratio"]) for line, own in enumerate(models.values()) if name in own]
        medians = [ratio["median"] for _, ratio in rows]
        ends = [[r["median"] - r["min"] for _, r in rows], [r["max"] - r["median"] for _, r in rows]]
        where = [line + (place - (len(contenders) - 1) / 2) * height for line, _ in rows]
        ax.barh(
            where,
            medians,
            0.92 * height,
            xerr=ends,
            color=colors[name],
            hatch=hatches[name],
            edgecolor="black",
            linewidth=0.4,
            error_kw={"elinewidth": 1, "capsize": 2},
            label=SHOWN[name],
        )
        for y, (_, ratio) in zip(where, rows, strict=True):
            ax.annotate(
                f"{ratio['median']:.2f}",
                (ratio["max"], y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    ax.axvline(1, color="black", lw=1, ls="--", label=BASELINE)
    ax.set_yticks(range(len(models)), list(models))
    ax.invert_yaxis()
    ax.margins(x=0.08)
    ax.set(
        xlabel=f"adversarial BN fine-tuning, speed relative to {BASELINE}\n(median and range of the rounds)",
        ylabel="model",
        xlim=(0, None),
    )
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=200)
    print(f"drawn: {path.name}")


def curves(record: Mapping[str, Any], labels: Mapping[str, str], path: Path) -> None:
    """Time above, memory below, a column for each factor."""
    styles: dict[str, dict[str, Any]] = {
        "bnsurgery": {"color": "#0072B2", "marker": "o"},
        BASELINE: {"color": "#D55E00", "marker": "s", "ls": "--"},
    }
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 4, sharex="col", sharey="row")
    for column, factor in enumerate(labels):
        points = {int(value): point for value, point in record["factors"].get(factor, {}).items()}
        time_ax, memory_ax = axes[:, column]
        for name, style in styles.items():
            rounds = [[statistics.median(own) for own in p["step_seconds"][name]] for p in points.values()]
            middle = [statistics.median(own) for own in rounds]
            ends = [
                [m - min(own) for m, own in zip(middle, rounds, strict=True)],
                [max(own) - m for m, own in zip(middle, rounds, strict=True)],
            ]
            time_ax.errorbar(list(points), middle, yerr=ends, ms=4, capsize=2, label=name, **style)
            known = {value: point["peak_mebibytes"][name] for value, point in points.items()}
            known = {value: peak for value, peak in known.items() if peak is not None}
            memory_ax.plot(list(known), list(known.values()), ms=4, **style)
        for ax in (time_ax, memory_ax):
            ax.set(xscale="log", yscale="log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(LogFormatter())
            ax.grid(alpha=0.3)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xticks(list(points), [str(value) for value in points])
        memory_ax.set_xlabel(labels[factor])
    axes[0, 0].set_ylabel("time of a step (s)")
    axes[1, 0].set_ylabel("peak memory of a step (MiB)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=200)
    print(f"drawn: {path.name}")
