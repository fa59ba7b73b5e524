"""The tables: each network through each of its branches."""

from __future__ import annotations

from typing import Any

from examples.common.checks import markdown
from examples.common.commands import PENDING
from examples.xie.rows import ROWS, Row
from examples.xie.work import Xie


def everything(lab: Any) -> str:
    """All tables."""
    return f"## Errors in percent, width {lab.folder.width}, ± one standard error\n\n{errors(lab)}"


def errors(lab: Xie) -> str:
    """Clean and robust error of each network; of mixture BN, through each branch."""
    count, attacked = f"{lab.scale.tested:,}", f"{lab.scale.attacked:,}"
    head = ["network", "through", "epochs", f"clean, {count}", f"PGD-20, {count}", f"AutoAttack, {attacked}", "hours"]
    return markdown(head, [line for key, row in ROWS.items() for line in _lines(lab, key, row)])


def _lines(lab: Xie, key: str, row: Row) -> list[list[str]]:
    record, epochs = lab.evaluation(key), str(lab.scale.epochs(row.epochs))
    lines = []
    for branch in row.branches or ("",):
        through = {"": "one BN", "clean": "clean BN", "adv": "adversarial BN"}[branch]
        if record is None:
            lines.append([row.name, through, epochs, *[PENDING] * 4])
            continue
        tests, prefix = record["tests"], f"{branch}: " if branch else ""
        cells = [_error(tests[f"{prefix}{name}"]) for name in ("clean", "pgd-20", "autoattack")]
        hours = f"{(lab.trained(key)['seconds'] + record['seconds']) / 3600:.1f}"
        lines.append([row.name, through, epochs, *cells, hours])
    return lines


def _error(found: dict[str, Any]) -> str:
    return f"{found['error']:.1f} ± {found['standard_error']:.1f}"
