"""The tables: parameters (Table 1), errors beside the paper's (Table 2), and the remarks of the text."""

from __future__ import annotations

from typing import Any

from examples.common.checks import markdown
from examples.resnet import resnet20
from examples.walter.results import OtherStart, Results, at
from examples.walter.rows import CHOICES, EPS, ROWS, Row, described, table
from examples.walter.training import shares

PENDING = "pending"
TRAINS = {"all": "everything", "bn": "gamma, beta", "bn-params": "gamma, beta", "bn-stats": "nothing"}


def parameters(width: int) -> str:
    """Table 1: what trains, and its share of all parameters, here and at the paper's width."""
    models = {at: resnet20(at) for at in dict.fromkeys((width, 64))}

    def line(row: Row) -> list[str]:
        cells = []
        for model in models.values():
            found = shares(model, row)
            cells.append(f"{found['parameters']:,} ({found['percent']:.2f}%)")
        start = "random" if row.start is None else ROWS[row.start].name
        examples = "adversarial" if row.adversarial else "clean"
        return [row.name, start, ", ".join([TRAINS[row.train], *row.also]), row.statistics, examples, *cells]

    head = ["row", "start", "trains", "statistics", "examples", *(f"trainable at width {at}" for at in models)]
    return markdown(head, map(line, table().values()))


def errors(results: Results) -> str:
    """Table 2, and the paper's."""
    scale = results.scale
    head = ["row", "epochs", *(f"clean, first {count:,}" for count in scale.clean)]
    head += [f"{attack}, first {scale.robust:,}" for attack in ("AutoAttack", "PGD-20")]
    return markdown(
        [*head, "hours", "paper: clean", "paper: AutoAttack"],
        (_errors(results, key, row) for key, row in table().items()),
    )


def _errors(results: Results, key: str, row: Row) -> list[str]:
    clean, robust = row.paper or (0.0, 0.0)
    paper = [f"{clean:.2f}", f"{robust:.1f}"]
    record, epochs = results.evaluation(key), str(results.scale.row(row).epochs)
    if record is None:
        return [row.name, epochs, *[PENDING] * (len(results.scale.clean) + 3), *paper]
    errors = [f"{record['clean_error'][str(count)]:.2f}" for count in results.scale.clean]
    hours = f"{_hours(results, key):.1f}"
    return [row.name, epochs, *errors, _robust(record["autoattack"]), _robust(at(record, EPS)), hours, *paper]


def _hours(results: Results, key: str) -> float:
    """Of training and evaluation, of a row that is evaluated."""
    return float((results.training(key) or {})["seconds"] + results.evaluated(key)["seconds"]) / 3600


def time_taken(results: Results) -> str:
    """One line: how many rows are finished, and how long they took."""
    done = [key for key in ROWS if results.evaluation(key) is not None]
    above, hours = sum(key in table() for key in done), sum(_hours(results, key) for key in done)
    beside = f"{len(done) - above} of {len(ROWS) - len(table())} beside them"
    return f"Finished: {above} of the {len(table())} rows above and {beside}; together {hours:.1f} hours.\n"


def remarks(results: Results) -> str:
    """BN STATS at smaller radii, with the same radius in the forward passes, and rows beside the table."""
    parts, measures = [], ("cross-entropy", "robust error")
    for key in ("bn-stats", "bn-stats-eps4", "bn-stats-eps2", "bn-stats-eps1"):
        eps = ROWS[key].eps
        cells = []
        for other in ("normal", key):
            record = results.evaluation(other)
            found = None if record is None else at(record, eps)
            cells += [PENDING] * 2 if found is None else [_loss(found), _robust(found)]
        parts.append([f"{255 * eps:.0f}/255", *cells])
    head = ["eps", *(f"{name}: {what}" for name in ("NORMAL", "BN STATS of this eps") for what in measures)]
    text = markdown(head, parts) + "\n"
    rows = []
    for key in (
        "bn-stats",
        "bn-stats-log",
        "bn-only-params",
        "bn-only-params-warm",
        "bn-params",
        "bn-params-no-decay",
        "bn-params-longer",
    ):
        record = results.evaluation(key)
        if record is None:
            rows.append([ROWS[key].name, *[PENDING] * 4])
            continue
        clean = record["clean_error"][str(max(results.scale.clean))]
        robust, loss, hours = _robust(record["autoattack"]), _loss(at(record, EPS)), f"{_hours(results, key):.1f}"
        rows.append([ROWS[key].name, f"{clean:.2f}", robust, loss, hours])
    most = f"clean, first {max(results.scale.clean):,}"
    return text + markdown(["row", most, "AutoAttack", "cross-entropy under PGD-20", "hours"], rows)


def choices(results: Results) -> str:
    """Settings that were compared on left-out training images, and which of them a row has; "" where none were."""
    rows: list[list[str]] = []
    for key, row in ROWS.items():
        of_row = []
        for settings in CHOICES.get(key, ()):
            values = described(settings)
            try:
                record = results.choice(key, settings)
            except OtherStart:
                of_row.append([row.name, values, "-", "-", "-", f"of another {ROWS[str(row.start)].name}"])
                continue
            its_own = all(getattr(row, option) == value for option, value in settings.items() if option != "epochs")
            if record is None:
                found = [PENDING] * 3
            elif record["cross_entropy"] is None:
                found = ["diverged"] * 3
            else:
                found = [f"{record['clean_error']:.1f}", _robust(record), _loss(record)]
            of_row.append([row.name, values, *found, "yes" if its_own else ""])
        rows += of_row if any(PENDING not in line for line in of_row) else []
    clean, robust = (f"{count:,} left-out images" for count in (results.scale.held_out, results.scale.robust))
    head = ["row", "setting", f"clean, {clean}", f"PGD-20, {robust}", "cross-entropy under it", "as in the row"]
    return markdown(head, rows) if rows else ""


def _robust(found: dict[str, Any]) -> str:
    return f"{found['robust_error']:.1f} ± {found['standard_error']:.1f}"


def _loss(found: dict[str, Any]) -> str:
    return f"{found['cross_entropy']:.2f} ± {found['cross_entropy_standard_error']:.2f}"


def everything(results: Results) -> str:
    """All tables."""
    width, compared = results.folder.width, choices(results)
    return (
        f"## Errors in percent, width {width}, ± one standard error\n\n{errors(results)}\n{time_taken(results)}\n"
        f"## Parameters\n\n{parameters(width)}\n"
        f"## Remarks: under PGD-20\n\n{remarks(results)}"
        + (f"\n## Settings compared by `choose`\n\n{compared}" if compared else "")
    )
