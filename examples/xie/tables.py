"""The tables: each network through each of its branches, and networks against each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from examples.common.checks import markdown, paired
from examples.common.commands import PENDING
from examples.xie.rows import DEPTHS, ROWS, Row, held, key_of
from examples.xie.work import Xie

TESTS = ("clean", "pgd-20", "autoattack")


def everything(lab: Any) -> str:
    """All tables."""
    text = f"## Errors in percent, width {lab.folder.width}, ± one standard error\n\n{errors(lab)}"
    lines = differences(lab)
    return f"{text}\n## By how many points errors are lower, of the same images\n\n{lines}" if lines else text


def errors(lab: Xie) -> str:
    """Clean and robust error of each network; of mixture BN, through each branch."""
    count, attacked = f"{lab.scale.tested:,}", f"{lab.scale.attacked:,}"
    head = ["network", "through", "epochs", f"clean, {count}", f"PGD-20, {count}", f"AutoAttack, {attacked}", "hours"]
    return markdown(head, [line for key, row in ROWS.items() for line in _lines(lab, key, row)])


def differences(lab: Xie) -> str:
    """Error of one network less that of another, of pairs that are both evaluated; "" where none are.

    Mixture BN is taken through its adversarial branch, also for the clean error.
    """
    lines = []
    for key, than in _pairs():
        one, other = lab.evaluation(key), lab.evaluation(than)
        if one is not None and other is not None:
            gains = [paired(held(one, key, test), held(other, than, test)) for test in TESTS]
            cells = [f"{gain.value:+.1f} ± {gain.error:.1f}" for gain in gains]
            lines.append([ROWS[key].name, ROWS[than].name, *cells])
    count, attacked = f"{lab.scale.tested:,}", f"{lab.scale.attacked:,}"
    head = ["network", "against", f"clean, {count}", f"PGD-20, {count}", f"AutoAttack, {attacked}"]
    return markdown(head, lines) if lines else ""


def _pairs() -> Iterator[tuple[str, str]]:
    for depth in DEPTHS:
        adv, mix, mbn = (key_of(kind, depth) for kind in ("adv", "mix", "mbn"))
        yield from ((adv, mix), (mbn, mix), (adv, mbn))
        yield from ((key_of(kind, depth, consistent=True), key_of(kind, depth)) for kind in ("adv", "mix", "mbn"))


def _lines(lab: Xie, key: str, row: Row) -> list[list[str]]:
    record, epochs = lab.evaluation(key), str(lab.scale.epochs(row.epochs))
    lines = []
    for branch in row.branches or ("",):
        through = {"": "one BN", "clean": "clean BN", "adv": "adversarial BN"}[branch]
        if record is None:
            lines.append([row.name, through, epochs, *[PENDING] * 4])
            continue
        tests, prefix = record["tests"], f"{branch}: " if branch else ""
        cells = [_error(tests[f"{prefix}{name}"]) for name in TESTS]
        hours = f"{(lab.trained(key)['seconds'] + record['seconds']) / 3600:.1f}"
        lines.append([row.name, through, epochs, *cells, hours])
    return lines


def _error(found: dict[str, Any]) -> str:
    return f"{found['error']:.1f} ± {found['standard_error']:.1f}"
