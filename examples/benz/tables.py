"""The tables: networks, sets of images, the two readouts of the conflicting set, transfer."""

from __future__ import annotations

from typing import Any

from examples.benz.rows import ROWS, Row, SetRow
from examples.benz.work import Benz
from examples.common.checks import markdown
from examples.common.commands import PENDING
from examples.common.files import Pending


def everything(lab: Any) -> str:
    """All tables."""
    return (
        f"## Networks, width {lab.folder.width}: errors in percent, ± one standard error\n\n{networks(lab)}\n"
        f"## Sets of images\n\n{sets(lab)}\n"
        f"## Trained on the conflicting set: percent of test images\n\n{conflicting(lab)}\n"
        f"## Transfer: errors in percent\n\n{transfer(lab)}"
    )


def networks(lab: Benz) -> str:
    """Every network beside the paper's, where that has it."""
    count = lab.scale.tested
    head = ["network", "epochs", f"clean, {count:,}", f"L2 0.25, {count:,}", f"L-infinity 1/255, {count:,}", "LIGS"]
    head += ["without LIGS", "hours", "paper: clean", "paper: L2 0.25", "paper: LIGS"]
    return markdown(head, [_network(lab, key, row) for key, row in ROWS.items() if isinstance(row, Row)])


def _network(lab: Benz, key: str, row: Row) -> list[str]:
    paper = ["", "", ""]
    if row.paper is not None:
        clean, robust, ligs = row.paper
        paper = [f"{100 - clean:g}", f"{100 - robust:g}", f"{ligs:g}"]
    epochs, record = str(lab.scale.epochs(row.epochs)), lab.evaluation(key)
    if record is None:
        return [row.name, epochs, *[PENDING] * 6, *paper]
    tests = record["tests"]
    errors = [f"{tests[name]['error']:.1f} ± {tests[name]['standard_error']:.1f}" for name in ("clean", "l2", "linf")]
    ligs = tests["ligs"]
    mean = "none" if ligs["mean"] is None else f"{ligs['mean']:.3f} ± {ligs['standard_error'] or 0:.3f}"
    hours = (lab.trained(key)["seconds"] + record["seconds"]) / 3600
    return [row.name, epochs, *errors, mean, f"{ligs['zero'] + ligs['nonfinite']:,}", f"{hours:.1f}", *paper]


def sets(lab: Benz) -> str:
    """How they were made, and how well that went."""
    rows = []
    for key, row in ROWS.items():
        if not isinstance(row, SetRow):
            continue
        record = lab.training(key)
        about = [row.name, ROWS[row.model].name, "CIFAR-10" if row.source is None else ROWS[row.source].name]
        if record is None:
            rows.append([*about, *[PENDING] * 5])
            continue
        settings, distance = record["configuration"], record["distance"]
        reached = "" if record["reached"] is None else f"{100 * record['reached'] / record['examples']:.1f}%"
        moved = "" if distance is None else f"{distance[0]:.2f} to {distance[1]:.3f}"
        steps = f"{settings['steps']} of {settings['step_size']:g}"
        rows.append([*about, f"{record['examples']:,}", steps, reached, moved, f"{record['seconds'] / 3600:.1f}"])
    head = ["set", "made on", "of", "images", "steps", "taken for their labels", "distance of features", "hours"]
    return markdown(head, rows)


def conflicting(lab: Benz) -> str:
    """What networks that are trained on the conflicting set take ordinary images for, over the epochs."""
    rows = []
    for key in ("conflicting-bn", "conflicting-none"):
        record = lab.training(key)
        if record is None:
            rows.append([ROWS[key].name, *[PENDING] * 3])
            continue
        measures = record["measures"]
        shown = sorted({min(epoch, len(measures) - 1) for epoch in (1, 2, 4, 8, 16, 32, len(measures) - 1)})
        for epoch in shown:
            found = measures[epoch]
            rows.append([ROWS[key].name, str(epoch), f"{found['next']:.1f}", f"{100 - found['clean']:.1f}"])
    return markdown(["network", "epoch", "t + 1 (robust features)", "t (non-robust features)"], rows)


def transfer(lab: Benz) -> str:
    """Rows are attacked, columns are given the examples."""
    try:
        found = lab.matrix()
    except Pending:
        return "pending\n"
    head = ["attacked", *found.models]
    clean = [f"{100 * wrong / found.examples:.1f}" for wrong in found.clean_wrong]
    lines = [[name, *(f"{error:.1f}" for error in row)] for name, row in zip(found.models, found.error, strict=True)]
    return markdown(head, [["none (clean)", *clean], *lines])
