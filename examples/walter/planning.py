"""How long what is left will take, judged by what is finished."""

from __future__ import annotations

from examples.walter.results import Results
from examples.walter.rows import ROWS, Row
from examples.walter.training import Session


def passes(session: Session, row: Row) -> int:
    """Passes through the network that training a row takes, forward or backward, for one image."""
    attack = row.attack()
    return session.scaled(row).epochs * (3 + (0 if attack is None else 2 * attack.steps))


def remaining(session: Session) -> str:
    """One line about what is left to do."""
    results = Results(session.folder)
    trained = {key: record for key in ROWS if (record := results.training(key)) is not None}
    measured = {key: record for key in ROWS if (record := results.evaluation(key)) is not None}
    left = sum(passes(session, row) for key, row in ROWS.items() if key not in trained)
    count = f"{len(ROWS) - len(measured)} of {len(ROWS)} rows are left"
    if not trained or not measured:
        return f"{count}; no estimate before the first is done"
    pace = sum(record["seconds"] for record in trained.values()) / sum(passes(session, ROWS[key]) for key in trained)
    each = sum(record["seconds"] for record in measured.values()) / len(measured)
    seconds = pace * left + each * (len(ROWS) - len(measured))
    return f"{count}, about {_span(seconds)} by the pace so far"


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
